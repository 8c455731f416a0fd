"""A lane of a continual run: passage after passage, under one method against forgetting."""

from __future__ import annotations

import dataclasses
from typing import Any

from seal_jax import rng
from seal_jax.config import MethodConfig
from seal_jax.tasks.base import Context, TrainSequence

Trials = dict[str, dict[str, Any]]  # by context id: what was answered and earned


@dataclasses.dataclass
class Lane:
    """One sequence of passages under one method, and what stands of it so far."""

    name: str
    method: MethodConfig
    sequence: int
    contexts: list[Context]
    bits: float | None  # per token of the held texts, at the last step
    learnt: list[tuple[TrainSequence, ...]] = dataclasses.field(default_factory=list)  # what each edit so far trained on, replays apart
    answers: Trials = dataclasses.field(default_factory=dict)  # at the last step

    def replayed(self, seed: int) -> tuple[TrainSequence, ...]:
        """Training sequences of earlier passages to train on again with the next one, in the order of the draw."""
        earlier = [s for part in self.learnt for s in part]
        draw = rng.generator(seed, "continual", self.sequence, len(self.learnt), "replay")
        return tuple(earlier[i] for i in draw.permutation(len(earlier))[: self.method.replay])
