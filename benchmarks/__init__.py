"""Benchmarks of the engines beside what a user would otherwise run: see docs/performance.md."""
