"""Whether an edit may stay, by what it does to items held back: kept, scaled down, or refused, with the reason.

Every lane's edit is tried at one scale after the other, all lanes at once. Source: STABLE (arXiv 2510.16089), which bounds the fall of
exact matches, the rise of bits, or the divergence that a LoRA edit may cause, and scales down or rejects those beyond.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from seal_jax.experiments.lane import Lane
from seal_jax.fit.likelihood import Texts
from seal_jax.parallel import mesh as mesh_lib
from seal_jax.rest_em import retention
from seal_jax.rest_em.held import Held
from seal_jax.rest_em.stage import Stage

MEASURES = {
    "answers": "fall of the share of earlier questions answered right",
    "bits": "rise of bits per token of the held texts",
    "kl": "bits per token by which predictions moved on the held texts",
}


class Gate:
    """The gates of all lanes at passage `number`."""

    def __init__(self, stage: Stage, texts: Texts, lanes: Sequence[Lane], held: Held, number: int):
        self.stage, self.texts, self.lanes, self.held, self.number = stage, texts, lanes, held, number

    def decide(self, new: Any, usable: set[int]) -> tuple[list[float], list[str | None]]:
        """For each lane the scale of its new edit (`new`: host arrays [L, ...]; lanes that are not `usable` have none) and the reason
        where that is below 1."""
        scales = [1.0 if i in usable else 0.0 for i in range(len(self.lanes))]
        costs_of: list[list[str]] = [[] for _ in self.lanes]
        gated = [i for i in sorted(usable) if self.lanes[i].method.gate.measure != "none"]
        undecided = set(gated)
        for rung in itertools.count():
            for i in undecided:
                ladder = self.lanes[i].method.gate.scales
                scales[i] = ladder[rung] if rung < len(ladder) else 0.0
            undecided = {i for i in undecided if scales[i]}
            if not undecided:
                break
            costs = self._costs(new, scales, gated)
            for i in undecided:
                costs_of[i].append(f"{costs[i]:.3f} at {scales[i]:g}")
            undecided = {i for i in undecided if not costs[i] <= self.lanes[i].method.gate.budget}  # nor is NaN
        reasons: list[str | None] = [None] * len(self.lanes)
        for i in gated:
            if scales[i] < 1.0:
                gate, end = self.lanes[i].method.gate, f"scaled to {scales[i]:g}" if scales[i] else "refused"
                reasons[i] = f"{end}: {MEASURES[gate.measure]} {', '.join(costs_of[i])}; budget {gate.budget:g}"
        return scales, reasons

    def _costs(self, new: Any, scales: Sequence[float], gated: Sequence[int]) -> dict[int, float]:
        """What the edits cost the gated lanes at these scales, each by its own measure."""
        chosen = [*gated, *[gated[0]] * (-len(gated) % mesh_lib.shards(self.stage.policy.mesh))]  # as many on each shard
        after = self.held.place(self.held.with_edit(chosen, self.number, new, scales))
        measures = {self.lanes[i].method.gate.measure for i in gated}
        found: dict[str, np.ndarray] = {}
        if "bits" in measures:
            found["bits"] = self.stage.policy.bits(self.texts, after) - np.asarray([self.lanes[i].bits for i in chosen], np.float64)
        if "kl" in measures:
            found["kl"] = self.stage.policy.divergence(self.texts, self.held.place(self.held.of(chosen)), after)
        if "answers" in measures:
            found["answers"] = self._fall(after, gated)
        return {i: float(found[self.lanes[i].method.gate.measure][place]) for place, i in enumerate(gated)}

    def _fall(self, after: Any, gated: Sequence[int]) -> np.ndarray:
        """By how much the share of earlier passages' questions that are answered right falls, for each lane gated by that; else 0."""
        policy, task = self.stage.policy, self.stage.task
        places = [place for place, i in enumerate(gated) if self.lanes[i].method.gate.measure == "answers"]
        asked = [(place, c) for place in places for c in self.lanes[gated[place]].contexts[: self.number]]
        outputs = policy.answer([task.probes(c) for _, c in asked], after, [place for place, _ in asked], "answering for the gate")
        scores = task.score([(c, tuple(o)) for (_, c), o in zip(asked, outputs, strict=True)])
        fall = np.zeros(len(gated))
        for place in places:
            lane = self.lanes[gated[place]]
            now = [v for (p, _), s in zip(asked, scores, strict=True) if p == place for v in s.verdicts]
            before = [v for c in lane.contexts[: self.number] for v in lane.answers[c.id]["verdicts"]]
            if before:  # what could not be graded shows no harm, and no harmlessness either
                found = retention.fall(before, now)
                fall[place] = np.nan if found is None else found
        return fall
