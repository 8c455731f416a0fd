"""Tasks: what a context means, how a self-edit trains on it, how it is scored. One package each; `base` has the interface."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from seal_jax.tasks.base import View

if TYPE_CHECKING:
    from seal_jax.grade.base import Grader
    from seal_jax.tasks.base import Task


def build(config: Any, grader: Grader) -> Task:
    """The task of `config`, an instance of the `Config` of the package that `config.name` names."""
    return importlib.import_module(f"seal_jax.tasks.{config.name}").build(config, grader)


def view(name: str) -> View:
    """How the task `name` is shown; the default for one that says nothing about it, or that this installation does not have."""
    try:
        return getattr(importlib.import_module(f"seal_jax.tasks.{name}"), "VIEW", View())
    except ModuleNotFoundError:
        return View()
