"""Measure a group of contexts: sample self-edits, fit an adapter for each and each seed at once, answer, grade.

The E-step of ReST-EM and the evaluation both are this; they differ in which methods stand beside the self-edits.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from seal_jax.rest_em import given
from seal_jax.rest_em.policy import Adapted, Edit, Key, Policy
from seal_jax.tasks.base import Context, Recorded, Score, Task, TrainingSet, Trial

NONE = "no adaptation"


def measure(
    policy: Policy, task: Task, contexts: Sequence[Context], *, key: Key, edits: int, seeds: int, baselines: bool, what: str = ""
) -> dict[str, Any]:
    """The record of one group: for each context what every method answered and earned, over `seeds` inner-loop seeds.

    `edits` self-edits are sampled a context (K), or are the first of those that the task has for it. `baselines` adds the task's own
    training sets (the passage alone). `key` names the random draws, together with context, candidate and seed. The bare policy answers
    once a context, not once a trial.
    """
    clock = Clock()
    with clock("sample"):
        keys = [[(*key, context.id, k) for k in range(edits)] for context in contexts]
        texts = given.write(policy, task, contexts, keys, f"writing self-edits{what}")
    trials: list[tuple[int, str | int, int, TrainingSet]] = []  # (context, baseline or candidate, seed, data)
    sets: list[dict[str | int, TrainingSet]] = []  # per context, by baseline or candidate
    for i, context in enumerate(contexts):
        made: dict[str | int, TrainingSet] = {**task.baselines(context)} if baselines else {}
        made.update(enumerate(task.training_set(context, text) for text in texts[i]))
        sets.append({method: _checked(policy, data) for method, data in made.items()})
        trials += [(i, method, seed, data) for method, data in sets[-1].items() if data.problem is None for seed in range(seeds)]
    probes = [tuple(task.probes(c)) for c in contexts]
    with clock("adapt"):
        adapted = policy.adapt([Edit((*key, contexts[i].id, m, s), data, probes[i]) for i, m, s, data in trials], what)
    with clock("bare"):
        bare = policy.answer(probes, what=f"answering without adaptation{what}")
    with clock("grade"):
        outputs = [*((contexts[i], a.outputs) for (i, *_), a in zip(trials, adapted, strict=True)), *zip(contexts, bare, strict=True)]
        scores = task.score(outputs)
    results = {(i, m, s): _trial(s, a, score) for (i, m, s, _), a, score in zip(trials, adapted, scores, strict=False)}
    plain = [_trial(0, Adapted(tuple(o), np.zeros(0)), s) for o, s in zip(bare, scores[len(trials) :], strict=True)]
    records = []
    for i, context in enumerate(contexts):
        measured = {m: [results[i, m, s] for s in range(seeds) if (i, m, s) in results] for m in sets[i]}
        methods = {NONE: [plain[i]], **{m: found for m, found in measured.items() if isinstance(m, str)}}
        records.append(_record(task, context, methods, [_edit(k, text, sets[i][k], measured[k]) for k, text in enumerate(texts[i])]))
    return {"contexts": records, "seconds": clock.seconds}


def from_recorded(task: Task, context: Context, found: Recorded) -> dict[str, Any]:
    """A context's record of what was measured elsewhere, in the form of `measure`. What was trained on is not known of it."""

    def told(trials: Sequence[Trial]) -> list[dict[str, Any]]:
        return [_trial(i, Adapted(t.outputs, np.zeros(0)), t.score) for i, t in enumerate(trials)]

    edits = [_edit(k, text, TrainingSet(()), told(trials)) for k, (text, trials) in enumerate(found.edits)]
    return _record(task, context, {NONE: told([found.unadapted])}, edits)


def _record(task: Task, context: Context, methods: dict[str, Any], edits: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": context.id,
        "title": context.title,
        "passage": task.text(context),
        "questions": [list(pair) for pair in task.describe(context)],
        "methods": methods,
        "edits": edits,
    }


def _checked(policy: Policy, data: TrainingSet) -> TrainingSet:
    """The training set, with a problem set if the model's tokens leave nothing to predict in it."""
    if data.problem is None and not policy.tokenise(data):
        return dataclasses.replace(data, problem="no token to predict in the training sequences")
    return data


def _trial(seed: int, adapted: Adapted, score: Score) -> dict[str, Any]:
    losses = [float(x) for x in adapted.losses]
    return {
        "seed": seed,
        "outputs": list(adapted.outputs),
        **({} if score.answers is None else {"answers": list(score.answers)}),
        "verdicts": list(score.verdicts),
        "reward": score.reward,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "steps": len(losses),
    }


def _edit(candidate: int, text: str, data: TrainingSet, trials: list[dict[str, Any]]) -> dict[str, Any]:
    """An unusable self-edit earns 0; one that could not be graded has no reward."""
    rewards = [t["reward"] for t in trials if t["reward"] is not None]
    return {
        "candidate": candidate,
        "text": text,
        "problem": data.problem,
        "dropped": data.dropped,
        "sequences": [s.shown for s in data.sequences],
        "trials": trials,
        # Exact before it is rounded, so that 0.2, 0.4 and 0.6 are no more than three times 0.4.
        "reward": 0.0 if data.problem else statistics.mean(rewards) if rewards else None,
    }


class Clock:
    """Seconds spent by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stage: tuple[str, float] | None = None

    def __call__(self, stage: str) -> Clock:
        self._stage = (stage, time.monotonic())
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        assert self._stage is not None
        stage, start = self._stage
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.monotonic() - start, 3)
