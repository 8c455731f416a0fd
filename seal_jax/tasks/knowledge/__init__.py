"""Knowledge incorporation: passages and questions about them."""

from seal_jax.tasks.knowledge.task import Config, KnowledgeTask, build

__all__ = ["Config", "KnowledgeTask", "build"]
