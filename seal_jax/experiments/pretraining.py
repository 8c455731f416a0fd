"""Continued pretraining: one model is trained on the self-edits of many passages at once, and asked about all of them.

For each number of passages there is a model for the self-edits, and one for each of the task's baselines (the passages alone), all from the
same weights; what self-edits choose for their own inner loop (`TrainingSet.fit`) has no say here. Results are kept by passage.
Source: the paper's section 4.1, "Continued pretraining", and `CPT.py`, which trains an adapter; a later version of the paper trains all
weights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from seal_jax import preemption, tasks
from seal_jax.config import RunConfig
from seal_jax.errors import SealError
from seal_jax.models import hf
from seal_jax.parallel import mesh as mesh_lib
from seal_jax.parallel import processes
from seal_jax.rest_em import given, loop
from seal_jax.rest_em import table as table_lib
from seal_jax.rest_em.measure import NONE, Clock, record, trial
from seal_jax.rest_em.policy import Policy
from seal_jax.rest_em.stage import Stage
from seal_jax.runs import files
from seal_jax.runs.places import Place
from seal_jax.runs.store import RunStore
from seal_jax.sft.engine import Saved
from seal_jax.tasks.base import Context, Task, TrainingSet, TrainSequence
from seal_jax.words import counted

EDITS = "passages + self-edits"


def run(config: RunConfig, trained: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """The experiment with the configured model, or with the policy of the run `trained` after its last finished round; returns its table.

    Continues a run folder of the same configuration; a model in training goes on from its last checkpoint.
    """
    c = config.pretraining
    with loop.open_run(config) as store:
        loop.claim(store, "pretrain")
        stage, _ = loop.stage_of(config, store, ("validation",), trained, "start from", "pretraining.edits")
        most, contexts = max(c.sizes), stage.contexts["validation"]
        if len(contexts) < most:
            raise SealError(f"pretraining.sizes={c.sizes}: task.validation has {counted(len(contexts), 'usable context')}")
        beside = given.figures(config, stage.task)
        loop.same_data(store, stage)
        texts = _write(stage, store, contexts[:most])
        bare = store.once("pretraining/start", lambda: _bare(stage, contexts[:most]))["answers"]
        base = stage.policy.params  # which training leaves as they are
        sizes = {}
        for size in sorted(set(c.sizes)):
            unit = f"evaluate/{size:04d}_passages/000"
            sizes[size] = store.once(unit, lambda size=size: _measure(stage, store, contexts[:size], texts, bare, base))["contexts"]
            for folder in (store.folder / "states").glob(f"{size:04d}_*") if processes.first() else ():
                files.remove_tree(folder)
            store.report()
        return store.once("table", lambda: summary(config, sizes, beside))


def _write(stage: Stage, store: RunStore, contexts: Sequence[Context]) -> dict[str, list[str]]:
    """The self-edits of each passage, by its id, written by the policy as it is before."""
    c, found = stage.policy.config.pretraining, {}
    for number, start in enumerate(range(0, len(contexts), c.group)):
        part = contexts[start : start + c.group]
        what = f"writing self-edits (passages {start + 1}-{start + len(part)}/{len(contexts)})"

        def write(part: Sequence[Context] = part, what: str = what) -> dict[str, Any]:
            keys = [[("pretraining", context.id, k) for k in range(c.edits)] for context in part]
            written = given.write(stage.policy, stage.task, part, keys, what)
            return {"edits": {context.id: texts for context, texts in zip(part, written, strict=True)}}

        found.update(store.once(f"pretraining/edits/{number:03d}", write)["edits"])
    return found


def _bare(stage: Stage, contexts: Sequence[Context]) -> dict[str, Any]:
    """What the policy as it is before answers about each passage."""
    answers = _ask(stage.policy, stage.task, contexts, np.zeros(0), "answering without adaptation")
    return {"answers": {context.id: told for context, told in zip(contexts, answers, strict=True)}}


def _measure(
    stage: Stage,
    store: RunStore,
    contexts: Sequence[Context],
    texts: Mapping[str, list[str]],
    bare: Mapping[str, dict[str, Any]],
    base: Any,
) -> dict[str, Any]:
    """The records of all passages, in the form of `rest_em.measure`: what the model as it is answers (`bare`), and each trained on all.

    `base`: the weights that training starts from.
    """
    policy, task, clock = stage.policy, stage.task, Clock()
    sets = {context.id: [policy.checked(task.training_set(context, text)) for text in texts[context.id]] for context in contexts}
    models: dict[str, list[TrainSequence]] = {}
    for context in contexts:
        for name, data in task.baselines(context).items():
            models.setdefault(name, []).extend(data.sequences)
        models.setdefault(EDITS, []).extend(s for data in sets[context.id] if data.problem is None for s in data.sequences)
    answers, losses = {NONE: [bare[context.id] for context in contexts]}, {}
    for name, sequences in models.items():
        label = f"{name}, {counted(len(contexts), 'passage')}"
        with clock("pretraining"):  # without a usable self-edit the model stays as it is
            losses[name] = _train(stage, store, f"{len(contexts):04d}_{_slug(name)}", sequences, label) if sequences else np.zeros(0)
        if not np.isfinite(losses[name]).all():
            raise SealError(
                f"training on {label}: diverged: its losses are not finite; lower pretraining.sft.learning_rate, in another run_dir"
            )
        with clock("adapt"):
            answers[name] = _ask(policy, task, contexts, losses[name], f"answering ({label})")
        if policy.config.pretraining.save:
            _save(policy, store.folder / "models" / _slug(f"{name}, {len(contexts)} passages"))
        policy.params = base
    records = []
    for i, context in enumerate(contexts):
        methods = {name: [told[i]] for name, told in answers.items() if name != EDITS}
        records.append(record(task, context, methods, [_edited(texts[context.id], sets[context.id], answers[EDITS][i])]))
    told = {name: [float(x) for x in found] for name, found in losses.items()}
    return {"contexts": records, "losses": told, "sequences": {n: len(s) for n, s in models.items()}, "seconds": clock.seconds}


def _ask(policy: Policy, task: Task, contexts: Sequence[Context], losses: np.ndarray, what: str) -> list[dict[str, Any]]:
    outputs = policy.answer([task.probes(c) for c in contexts], what=what)
    scores = task.score([(c, tuple(o)) for c, o in zip(contexts, outputs, strict=True)])
    return [trial(0, o, losses, s) for o, s in zip(outputs, scores, strict=True)]


def _edited(texts: Sequence[str], sets: Sequence[TrainingSet], answered: dict[str, Any]) -> dict[str, Any]:
    """A passage's self-edits as one entry of its record: all of them are in the one model."""
    problems = [data.problem for data in sets if data.problem]
    return {
        "candidate": 0,
        "text": "\n\n".join(texts),
        "problem": problems[0] if len(problems) == len(sets) else None,
        "dropped": sum(data.dropped for data in sets),
        "sequences": [s.shown for data in sets for s in data.sequences],
        "trials": [answered],
        "reward": answered["reward"],
    }


def _train(stage: Stage, store: RunStore, name: str, sequences: Sequence[TrainSequence], label: str) -> np.ndarray:
    """Trains the policy, from its last checkpoint if there is one, and returns its losses."""
    c, folder = stage.policy.config.pretraining, f"states/{name}"

    def save(state: Saved) -> None:
        store.save(folder, state, {"steps": len(state["losses"])})
        preemption.stop_if_due()

    state = store.load(folder)[0] if store.saved(folder) else None
    options = {"resume": state, "save": save, "checkpoint_every": c.checkpoint_every, "save_now": preemption.due}
    with preemption.at_steps():
        return stage.policy.pretrain(sequences, ("pretraining", name), c.sft, f"training on {label}", **options)


def summary(config: RunConfig, sizes: Mapping[int, Sequence[dict[str, Any]]], beside: Sequence[Any]) -> dict[str, Any]:
    """The table: for each number of passages the rows of its models, gains over the model as it is on the same passages."""
    names = {table_lib.EDIT: EDITS, "passage only": "passages only", **tasks.view(config.task.name).names}
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    last = list(sizes)[-1]
    for size, records in sizes.items():
        options = {"seeds": 1, "edits": 1, "resamples": config.evaluate.resamples, "seed": config.seed, "names": names}
        made = table_lib.table({f"{size} at once" if size > 1 else "1": records}, **options, beside=beside if size == last else ())
        rows += [row | ({"statistic": "single"} if row["method"] == EDITS else {}) for row in made["rows"]]
        notes += [note for note in made["notes"] if note not in notes]
    return {"rows": rows, "notes": notes}


def _save(policy: Policy, folder: Place) -> None:
    """Writes the policy as it is now as a transformers folder: the first process does, of weights fetched from all."""
    params = mesh_lib.fetch(policy.params)
    if processes.first():
        files.remove_tree(folder)
        with files.staged(folder) as here:
            hf.save_folder(here, policy.decoder.spec, params, policy.tokenizer)


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in text.replace("+", "and").replace(",", ""))
