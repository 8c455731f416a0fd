"""Knowledge incorporation: passages and questions about them."""

from seal_jax.tasks.base import View
from seal_jax.tasks.knowledge.task import Config, KnowledgeTask, build

__all__ = ["VIEW", "Config", "KnowledgeTask", "build"]

VIEW = View(context="Passage")
