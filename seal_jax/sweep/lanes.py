"""Lanes: settings of the inner loop that share every shape, measured as edits of one program.

The model is loaded once, self-edits are written once, and the bare policy is asked once. Then each self-edit is fitted under all settings
at once: where a separate run would fit N adapters, this fits N for each lane, in the same slots of the same program (`seal_jax.fit`).
Random draws are those of `seal-jax evaluate`, and no edit depends on its neighbours: so a lane's answers are those of `evaluate` with its
settings, up to the rounding of sums in another order.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from seal_jax.config import RunConfig
from seal_jax.errors import SealError
from seal_jax.parallel import processes
from seal_jax.rest_em import given, loop
from seal_jax.rest_em.measure import NONE, Clock, edit_record, record, trial
from seal_jax.rest_em.policy import Edit
from seal_jax.rest_em.stage import Stage, build
from seal_jax.runs import track
from seal_jax.runs.store import RunStore
from seal_jax.sweep import space as space_lib
from seal_jax.sweep import table as table_lib
from seal_jax.sweep.config import Sweep
from seal_jax.sweep.space import Settings
from seal_jax.sweep.table import Record
from seal_jax.sweep.trial import say
from seal_jax.tasks.base import Context, TrainingSet
from seal_jax.words import counted

# What the program takes as arrays, one value an edit, or masks: everything else of the inner loop is a shape, or the same for all.
KEYS = (
    *("fit.learning_rate", "fit.schedule", "fit.warmup_steps", "fit.weight_decay", "fit.max_grad_norm", "fit.epochs", "fit.batch_size"),
    *("fit.max_steps", "fit.stop.loss", "fit.stop.gain", "fit.stop.patience", "fit.anchor", "fit.lora.rank", "fit.lora.alpha"),
)
KEY = "evaluate"  # of the random draws, as in `loop.evaluate`


@dataclasses.dataclass(frozen=True)
class Lane:
    """One setting: its name, what it sets, the config with that, and of it what differs between lanes, by name of `FitConfig`."""

    name: str
    settings: Settings
    config: RunConfig
    fit: dict[str, Any]


def lanes_of(sweep: Sweep) -> list[Lane]:
    """The lanes of a sweep. Raises `SealError` for a key that lanes cannot differ in."""
    for key in sweep.space:
        if key not in KEYS:
            raise SealError(
                f"{sweep.where}: space.{key}: lanes share one program, and differ in {', '.join(KEYS)} alone; use another search"
            )
    names = {key.split(".")[1] for key in sweep.space}
    found = []
    for settings in sweep.settings():
        config = sweep.trial(settings)
        if dataclasses.replace(config, fit=sweep.base.fit) != sweep.base:
            raise SealError(f"{sweep.where}: {space_lib.line(settings)} changes more than fit.*, by an interpolation; use another search")
        found.append(Lane(space_lib.digest(settings), settings, config, {name: getattr(config.fit, name) for name in names}))
    return found


def engine_config(base: RunConfig, lanes: Sequence[Lane]) -> RunConfig:
    """The config of the program: with the largest rank, of which a lane may leave columns out, and the largest batch."""
    rank, batch = (max(get(lane.config.fit) for lane in lanes) for get in (lambda fit: fit.lora.rank, lambda fit: fit.batch_size))
    return dataclasses.replace(
        base, fit=dataclasses.replace(base.fit, lora=dataclasses.replace(base.fit.lora, rank=rank), batch_size=batch)
    )


def run(sweep: Sweep) -> tuple[list[Record], list[str]]:
    """Measures all lanes of the sweep, a group of contexts at a time; the record of each, and notes for below the table.

    Results are kept by lane and group: a sweep that was stopped, or is given more settings, computes what is missing.
    """
    lanes = lanes_of(sweep)
    base = dataclasses.replace(sweep.base, name=sweep.config.name, run_dir=str(sweep.folder / "lanes"))
    e = base.evaluate
    with loop.open_run(base) as store:
        stage = build(engine_config(base, lanes), ("validation",))
        loop.same_data(store, stage)
        contexts = loop.take(stage.contexts["validation"], e.contexts, 0)
        found: dict[str, list[dict[str, Any]]] = {lane.name: [] for lane in lanes}
        seconds = dict.fromkeys(found, 0.0)
        for number, start in enumerate(range(0, len(contexts), e.group)):
            part = contexts[start : start + e.group]
            what = f" ({start + 1}-{start + len(part)}/{len(contexts)})"
            shared = store.once(f"shared/{number:03d}", functools.partial(_write_and_ask, stage, part, what))
            for lane, told in zip(lanes, _measured(stage, store, lanes, part, shared, number, what), strict=True):
                found[lane.name] += told["contexts"]
                seconds[lane.name] += sum(told["seconds"].values()) + sum(shared["seconds"].values()) / len(lanes)
        beside = given.figures(base, stage.task)
        records = []
        for number, lane in enumerate(lanes, 1):
            table = loop.summary(base, {loop.policy_name(0): found[lane.name]}, beside)
            made = {
                **{"trial": lane.name, "settings": lane.settings, "does": "evaluate", "status": "done", "problem": None, "rewards": []},
                **{"table": table, "result": table_lib.result(table, loop.policy_name(0)), "seconds": round(seconds[lane.name], 3)},
                "run": str(store.folder / "settings" / lane.name),
            }
            records.append(made)
            if processes.first():
                say(f"lane {number}/{len(lanes)} {lane.name} {space_lib.line(lane.settings)}: {table_lib.outcome(made)}")
    notes = [f"seconds: each lane's share of the {sum(seconds.values()):.0f} s that all took together"]
    if own := getattr(stage.task, "chosen", tuple)():
        notes.append(f"self-edits of this task choose {', '.join(own)} themselves, the same in all lanes")
    return records, notes


def _write_and_ask(stage: Stage, contexts: Sequence[Context], what: str) -> dict[str, Any]:
    """What all lanes share: the self-edits of each context, and what the bare policy answers."""
    policy, task, clock = stage.policy, stage.task, Clock()
    with clock("sample"):
        keys = [[(KEY, context.id, k) for k in range(policy.config.evaluate.edits)] for context in contexts]
        texts = given.write(policy, task, contexts, keys, f"writing self-edits{what}")
    with clock("bare"):
        outputs = policy.answer([tuple(task.probes(c)) for c in contexts], what=f"answering without adaptation{what}")
    with clock("grade"):
        scores = task.score([(c, tuple(o)) for c, o in zip(contexts, outputs, strict=True)])
    bare = [trial(0, tuple(o), np.zeros(0), s) for o, s in zip(outputs, scores, strict=True)]
    found = [{"id": c.id, "edits": t, "bare": b} for c, t, b in zip(contexts, texts, bare, strict=True)]
    return {"contexts": found, "seconds": clock.seconds}


def _measured(
    stage: Stage, store: RunStore, lanes: Sequence[Lane], contexts: Sequence[Context], shared: dict[str, Any], number: int, what: str
) -> list[dict[str, Any]]:
    """The records of one group for each lane, in the form of `measure`; those that are not there yet are computed all at once."""
    units = {lane.name: f"settings/{lane.name}/{number:03d}" for lane in lanes}
    missing = [lane for lane in lanes if not store.has(units[lane.name])]
    made: dict[str, dict[str, Any]] = {}

    def compute(lane: Lane) -> dict[str, Any]:
        if lane.name not in made:  # a damaged unit is missing as well, as is seen only when it is read
            with track.group():
                made.update(_measure(stage, missing if lane in missing else [lane], contexts, shared, what))
        return made[lane.name]

    return [store.once(units[lane.name], functools.partial(compute, lane)) for lane in lanes]


def _measure(
    stage: Stage, lanes: Sequence[Lane], contexts: Sequence[Context], shared: dict[str, Any], what: str
) -> dict[str, dict[str, Any]]:
    """Fits the training sets of `contexts` under every lane's settings at once, asks and grades: by lane what `measure` would give."""
    policy, task, clock, seeds = stage.policy, stage.task, Clock(), stage.policy.config.evaluate.seeds
    sets: list[dict[str | int, TrainingSet]] = []
    for context, told in zip(contexts, shared["contexts"], strict=True):
        made = {**task.baselines(context), **dict(enumerate(task.training_set(context, text) for text in told["edits"]))}
        sets.append({method: policy.checked(data) for method, data in made.items()})
    trials = [
        (lane, i, method, seed)
        for lane in lanes
        for i in range(len(contexts))
        for method, data in sets[i].items()
        if data.problem is None
        for seed in range(seeds)
    ]
    probes = [tuple(task.probes(c)) for c in contexts]
    with clock("adapt"):
        edits = [
            # What a self-edit chose by itself goes before what its lane says.
            Edit((KEY, contexts[i].id, m, s), dataclasses.replace(sets[i][m], fit={**lane.fit, **sets[i][m].fit}), probes[i])
            for lane, i, m, s in trials
        ]
        adapted = policy.adapt(edits, f" in {counted(len(lanes), 'lane')}{what}")
    with clock("grade"):
        scores = task.score([(contexts[i], a.outputs) for (_, i, _, _), a in zip(trials, adapted, strict=True)])
    results = {(lane.name, i, m, s): trial(s, a.outputs, a.losses, score)
               for (lane, i, m, s), a, score in zip(trials, adapted, scores, strict=True)}  # fmt: skip
    share = {name: round(spent / len(lanes), 3) for name, spent in clock.seconds.items()}
    found = {}
    for lane in lanes:
        records = []
        for i, (context, told) in enumerate(zip(contexts, shared["contexts"], strict=True)):
            measured = {m: [results[lane.name, i, m, s] for s in range(seeds) if (lane.name, i, m, s) in results] for m in sets[i]}
            methods = {NONE: [told["bare"]], **{m: trials for m, trials in measured.items() if isinstance(m, str)}}
            edited = [edit_record(k, text, sets[i][k], measured[k]) for k, text in enumerate(told["edits"])]
            unmade = {m: data.problem for m, data in sets[i].items() if isinstance(m, str) and data.problem}
            records.append(record(task, context, methods, edited) | ({"unmade": unmade} if unmade else {}))
        found[lane.name] = {"contexts": records, "seconds": share}
    return found
