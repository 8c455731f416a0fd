"""A run by whom the config names: this process, or workers (`executor.name`)."""

from __future__ import annotations

import os
from typing import Any

from seal_jax.config import RunConfig
from seal_jax.fleet import ray_run
from seal_jax.rest_em import loop


def train(config: RunConfig) -> dict[str, Any]:
    """`rest_em.loop.train`; the table is the same, whoever computes it."""
    return ray_run.run(config, "train") if config.executor.name == "ray" else loop.train(config)


def evaluate(config: RunConfig, trained: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """`rest_em.loop.evaluate_only`, in the same way."""
    if config.executor.name != "ray":
        return loop.evaluate_only(config, trained)
    return ray_run.run(config, "evaluate", None if trained is None else os.fspath(trained))
