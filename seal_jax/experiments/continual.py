"""Continual self-edits: passage after passage is adapted into the weights, and after each all passages so far are asked again.

A *lane* is one sequence of passages under one method against forgetting. All lanes run at once: the base weights are shared, and each lane
holds what it has learnt as an adapter whose ranks are the concatenated ones of its edits, which equals merging these one after the other.
That adapter has the ranks of the whole sequence from the start, those of edits to come at zero, so that no step compiles anew.
Source: the paper's section 4 and `continual_self_edits.py`, which merges after each step and has one sequence at a time.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from seal_jax.config import RunConfig
from seal_jax.errors import SealError
from seal_jax.experiments import continual_table
from seal_jax.experiments.gate import Gate
from seal_jax.experiments.lane import Lane
from seal_jax.fit.likelihood import Texts
from seal_jax.rest_em import general, given, loop
from seal_jax.rest_em.held import Held
from seal_jax.rest_em.measure import Clock
from seal_jax.rest_em.policy import Edit, Key
from seal_jax.rest_em.stage import Stage
from seal_jax.runs import matrix, track
from seal_jax.runs.store import RunStore
from seal_jax.tasks.base import Context, TrainingSet
from seal_jax.words import counted


@dataclasses.dataclass(frozen=True)
class Setting:
    """What stays the same through the run."""

    stage: Stage
    store: RunStore
    texts: Texts  # held: about no passage


def run(config: RunConfig, trained: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """The experiment with the configured model, or with the policy of the run `trained` after its last finished round; returns its table.

    Continues a run folder of the same configuration.
    """
    with loop.open_run(config) as store:
        loop.claim(store, "continual")
        passages = general.texts(config.continual.texts)
        beside = [matrix.read_original(path) for path in config.continual.beside]  # what is wrong with them shows at once
        stage, _ = loop.stage_of(config, store, ("validation",), trained, "start from", "")
        loop.same_data(store, stage, **{"continual.texts": passages})
        setting = Setting(stage, store, stage.policy.texts(passages))
        sequences = draw_sequences(config, stage.contexts["validation"])
        start = store.once("continual/start", lambda: _start(setting, sequences))
        lanes = [
            Lane(name, method, s, contexts, start["bits"])
            for name, method in config.continual.methods.items()
            for s, contexts in enumerate(sequences)
        ]
        held = Held(stage.policy, len(lanes), config.continual.passages)
        steps = []
        for number in range(config.continual.passages):
            steps.append(_step(setting, lanes, held, number))
            store.report()
        made = lambda: continual_table.table(start, steps, resamples=config.evaluate.resamples, seed=config.seed, beside=beside)  # noqa: E731
        return store.once("table", made)


def draw_sequences(config: RunConfig, contexts: Sequence[Context]) -> list[list[Context]]:
    """The passages of each sequence, drawn as the original draws them."""
    c = config.continual
    if len(contexts) < c.passages:
        raise SealError(f"continual.passages={c.passages}: task.validation has {counted(len(contexts), 'usable context')}")
    return [[contexts[i] for i in part] for part in matrix.sequences(c.sequences, c.passages, len(contexts), config.seed)]


def _start(setting: Setting, sequences: Sequence[Sequence[Context]]) -> dict[str, Any]:
    """What the bare policy answers to all that will be asked."""
    policy, task, clock = setting.stage.policy, setting.stage.task, Clock()
    contexts = list({c.id: c for part in sequences for c in part}.values())
    with clock("bare"):
        outputs = policy.answer([task.probes(c) for c in contexts], what="answering without adaptation")
        bits = float(policy.bits(setting.texts)[0])
    with clock("grade"):
        answers = _trials(setting, [(c, tuple(o)) for c, o in zip(contexts, outputs, strict=True)])
    told = [
        {"id": c.id, "title": c.title, "passage": task.text(c), "questions": [list(pair) for pair in task.describe(c)]} for c in contexts
    ]
    answered = {c.id: trial for c, trial in zip(contexts, answers, strict=True)}
    ids = [[c.id for c in part] for part in sequences]
    return {"contexts": told, "sequences": ids, "answers": answered, "bits": bits, "seconds": clock.seconds}


def _trials(setting: Setting, items: Sequence[tuple[Context, tuple[str, ...]]]) -> list[dict[str, Any]]:
    scores = setting.stage.task.score(items)
    return [{"outputs": list(o), "verdicts": list(s.verdicts), "reward": s.reward} for (_, o), s in zip(items, scores, strict=True)]


def _step(setting: Setting, lanes: Sequence[Lane], held: Held, number: int) -> dict[str, Any]:
    """Passage `number` of every lane: written about, learnt, perhaps held back by a gate, and all passages so far asked again."""
    store, folder = setting.store, f"adapters/{number:03d}"

    def learnt() -> dict[str, Any]:
        with track.group():
            record = _learn(setting, lanes, held, number)
        store.save(folder, held.saved(number, len(lanes)), {"step": number})
        return record

    record = store.once(f"continual/steps/{number:03d}", learnt, beside=folder)
    held.load(store.load(folder)[0], number)  # also where it was just made, so that going on equals not stopping
    for lane, told in zip(lanes, record["lanes"], strict=True):
        data = setting.stage.task.training_set(lane.contexts[number], told["edit"])
        lane.learnt.append(data.sequences if told["scale"] else ())
        lane.answers, lane.bits = told["answers"], told["bits"]
    return record


def _write(setting: Setting, lanes: Sequence[Lane], held: Held, contexts: Sequence[Context], keys: Sequence[Key], what: str) -> list[str]:
    """A self-edit for each lane's context: by the lane as it has become, or one for all lanes of a sequence by the policy before."""
    policy, task = setting.stage.policy, setting.stage.task
    if policy.config.continual.writer == "adapted":
        written = given.write(policy, task, contexts, [[key] for key in keys], what, held.placed(), list(range(len(lanes))))
        return [text for [text] in written]
    first = {lane.sequence: i for i, lane in reversed(list(enumerate(lanes)))}
    asked = [contexts[i] for i in first.values()], [[keys[i]] for i in first.values()]
    by_sequence = dict(zip(first, given.write(policy, task, *asked, what), strict=True))
    return [by_sequence[lane.sequence][0] for lane in lanes]


def _learn(setting: Setting, lanes: Sequence[Lane], held: Held, number: int) -> dict[str, Any]:
    policy, task, config = setting.stage.policy, setting.stage.task, setting.stage.policy.config
    here = [lane.contexts[number] for lane in lanes]
    keys = [("continual", lane.sequence, number, c.id) for lane, c in zip(lanes, here, strict=True)]
    what, clock = f" (passage {number + 1}/{len(lanes[0].contexts)})", Clock()
    with clock("sample"):
        texts = _write(setting, lanes, held, here, keys, f"writing self-edits{what}")
    sets, replays = [], []
    for lane, context, text in zip(lanes, here, texts, strict=True):
        data, again = policy.checked(task.training_set(context, text)), lane.replayed(config.seed)
        own = {key: value for key in ("anchor", "orthogonal") if (value := getattr(lane.method, key)) > 0}
        sets.append(TrainingSet((*data.sequences, *again), {**own, **data.fit}, data.problem, data.dropped))
        replays.append(len(again))
    usable = [i for i, data in enumerate(sets) if data.problem is None]
    with clock("adapt"):
        fitted = policy.fit([Edit(keys[i], sets[i], held=i) for i in usable], what, held.placed())
        new = held.fresh(fitted, usable)
    with clock("gate"):
        gate = Gate(setting.stage, setting.texts, lanes, held, number)
        scales, reasons = gate.decide(new, set(usable))
    held.keep(number, new, scales)
    with clock("adapt"):
        asked = [(place, context) for place, lane in enumerate(lanes) for context in lane.contexts[: number + 1]]
        outputs = policy.answer([task.probes(c) for _, c in asked], held.placed(), [place for place, _ in asked], f"answering{what}")
        bits = policy.bits(setting.texts, held.placed())
    with clock("grade"):
        trials = iter(_trials(setting, [(c, tuple(o)) for (_, c), o in zip(asked, outputs, strict=True)]))
    losses = dict(zip(usable, fitted.losses, strict=True))
    told = []
    for i, lane in enumerate(lanes):
        own = losses.get(i, ())
        told.append(
            {
                "method": lane.name,
                "sequence": lane.sequence,
                "context": here[i].id,
                "edit": texts[i],
                "problem": sets[i].problem,
                "sequences": [s.shown for s in sets[i].sequences],
                "loss_first": float(own[0]) if len(own) else None,
                "loss_last": float(own[-1]) if len(own) else None,
                "steps": len(own),
                "replayed": replays[i],
                "scale": scales[i],
                "gate": reasons[i],
                "bits": float(bits[i]),
                "answers": {c.id: next(trials) for c in lane.contexts[: number + 1]},
            }
        )
        if reasons[i] is not None:
            setting.store.log("gated", method=lane.name, sequence=lane.sequence, context=here[i].id, scale=scales[i], reason=reasons[i])
    return {"step": number, "lanes": told, "seconds": clock.seconds}
