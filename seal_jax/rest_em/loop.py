"""ReST-EM, from a configuration to a table: E-step, selection, M-step, for R rounds, with the evaluation before and after.

Every unit of work goes through `RunStore.once`, under a name that says what it is; so a run that was killed goes on where it stopped, and
ends with the same files. Source: the paper's Algorithm 1 and section 3.1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from seal_jax import tasks
from seal_jax.config import RunConfig
from seal_jax.errors import SealError
from seal_jax.grade import base as grade
from seal_jax.models import load
from seal_jax.rest_em import table as table_lib
from seal_jax.rest_em.measure import NONE, measure
from seal_jax.rest_em.policy import Policy
from seal_jax.rest_em.select import Candidate, select
from seal_jax.runs import checkpoint
from seal_jax.runs.report import write_report
from seal_jax.runs.store import RunStore
from seal_jax.tasks.base import Context, Prompt, Task


def open_run(config: RunConfig) -> RunStore:
    """The run's folder, made or opened to go on."""
    return RunStore.create_or_open(config.run_dir, config)


def grader(config: RunConfig) -> grade.Grader:
    """The grader that the config names. A judging model is loaded at its first call; it is not the policy, which changes as it learns."""
    judge: list[Policy] = []

    def generate(prompts: Sequence[Prompt]) -> list[str]:
        if not judge:
            settings = dataclasses.replace(
                config,
                model=dataclasses.replace(config.model, name=config.grade.model),
                answer=dataclasses.replace(config.answer, max_tokens=8),
            )
            judge.append(Policy(load.load_model(settings.model), settings))
        return judge[0].answer([prompts], what="judging")[0]

    return grade.build(config.grade, generate)


def build(config: RunConfig, store: RunStore | None = None, after: int = 0) -> tuple[Policy, Task]:
    """The policy, as it is after round `after` of the run in `store`, and the task that `config` asks for.

    The task comes first: what it finds wrong shows before a model is loaded.
    """
    task = tasks.build(config.task, grader(config))
    for split in ("train", "validation"):
        task.contexts(split)
    policy = Policy(load.load_model(config.model), config)
    for number in range(1, after + 1):
        assert store is not None
        restore(policy, store, number)
    return policy, task


def restore(policy: Policy, store: RunStore, number: int) -> None:
    """Merges the adapter of round `number` into the policy, if that round kept anything to learn from."""
    if store.read(f"rounds/{number}/m_step")["pairs"]:
        policy.merge(checkpoint.load_adapters(store.folder / "policy" / str(number))[0], policy.config.m_step.lora)


def rounds_done(store: RunStore) -> int:
    """The rounds whose M-step is finished, counted from the first."""
    number = 0
    while store.has(f"rounds/{number + 1}/m_step"):
        number += 1
    return number


def usable(policy: Policy, task: Task, contexts: Sequence[Context], store: RunStore) -> list[Context]:
    """The contexts whose prompt fits the model's context; the others are counted in the log."""
    fitting = [c for c in contexts if policy.prompt_fits(task.edit_prompt(c))]
    if len(fitting) < len(contexts):
        reason = f"the prompt is longer than model.max_length={policy.max_length} tokens"
        store.log("skipped", reason=reason, count=len(contexts) - len(fitting))
    return fitting


def take(contexts: Sequence[Context], count: int, offset: int, what: str) -> list[Context]:
    """`count` contexts from `offset` on, from the start again at the end; never one twice."""
    if not contexts:
        raise SealError(f"task.{what}: no usable context left; see the skipped items above, or raise model.max_length")
    return [contexts[(offset + i) % len(contexts)] for i in range(min(count, len(contexts)))]


def run_groups(
    policy: Policy, task: Task, store: RunStore, unit: str, contexts: Sequence[Context], group: int, **options: Any
) -> list[dict[str, Any]]:
    """`measure` for all contexts, a group at a time, each a unit of the store. Returns the contexts' records."""
    records = []
    for number, start in enumerate(range(0, len(contexts), group)):
        part = contexts[start : start + group]
        what = f" ({unit.replace('/', ' ').replace('_', '-')} {start + 1}-{start + len(part)}/{len(contexts)})"
        record = store.once(f"{unit}/{number:03d}", lambda part=part, what=what: measure(policy, task, part, what=what, **options))
        records += record["contexts"]
    return records


def evaluate(policy: Policy, task: Task, store: RunStore, when: str) -> list[dict[str, Any]]:
    """The validation contexts under every method of the table. `when` names the unit: "before", "after"."""
    e = policy.config.evaluate
    contexts = take(usable(policy, task, task.contexts("validation"), store), e.contexts, 0, "validation")
    # The key does not name the policy: before and after draw with the same random numbers, so that they differ by the weights alone.
    return run_groups(
        policy, task, store, f"evaluate/{when}", contexts, e.group, key=("evaluate",), edits=e.edits, seeds=e.seeds, baselines=True
    )


def e_step(policy: Policy, task: Task, store: RunStore, number: int) -> list[dict[str, Any]]:
    """Round `number` (from 1): K self-edits a context, each measured over S seeds."""
    r = policy.config.rest_em
    train = usable(policy, task, task.contexts("train"), store)
    contexts = take(train, r.contexts, (number - 1) * r.contexts, "train")
    return run_groups(
        policy, task, store, f"rounds/{number}/e_step", contexts, r.group,
        key=("round", number), edits=r.edits, seeds=r.seeds, baselines=False,
    )  # fmt: skip


def choose(config: RunConfig, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The (context, candidate) pairs that the rule of the config keeps."""
    kept = []
    for record in records:
        candidates = [Candidate(e["candidate"], e["text"], e["reward"]) for e in record["edits"]]
        unadapted = record["methods"][NONE][0]["reward"]
        for index in select(config.rest_em.select, candidates, config.rest_em.keep, unadapted):
            reward = next(c.reward for c in candidates if c.index == index)
            kept.append({"context": record["id"], "candidate": index, "reward": reward, "unadapted": unadapted})
    return {"kept": kept, "contexts": len(records)}


def m_step(policy: Policy, task: Task, store: RunStore, number: int, records: Sequence[dict[str, Any]]) -> None:
    """Round `number`: trains the policy on the kept self-edits and merges; from the round's checkpoint where there is one."""
    folder = store.folder / "policy" / str(number)
    kept = store.once(f"rounds/{number}/selection", lambda: choose(policy.config, records))["kept"]
    if not kept:
        store.once(f"rounds/{number}/m_step", lambda: {"pairs": 0, "steps": 0, "losses": []})
        return
    # The unit is written after the checkpoint: with it, the round is done.
    if not (store.has(f"rounds/{number}/m_step") and checkpoint.is_complete(folder)):
        contexts = {c.id: c for c in task.contexts("train")}
        texts = {(r["id"], e["candidate"]): e["text"] for r in records for e in r["edits"]}
        pairs = [(task.edit_prompt(contexts[k["context"]]), texts[k["context"], k["candidate"]].strip()) for k in kept]
        fitted = policy.tune(pairs, ("round", number, "m_step"))
        lora = jax.tree.map(lambda x: x[0], fitted.lora)
        checkpoint.save_adapters(folder, lora, {"round": number, "alpha": policy.config.m_step.lora.alpha})
        losses = [float(x) for x in fitted.losses[0]]
        store.once(f"rounds/{number}/m_step", lambda: {"pairs": len(pairs), "steps": len(losses), "losses": losses})
    # Read back also where it was just made, so that going on equals not stopping.
    restore(policy, store, number)


def after_name(rounds: int) -> str:
    """What the table calls the policy after `rounds` rounds."""
    return f"after {rounds} round{'s' if rounds > 1 else ''}"


def summary(config: RunConfig, evaluations: dict[str, Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """The table of the evaluations, by policy name."""
    e = config.evaluate
    return table_lib.table(evaluations, seeds=e.seeds, edits=e.edits, resamples=e.resamples, seed=config.seed)


def train(config: RunConfig) -> dict[str, Any]:
    """The whole run; returns its table. Continues a run folder of the same configuration."""
    with open_run(config) as store:
        policy, task = build(config)
        evaluations = {}
        if config.evaluate.during_training:
            evaluations["base"] = evaluate(policy, task, store, "before")
        for number in range(1, config.rest_em.rounds + 1):
            records = e_step(policy, task, store, number)
            m_step(policy, task, store, number, records)
            write_report(store.folder)
        if config.evaluate.during_training and config.rest_em.rounds:
            evaluations[after_name(config.rest_em.rounds)] = evaluate(policy, task, store, "after")
        return store.once("table", lambda: summary(config, evaluations)) if evaluations else {"rows": [], "notes": []}


def evaluate_only(config: RunConfig) -> dict[str, Any]:
    """The evaluation table of the configured model as it is, without training."""
    with open_run(config) as store:
        policy, task = build(config)
        records = evaluate(policy, task, store, "before")
        return store.once("table", lambda: summary(config, {"base": records}))


def generate(config: RunConfig, split: str, limit: int) -> Iterator[dict[str, Any]]:
    """Self-edits of the configured model for the first `limit` contexts of `split`, with what they would train on."""
    policy, task = build(config)
    for context in task.contexts(split)[:limit]:
        keys = [("generate", context.id, k) for k in range(config.rest_em.edits)]
        for candidate, text in enumerate(policy.write([task.edit_prompt(context)], [keys])[0]):
            data = task.training_set(context, text)
            sequences = [s.prompt + s.completion for s in data.sequences]
            yield {"context": context.id, "candidate": candidate, "text": text, "problem": data.problem, "sequences": sequences}
