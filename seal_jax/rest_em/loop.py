"""ReST-EM, from a configuration to a table: E-step, selection, M-step, for R rounds, with the evaluation before and after.

Every unit of work goes through `RunStore.once`, under a name that says what it is; so a run that was killed goes on where it stopped, and
ends with the same files. Source: the paper's Algorithm 1 and section 3.1.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from seal_jax import preemption, tasks
from seal_jax.config import RunConfig
from seal_jax.errors import SealError
from seal_jax.rest_em import general, given, retention
from seal_jax.rest_em import table as table_lib
from seal_jax.rest_em.measure import NONE, from_recorded, measure
from seal_jax.rest_em.select import Candidate, select
from seal_jax.rest_em.stage import Stage, build, digest, restore
from seal_jax.runs import checkpoint, health, track
from seal_jax.runs.store import Result, RunStore, existing
from seal_jax.tasks.base import Context, Figure
from seal_jax.words import counted

if TYPE_CHECKING:
    from seal_jax.fleet.store import WorkerStore

log = logging.getLogger(__name__)

ORIGIN = "origin"  # the unit that says whose policy an evaluation's folder is about


@contextlib.contextmanager
def open_run(config: RunConfig) -> Iterator[RunStore]:
    """The run's folder, made or opened to go on; its log tells how the run fares and ends."""
    with RunStore.create_or_open(config.run_dir, config) as store, preemption.logged(store.log), track.tracked(store, config):
        yield store


def _by_this_process(config: RunConfig) -> contextlib.AbstractContextManager[RunStore]:
    if config.executor.name != "local":
        raise SealError(f"executor.name={config.executor.name}: this function computes by itself; call the one in seal_jax.fleet.run")
    return open_run(config)


def rounds_done(store: RunStore) -> int:
    """The rounds whose M-step is finished, counted from the first."""
    number = 0
    while store.has(f"rounds/{number + 1}/m_step"):
        number += 1
    return number


def take(contexts: Sequence[Context], count: int, offset: int) -> list[Context]:
    """`count` contexts from `offset` on, from the start again at the end; never one twice."""
    return [contexts[(offset + i) % len(contexts)] for i in range(min(count, len(contexts)))]


def run_groups(stage: Stage, store: RunStore, unit: str, contexts: Sequence[Context], group: int, **options: Any) -> list[dict[str, Any]]:
    """`measure` for all contexts, a group at a time, each a unit of the store. Returns the contexts' records."""
    parts = {f"{unit}/{number:03d}": start for number, start in enumerate(range(0, len(contexts), group))}

    def compute(name: str) -> Result:
        part = contexts[(start := parts[name]) : start + group]
        what = f" ({unit.replace('/', ' ').replace('_', '-')} {start + 1}-{start + len(part)}/{len(contexts)})"
        with track.group():
            return measure(stage.policy, stage.task, part, what=what, **options)

    return [record for told in store.each(list(parts), compute) for record in told["contexts"]]


def same_data(store: RunStore | WorkerStore, stage: Stage, **texts: Sequence[str]) -> None:
    """Raises `SealError` if the store holds results of other contexts than the stage's, or of other held `texts`, by their config keys."""
    store.same_data(stage.read | {key: [[str(i), digest(text)] for i, text in enumerate(found)] for key, found in texts.items()})


def evaluate(stage: Stage, store: RunStore, when: str, baselines: bool = True) -> list[dict[str, Any]]:
    """The validation contexts under every method of the table. `when` names the unit: "before", "after"."""
    e = stage.policy.config.evaluate
    contexts = take(stage.contexts["validation"], e.contexts, 0)
    # The key does not name the policy: before and after draw with the same random numbers, so that they differ by the weights alone.
    return run_groups(
        stage, store, f"evaluate/{when}", contexts, e.group, key=("evaluate",), edits=e.edits, seeds=e.seeds, baselines=baselines
    )  # fmt: skip


def e_step(stage: Stage, store: RunStore, number: int, texts: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Round `number` (from 1): K self-edits a context, each measured over S seeds; the first may be read from `rest_em.rewards`.

    `texts`: those that rewards are to count as well, see `rest_em.retention`.
    """
    r = stage.policy.config.rest_em
    everyone = stage.contexts["train"]
    contexts = take(everyone, r.contexts, (number - 1) * r.contexts)
    if number == 1 and r.rewards is not None:
        return store.once(f"rounds/{number}/e_step/000", lambda: read_rewards(stage, contexts))["contexts"]
    memory = None
    if retention.wanted(r.retention):
        after = take(everyone, r.retention.contexts, number * r.contexts)
        memory = retention.remember(stage, store, number, after, stage.policy.texts(texts))
    options = {"key": ("round", number), "edits": r.edits, "seeds": r.seeds, "baselines": False, "memory": memory}
    return run_groups(stage, store, f"rounds/{number}/e_step", contexts, r.group, **options)


def read_rewards(stage: Stage, contexts: Sequence[Context]) -> dict[str, Any]:
    """What `measure` would give of `contexts`, from the file `rest_em.rewards`."""
    found = given.recorded(stage.policy.config, stage.task, contexts)
    return {"contexts": [from_recorded(stage.task, c, r) for c, r in zip(contexts, found, strict=True)], "seconds": {}}


def choose(config: RunConfig, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The (context, candidate) pairs that the rule of the config keeps."""
    kept = []
    for record in records:
        by = "reward" if config.rest_em.select == "right" else "score"  # a score is there where rewards count what an edit harms
        # What cannot be used counts 0 as a reward and is never kept, not even where all have 0: it would teach what is no self-edit.
        rewards = [None if e.get("problem") else e.get(by, e["reward"]) for e in record["edits"]]
        candidates = [Candidate(e["candidate"], e["text"], reward) for e, reward in zip(record["edits"], rewards, strict=True)]
        unadapted = record["methods"][NONE][0]["reward"]
        for index in select(config.rest_em.select, candidates, config.rest_em.keep, unadapted):
            edit = next(e for e in record["edits"] if e["candidate"] == index)
            scored = {"score": edit["score"]} if "score" in edit else {}
            kept.append({"context": record["id"], "candidate": index, "reward": edit["reward"], **scored, "unadapted": unadapted})
    return {"kept": kept, "contexts": len(records)}


def m_step(stage: Stage, store: RunStore, number: int, records: Sequence[dict[str, Any]]) -> None:
    """Round `number`: trains the policy on the kept self-edits and merges; from the round's checkpoint where there is one."""
    policy, task, unit = stage.policy, stage.task, f"rounds/{number}/m_step"
    kept = store.once(f"rounds/{number}/selection", lambda: choose(policy.config, records))["kept"]

    def tune() -> dict[str, Any]:
        contexts, start = {c.id: c for c in stage.contexts["train"]}, time.monotonic()
        texts = {(r["id"], e["candidate"]): e["text"] for r in records for e in r["edits"]}
        pairs = [(task.edit_prompt(contexts[k["context"]]), texts[k["context"], k["candidate"]].strip()) for k in kept]
        tuned, m = policy.tune(pairs, ("round", number, "m_step")), policy.config.m_step.lora
        if not all(np.isfinite(leaf).all() for leaf in [tuned.losses, *jax.tree.leaves(tuned.weights)]):
            raise SealError(f"{unit}: diverged: its losses or weights are not finite; lower m_step.learning_rate, in another run_dir")
        seconds = round(time.monotonic() - start, 3)
        store.save(f"policy/{number}", tuned.weights, {"round": number, "rank": m.rank, "alpha": m.alpha})
        losses = tuned.losses.tolist()
        return {"pairs": len(pairs), "steps": len(losses), "losses": losses, "seconds": seconds}

    if kept:
        store.once(unit, tune, beside=f"policy/{number}")
    else:
        store.once(unit, lambda: {"pairs": 0, "steps": 0, "losses": []})
    # Read back also where it was just made, so that going on equals not stopping.
    restore(policy, store, number)


def curves(records: Sequence[dict[str, Any]], losses: Sequence[float | None]) -> dict[str, float | None]:
    """What is drawn of a round: means over its contexts, and the M-step's first and last loss."""
    rewards = [found for r in records if (found := [e["reward"] for e in r["edits"] if e["reward"] is not None])]
    bare = [reward for r in records if (reward := r["methods"][NONE][0]["reward"]) is not None]
    found = {"reward/mean": [statistics.mean(x) for x in rewards], "reward/best": [max(x) for x in rewards], "reward/unadapted": bare}
    ends = {"loss/first": losses[0], "loss/last": losses[-1]} if losses else {}
    return {**{name: statistics.mean(values) if values else None for name, values in found.items()}, **ends}


def policy_name(rounds: int) -> str:
    """What the table calls the policy after `rounds` rounds."""
    return f"after {rounds} round{'s' if rounds > 1 else ''}" if rounds else "base"


def summary(config: RunConfig, evaluations: dict[str, Sequence[dict[str, Any]]], beside: Sequence[Figure] = ()) -> dict[str, Any]:
    """The table of the evaluations, by policy name, with the rows `beside` below."""
    e = config.evaluate
    options = {"names": tasks.view(config.task.name).names, "beside": beside}
    return table_lib.table(evaluations, seeds=e.seeds, edits=e.edits, resamples=e.resamples, seed=config.seed, **options)


def train(
    config: RunConfig,
    store: RunStore | WorkerStore | None = None,
    after_round: Callable[[int, Sequence[dict[str, Any]]], None] | None = None,
) -> dict[str, Any]:
    """The whole run, in this process; returns its table. Continues a run folder of the same configuration.

    `store`: where results are read and kept, for one of several workers; None: in the config's run folder, which is opened here.
    `after_round` is called after each round's M-step, of a run that goes on too, with the round's number and its E-step's records.
    """
    with store or _by_this_process(config) as store:
        refuse_evaluation(store, "train")
        claim(store, "train")
        texts = general.texts(config.rest_em.retention.texts) if retention.wanted(config.rest_em.retention) else []
        # A finished run can be read where its grader is not; `evaluate` alone may have left a table that has less.
        done = store.has(f"rounds/{config.rest_em.rounds}/m_step") and _of_all_rounds(config, store)
        stage = build(config, ("train", "validation"), grades=not done)
        retention.check(config, len(stage.contexts["train"]))  # before anything is measured
        same_data(store, stage, **({"rest_em.retention.texts": texts} if texts else {}))
        evaluations = {}
        if config.evaluate.during_training:
            evaluations[policy_name(0)] = evaluate(stage, store, "before")
        for number in range(1, config.rest_em.rounds + 1):
            records, told = e_step(stage, store, number, texts), store.has(f"rounds/{number}/m_step")
            m_step(stage, store, number, records)
            if not told:
                health.tell("round", round=number, **curves(records, store.read(f"rounds/{number}/m_step")["losses"]))
            store.report()
            if after_round is not None:
                after_round(number, records)
        if config.evaluate.during_training and config.rest_em.rounds:
            evaluations[policy_name(config.rest_em.rounds)] = evaluate(stage, store, "after", baselines=False)
        if not evaluations:
            return {"rows": [], "notes": []}
        start = time.monotonic()
        table = summary(config, evaluations, given.figures(config, stage.task))
        return store.keep("table", table, time.monotonic() - start)  # over what `evaluate` may have left there, which has less


def _of_all_rounds(config: RunConfig, store: RunStore | WorkerStore) -> bool:
    """Whether the store has the table of a run to its end."""
    last = policy_name(config.rest_em.rounds)
    return store.has("table") and any(row["policy"] == last for row in store.read("table")["rows"])


def refuse_evaluation(store: RunStore, what: str) -> None:
    """Raises `SealError` if the folder holds no policy of its own but the evaluation of another run's."""
    if store.has(ORIGIN):
        raise SealError(f"{store.folder}: holds an evaluation of {store.read(ORIGIN)['run']}; {what} that run")


# What commands leave in a run folder; the first that is found tells. The last two belong together.
KINDS = {"continual": "continual/", "pretrain": "pretraining/", "train": "rounds/", "evaluate": "evaluate/"}


def claim(store: RunStore, command: str) -> None:
    """Raises `SealError` if the folder holds what another command made, which this one would mix with its own."""
    found = next((other for other, prefix in KINDS.items() if store.names(prefix)), command)
    if found != command and {found, command} != {"train", "evaluate"}:
        raise SealError(f"{store.folder}: holds what `seal-jax {found}` made; choose another run_dir for {command}")


def stage_of(
    config: RunConfig, store: RunStore, splits: Sequence[str], trained: str | os.PathLike[str] | None, what: str, edits: str | None = None
) -> tuple[Stage, int]:
    """The stage of what is measured in `store`, and after how many rounds its policy is: the configured model as it is, or the policy of
    the run `trained` after its last finished round, which `store` then keeps to. `what`: what is done to it, for messages. `edits`: see
    `build`."""
    if trained is None:
        refuse_evaluation(store, what)
        return build(config, splits, edits=edits, grades=not store.has("table")), 0
    if store.names() and not store.has(ORIGIN):
        raise SealError(f"{store.folder}: holds a run of its own, nothing of {trained}; choose another run_dir")
    source = existing(trained)
    refuse_evaluation(source, what)
    now = {"run": str(source.folder.resolve()), "rounds": rounds_done(source), "policy": fingerprint(source)}
    if store.has(ORIGIN) and (origin := store.read(ORIGIN))["policy"] != now["policy"]:
        raise SealError(
            f"{store.folder}: holds the evaluation of {origin['run']} after {counted(origin['rounds'], 'round')}, "
            f"{trained} is after {now['rounds']}, or another; choose another run_dir"
        )
    stage = build(config, splits, source, now["rounds"], edits, not store.has("table"))
    store.once(ORIGIN, lambda: now)  # when nothing is wrong with the config, which is then kept to as well
    return stage, now["rounds"]


def evaluate_only(
    config: RunConfig, trained: str | os.PathLike[str] | None = None, store: RunStore | WorkerStore | None = None
) -> dict[str, Any]:
    """The evaluation table of the configured model as it is, or of the policy of the run `trained` after its last finished round.

    `store`: as in `train`.
    """
    with store or _by_this_process(config) as store:
        claim(store, "evaluate")
        stage, rounds = stage_of(config, store, ("validation",), trained, "evaluate")
        same_data(store, stage)
        # `train` leaves the latter in its own folder, with a table that has these rows too.
        records, beside = evaluate(stage, store, "after" if rounds else "before"), given.figures(config, stage.task)
        return store.once("table", lambda: summary(config, {policy_name(rounds): records}, beside))


def fingerprint(store: RunStore) -> str:
    """A digest of the adapters of all finished rounds: what the policy is, besides its model."""
    digest = hashlib.sha256()
    for number in range(1, rounds_done(store) + 1):
        manifest = store.folder / "policy" / str(number) / checkpoint.MANIFEST
        digest.update(manifest.read_bytes() if manifest.is_file() else b"none")
    return digest.hexdigest()


def generate(config: RunConfig, split: str, limit: int, trained: str | os.PathLike[str] | None = None) -> Iterator[dict[str, Any]]:
    """Self-edits for the first `limit` contexts of `split`, with what they would train on.

    They are written by the configured model, or by the policy of the run `trained` after its last finished round.
    """
    source = None if trained is None else existing(trained)
    if source is not None:
        refuse_evaluation(source, "generate from")
    stage = build(config, (split,), source, rounds_done(source) if source is not None else 0, "rest_em.edits", False)
    policy, task = stage.policy, stage.task
    for context in stage.contexts[split][:limit]:
        keys = [("generate", context.id, k) for k in range(config.rest_em.edits)]
        for candidate, text in enumerate(given.write(policy, task, [context], [keys], "writing self-edits")[0]):
            data = task.training_set(context, text)
            sequences = [s.shown for s in data.sequences]
            yield {"context": context.id, "candidate": candidate, "text": text, "problem": data.problem, "sequences": sequences}
