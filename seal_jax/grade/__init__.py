"""Graders: whether an answer is right."""

from __future__ import annotations

from typing import TYPE_CHECKING

from seal_jax.errors import SealError

if TYPE_CHECKING:
    from collections.abc import Callable

    from seal_jax.config import GradeConfig
    from seal_jax.grade.base import Generate, Grader


def build(grade_config: GradeConfig, generate: Generate | None = None, check: Callable[[], None] = lambda: None) -> Grader:
    """The grader that the configuration names; "judge" needs `generate`, and has `check` for whether that can work.

    Raises `SealError` for a name or a setting that cannot work. Whether a server or a model is there is for the grader's `check`.
    """
    # Imported here, so that the offline grader needs none of the packages of the others.
    if grade_config.name == "match":
        from seal_jax.grade.match import MatchGrader

        return MatchGrader(grade_config.threshold)
    if grade_config.name == "judge":
        from seal_jax.grade.judge import JudgeGrader

        if generate is None:
            raise SealError("grade.name=judge: needs a model to answer with, but none is loaded here; use 'match' or 'endpoint'")
        return JudgeGrader(generate, check)
    if grade_config.name == "endpoint":
        from seal_jax.grade.endpoint import EndpointGrader

        return EndpointGrader(grade_config)
    raise SealError(f"grade.name={grade_config.name!r}: expected one of match, judge, endpoint")
