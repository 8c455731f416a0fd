"""Which self-edits of a context ReST-EM keeps for the M-step: pure functions on their rewards.

All return candidate indices, best first; equal rewards keep the order of the candidates, so that a tie has one outcome. An ungraded
candidate is never kept. A kept place whose text is blank is dropped and not filled by the next best, as in the original (`_top_k` in
`build_SFT_dataset.py`): there is nothing to learn from an empty self-edit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from seal_jax.errors import SealError


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One self-edit of a context. `index` is what selection returns; `reward` is None if the edit could not be graded."""

    index: int
    text: str
    reward: float | None


def select(rule: str, candidates: Sequence[Candidate], keep: int = 1, unadapted: float | None = None) -> list[int]:
    """Selection by the name of `rest_em.select`: "best", "top" (`keep`), "gain" (over the reward `unadapted`) or "right" (reward 1)."""
    if rule == "best":
        return best(candidates)
    if rule == "top":
        return top(candidates, keep)
    if rule == "gain":
        return gain(candidates, unadapted)
    if rule == "right":
        return right(candidates)
    raise SealError(f"rest_em.select={rule!r}: expected one of best, top, gain, right")


def best(candidates: Sequence[Candidate]) -> list[int]:
    """The candidate with the highest reward: the best of K, the paper's choice."""
    return top(candidates, 1)


def top(candidates: Sequence[Candidate], keep: int) -> list[int]:
    """The `keep` candidates with the highest rewards, or all if there are fewer."""
    return [c.index for c in _ranked(candidates)[: max(keep, 0)] if c.text.strip()]


def gain(candidates: Sequence[Candidate], unadapted: float | None) -> list[int]:
    """All candidates whose reward is above `unadapted`, the reward of the context without a self-edit; none if that is ungraded."""
    if unadapted is None:
        return []
    return [c.index for c in _ranked(candidates) if c.reward > unadapted and c.text.strip()]


def right(candidates: Sequence[Candidate]) -> list[int]:
    """All candidates that got every question right: the paper's choice for ARC (section 3.2)."""
    return [c.index for c in _ranked(candidates) if c.reward >= 1.0 and c.text.strip()]


def _ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    graded = [c for c in candidates if c.reward is not None and not math.isnan(c.reward)]
    return sorted(graded, key=lambda c: c.reward, reverse=True)  # stable: reverse=True keeps equal ones in order
