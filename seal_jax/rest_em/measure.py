"""Measure a group of contexts: sample self-edits, fit an adapter for each and each seed at once, answer, grade.

The E-step of ReST-EM and the evaluation both are this; they differ in which methods stand beside the self-edits.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from seal_jax.parallel import mesh as mesh_lib
from seal_jax.rest_em import given, retention
from seal_jax.rest_em.policy import Edit, Key, Policy
from seal_jax.rest_em.retention import Memory
from seal_jax.runs.store import Result
from seal_jax.tasks.base import Apart, Context, Recorded, Score, Task, TrainingSet, Trial

log = logging.getLogger(__name__)

NONE = "no adaptation"


def measure(
    policy: Policy,
    task: Task,
    contexts: Sequence[Context],
    *,
    key: Key,
    edits: int,
    seeds: int,
    baselines: bool,
    what: str = "",
    memory: Memory | None = None,
) -> Result:
    """The record of one group: for each context what every method answered and earned, over `seeds` inner-loop seeds. Where the answers
    are graded elsewhere, a function that waits for that and gives the record: the devices may go on with the next group.

    `edits` self-edits are sampled a context (K), or are the first of those that the task has for it. `baselines` adds the task's own
    training sets (the passage alone). `key` names the random draws, together with context, candidate and seed. The bare policy answers
    once a context, not once a trial. With a `memory`, everything is fitted and answered on top of that, each trial tells what became of
    it, and a self-edit has a "score", its reward less what it harmed.
    """
    clock, held = Clock(), None if memory is None else memory.held
    with clock("sample"):
        keys = [[(*key, context.id, k) for k in range(edits)] for context in contexts]
        texts = given.write(policy, task, contexts, keys, f"writing self-edits{what}")
    trials: list[tuple[int, str | int, int, TrainingSet]] = []  # (context, baseline or candidate, seed, data)
    sets: list[dict[str | int, TrainingSet]] = []  # per context, by baseline or candidate
    for i, context in enumerate(contexts):
        made: dict[str | int, TrainingSet] = {**task.baselines(context)} if baselines else {}
        made.update(enumerate(task.training_set(context, text) for text in texts[i]))
        sets.append({method: policy.checked(data) for method, data in made.items()})
        trials += [(i, method, seed, data) for method, data in sets[-1].items() if data.problem is None for seed in range(seeds)]
    probes = [tuple(task.probes(c)) for c in contexts]
    again = () if memory is None else tuple(p for c in memory.contexts for p in task.probes(c))  # asked after every edit
    shards = 1 if held is None else mesh_lib.shards(policy.mesh)  # each has the held adapter
    with clock("adapt"):
        asked = [Edit((*key, contexts[i].id, m, s), data, probes[i] + again, held=n % shards) for n, (i, m, s, data) in enumerate(trials)]
        adapted = policy.adapt(asked, what, held, None if memory is None else memory.texts)
    with clock("bare"):
        places = None if held is None else [i % shards for i in range(len(probes))]
        bare = policy.answer(probes, held, places, f"answering without adaptation{what}")
    own = [(contexts[i], a.outputs[: len(probes[i])]) for (i, *_), a in zip(trials, adapted, strict=True)]
    plain = [(context, tuple(outputs)) for context, outputs in zip(contexts, bare, strict=True)]
    beyond = [a.outputs[len(probes[i]) :] for (i, *_), a in zip(trials, adapted, strict=True)]
    answered = [*own, *plain, *(() if memory is None else _of_memory(task, memory, beyond))]
    wait = task.begin(answered) if isinstance(task, Apart) else None

    def told() -> dict[str, Any]:
        with clock("grade"):
            scores = iter(task.score(answered) if wait is None else wait())
        results = {}
        for (i, m, s, _), a, (_, outputs) in zip(trials, adapted, own, strict=True):
            results[i, m, s] = trial(s, outputs, a.losses, next(scores))
        if diverged := sum(len(a.losses) > 0 and not np.isfinite(a.losses[-1]) for a in adapted):
            log.warning(
                "%d of %d fits diverged%s: their losses are not finite; a lower fit.learning_rate may help", diverged, len(adapted), what
            )
        bare = [trial(0, outputs, np.zeros(0), next(scores)) for _, outputs in plain]
        for (i, m, s, _), a in zip(trials, adapted, strict=True) if memory is not None else ():
            kept = Score.of([v for _ in memory.contexts for v in next(scores).verdicts])
            results[i, m, s]["retention"] = {"accuracy": kept.reward, "verdicts": list(kept.verdicts), "bits": a.bits}
        records = []
        for i, context in enumerate(contexts):
            measured = {m: [results[i, m, s] for s in range(seeds) if (i, m, s) in results] for m in sets[i]}
            methods = {NONE: [bare[i]], **{m: found for m, found in measured.items() if isinstance(m, str)}}
            edited = [edit_record(k, text, sets[i][k], measured[k]) for k, text in enumerate(texts[i])]
            for edit in edited if memory is not None else ():
                cost = retention.cost(policy.config.rest_em.retention, memory, edit["trials"])
                # An unusable edit harms nothing; it must not be better for that than one that does some good.
                edit["score"] = None if edit["reward"] is None or edit["problem"] or cost is None else edit["reward"] - cost
            unmade = {m: data.problem for m, data in sets[i].items() if isinstance(m, str) and data.problem}
            records.append(record(task, context, methods, edited) | ({"unmade": unmade} if unmade else {}))
        return {"contexts": records, "seconds": clock.seconds}

    return told() if wait is None else told


def from_recorded(task: Task, context: Context, found: Recorded) -> dict[str, Any]:
    """A context's record of what was measured elsewhere, in the form of `measure`. What was trained on is not known of it."""

    def told(trials: Sequence[Trial]) -> list[dict[str, Any]]:
        return [trial(i, t.outputs, np.zeros(0), t.score) for i, t in enumerate(trials)]

    edits = [edit_record(k, text, TrainingSet(()), told(trials)) for k, (text, trials) in enumerate(found.edits)]
    return record(task, context, {NONE: told([found.unadapted])}, edits)


def record(task: Task, context: Context, methods: dict[str, Any], edits: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": context.id,
        "title": context.title,
        "passage": task.text(context),
        "questions": [list(pair) for pair in task.describe(context)],
        "methods": methods,
        "edits": edits,
    }


def _of_memory(task: Task, memory: Memory, outputs: Sequence[tuple[str, ...]]) -> list[tuple[Context, tuple[str, ...]]]:
    """The outputs of each trial to all questions of the memory, by its contexts."""
    items = []
    for answered in outputs:
        parts = iter(answered)
        items += [(c, tuple(next(parts) for _ in task.probes(c))) for c in memory.contexts]
    return items


def trial(seed: int, outputs: Sequence[str], losses: np.ndarray, score: Score) -> dict[str, Any]:
    losses = [float(x) for x in losses]
    return {
        "seed": seed,
        "outputs": list(outputs),
        **({} if score.answers is None else {"answers": list(score.answers)}),
        "verdicts": list(score.verdicts),
        "reward": score.reward,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "steps": len(losses),
    }


def edit_record(candidate: int, text: str, data: TrainingSet, trials: list[dict[str, Any]]) -> dict[str, Any]:
    """An unusable self-edit earns 0; one that could not be graded has no reward."""
    rewards = [_exact(t) for t in trials if t["reward"] is not None]
    return {
        "candidate": candidate,
        "text": text,
        "problem": data.problem,
        "dropped": data.dropped,
        "sequences": [s.shown for s in data.sequences],
        "trials": trials,
        # Exact before it is rounded, so that edits with equal sums tie: 0.2 and 0.4 are no more than twice 0.3.
        "reward": 0.0 if data.problem else float(statistics.mean(rewards)) if rewards else None,
    }


def _exact(trial: dict[str, Any]) -> Fraction:
    """A trial's reward as the share that it is, of so many questions at most, rather than the nearest number of a computer's."""
    share = Fraction(trial["reward"]).limit_denominator(max(len(trial["verdicts"]), 1))
    return share if float(share) == trial["reward"] else Fraction(trial["reward"])


class Clock:
    """Seconds spent by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.monotonic() - start, 3)
