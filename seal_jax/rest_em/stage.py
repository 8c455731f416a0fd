"""Who acts on what in a run: the policy, the task and its contexts, made as a configuration asks for them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from seal_jax import config as config_lib
from seal_jax import grade, tasks
from seal_jax.config import ModelConfig, RunConfig
from seal_jax.errors import SealError
from seal_jax.grade.base import GradeItem, Grader
from seal_jax.models import load
from seal_jax.models.dtypes import resolve_dtype
from seal_jax.models.tree import abstract
from seal_jax.parallel import cost, processes
from seal_jax.parallel import mesh as mesh_lib
from seal_jax.progress import bar
from seal_jax.rest_em import given
from seal_jax.rest_em.policy import Policy
from seal_jax.runs.store import CONFIG, RunStore
from seal_jax.tasks.base import Context, Prompt, Task, to_json

log = logging.getLogger(__name__)

JUDGE = "grade.model"  # the key that names a judging model


@dataclasses.dataclass(frozen=True)
class Stage:
    """Who acts on what: the policy, the task, and the usable contexts by split."""

    policy: Policy
    task: Task
    contexts: dict[str, list[Context]]

    @property
    def read(self) -> dict[str, list[list[str]]]:
        """Of each split that was read, by its config key, [id, digest] of each context; see `RunStore.same_data`."""
        return {f"task.{split}": [[c.id, digest(to_json(c))] for c in found] for split, found in self.contexts.items()}


def digest(data: Any) -> str:
    """Some digits that tell JSON data from other."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def build(
    config: RunConfig,
    splits: Sequence[str],
    trained: RunStore | None = None,
    after: int = 0,
    edits: str | None = None,
    grades: bool = True,
) -> Stage:
    """What `config` asks for; with `trained`, the policy as it is after round `after` of that run.

    The task comes first: what it finds wrong shows before a model is loaded. `edits` is the config key that says how many self-edits a
    context gets ("": always one), where it is not that of the split's usual purpose. `grades`: whether anything is still to be graded.
    """
    task = tasks.build(config.task, grader(config))
    contexts = {split: task.contexts(split) for split in splits}
    given.check(config, task, contexts, edits)
    if grades:
        check_grader(task)
    if trained is not None and (name := config_lib.load(trained.folder / CONFIG).model.name) != config.model.name:
        raise SealError(f"model.name={config.model.name!r}: the policy of {trained.folder} is {name!r}, trained; leave model.name out")
    policy = load_policy(config)
    policy.beside = judge_bytes(config, policy.mesh) if grades else 0
    for number in range(1, after + 1):
        assert trained is not None
        restore(policy, trained, number)
    return Stage(policy, task, {split: usable(policy, task, found, split) for split, found in contexts.items()})


def check_grader(task: Task) -> None:
    """Raises `SealError` if the task's grader, where it has one, could grade nothing."""
    if (asked := getattr(task, "grader", None)) is not None:
        asked.check()


def load_policy(config: RunConfig, key: str = "model.name") -> Policy:
    """The configured model, on the configured mesh. `key`: where its name comes from, for messages."""
    mesh = mesh_lib.make(config.mesh)
    if mesh.devices.flat[0].platform == "gpu" and jax.__version_info__ < (0, 11):
        log.warning("JAX %s on a GPU: its compiler copies the weights at every step; take JAX 0.11 or newer", jax.__version__)
    return Policy(load.load_model(config.model, mesh_lib.parameter_sharding(mesh), key), config, mesh)


def restore(policy: Policy, store: RunStore, number: int) -> None:
    """Merges the adapter of round `number` into the policy, if that round kept anything to learn from."""
    if store.read(f"rounds/{number}/m_step")["pairs"]:
        lora, metadata = store.load(f"policy/{number}")
        policy.merge(lora, metadata["alpha"] / metadata["rank"])


def usable(policy: Policy, task: Task, contexts: Sequence[Context], split: str) -> list[Context]:
    """The contexts whose prompts all fit the model's context. The others are counted in a warning, which a run's log keeps."""
    fitting, others = [], []
    with bar(f"reading the {split} contexts", len(contexts), "context") as progress:
        for context in contexts:
            if all(policy.prompt_fits(prompt) for prompt in (task.edit_prompt(context), *task.probes(context))):
                fitting.append(context)
            else:
                others.append(context.id)
            progress.update()
    reason = f"prompt that leaves no room for an answer within {policy.max_length} tokens"
    if not fitting:
        raise SealError(f"task.{split}: no usable context: all {len(contexts)} have a {reason}; raise model.max_length if the model allows")
    if others:
        skipped = [{"source": f"task.{split}", "reason": f"context with a {reason}", "count": len(others)}]
        named = ", ".join(others[:3]) + ", ..." * (len(others) > 3)
        said = "task.%s: %d of %d contexts skipped: each has a %s: %s"
        log.warning(said, split, len(others), len(contexts), reason, named, extra={"skipped": skipped})
    return fitting


def grader(config: RunConfig) -> Grader:
    """The grader that the config names. A judging model is loaded at its first call; it is not the policy, which changes as it learns."""
    judge: list[Policy] = []
    model = _judging(config)

    def generate(prompts: Sequence[Prompt]) -> list[str]:
        if not judge:
            with _of_the_judge():
                settings = dataclasses.replace(config, model=model, answer=dataclasses.replace(config.answer, max_tokens=8))
                judge.append(load_policy(settings, JUDGE))
        with _of_the_judge():
            return judge[0].answer([prompts], what="judging")[0]

    def check() -> None:
        with _of_the_judge():
            _, tokenizer = load.read_head(model, JUDGE)
            tokenizer.render([{"role": "user", "content": "Is it so?"}])

    found = grade.build(config.grade, generate, check)
    return _AskedOnce(found) if config.grade.name == "endpoint" else found


def judge_bytes(config: RunConfig, mesh: Mesh) -> int:
    """Bytes a device of the weights of a judging model, which is loaded when there is something to grade; 0 without one."""
    if config.grade.name != "judge":
        return 0
    model = _judging(config)
    with _of_the_judge():
        spec, _ = load.read_head(model, JUDGE)
    return cost.shard_bytes(abstract(spec, resolve_dtype(model.dtype), mesh_lib.parameter_sharding(mesh)))


def _judging(config: RunConfig) -> ModelConfig:
    return dataclasses.replace(config.model, name=config.grade.model)


@contextlib.contextmanager
def _of_the_judge() -> Iterator[None]:
    """Messages say that they are about the judge, not the policy."""
    try:
        yield
    except SealError as error:
        raise SealError(str(error) if str(error).startswith(JUDGE) else f"{JUDGE}, the judge: {error}") from None


class _AskedOnce:
    """A grader that the first process alone calls, for all: a server's replies are paid for, and may differ from one call to the next."""

    def __init__(self, grader: Grader):
        self.name, self._grader = grader.name, grader

    def check(self) -> None:
        problem = None
        if processes.first():
            try:
                self._grader.check()
            except SealError as error:
                problem = str(error)
        if (problem := processes.share(problem)) is not None:
            raise SealError(problem)

    def grade(self, items: Sequence[GradeItem]) -> list[bool | None]:
        return self.begin(items)()

    def begin(self, items: Sequence[GradeItem]) -> Callable[[], list[bool | None]]:
        wait = self._grader.begin(items) if processes.first() else None
        return lambda: processes.share(wait() if wait is not None else None)
