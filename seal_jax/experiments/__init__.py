"""Experiments built on self-edits beside ReST-EM."""
