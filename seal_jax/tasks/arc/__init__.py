"""Few-shot adaptation: ARC puzzles, whose rule is to be found from a few examples."""

from seal_jax.tasks.arc.task import ArcTask, Config, build
from seal_jax.tasks.arc.view import VIEW

__all__ = ["VIEW", "ArcTask", "Config", "build"]
