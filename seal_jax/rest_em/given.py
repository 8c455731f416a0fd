"""What a task has already, where otherwise it would be made or measured: self-edits, rewards, rows of the result table.

A task offers them by the methods of `seal_jax.tasks.base.Given`, any of which it may lack. Host code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

from seal_jax.config import RunConfig
from seal_jax.errors import SealError
from seal_jax.rest_em.policy import Key, Policy
from seal_jax.tasks.base import Context, Figure, Recorded, Task

COUNTS = {"train": "rest_em.edits", "validation": "evaluate.edits"}  # the keys of K by the split's purpose


def edits_of(task: Task, context: Context) -> Sequence[str] | None:
    """The self-edits that the task has for a context; None where the policy writes them."""
    ask = getattr(task, "given_edits", None)
    return None if ask is None else ask(context)


def write(
    policy: Policy,
    task: Task,
    contexts: Sequence[Context],
    keys: Sequence[Sequence[Key]],
    what: str,
    lora: Any = None,
    places: Sequence[int] | None = None,
) -> list[list[str]]:
    """Self-edits of each context, one a key: the first of those that the task has, or else what the policy writes.

    `lora` and `places` as in `Policy.write`: with them, each context has an adapter of its own.
    Raises `SealError` if a context has some, but fewer than there are keys.
    """
    found: dict[int, list[str]] = {}
    for i, context in enumerate(contexts):
        if (texts := edits_of(task, context)) is not None:
            if len(texts) < len(keys[i]):
                raise SealError(f"context {context.id}: {len(texts)} given self-edits, of {len(keys[i])} that are asked for")
            found[i] = list(texts[: len(keys[i])])
    asked = [i for i in range(len(contexts)) if i not in found]
    if asked:
        own = None if places is None else [places[i] for i in asked]
        written = policy.write([task.edit_prompt(contexts[i]) for i in asked], [keys[i] for i in asked], what, lora, own)
        found.update(zip(asked, written, strict=True))
    return [found[i] for i in range(len(contexts))]


def check(config: RunConfig, task: Task, contexts: Mapping[str, Sequence[Context]], edits: str | None = None) -> None:
    """Finds out before a model is loaded what would stop the run later, for the `contexts` of each split that is used.

    `edits` is the config key that says how many self-edits a context gets, "" if it is always one; None: that of the split, and results
    of earlier runs may be asked for as well.
    Raises `SealError` if a context has too few given self-edits, or a file of recorded results cannot be used.
    """
    for split, found in contexts.items():
        key = COUNTS[split] if edits is None else edits
        count = attrgetter(key)(config) if key else 1
        numbers = [(len(texts), c.id) for c in found if (texts := edits_of(task, c)) is not None]
        if few := [entry for entry in numbers if entry[0] < count]:
            least, name = min(few)
            more = f"; set {key}={least}" if least and key else ""
            wanted = f"{key}={count}" if key else "one self-edit a context is used"
            raise SealError(
                f"task.{split}: {wanted}, but {len(few)} of {len(found)} contexts come with fewer self-edits "
                f"(the fewest: {least}, {name}){more}, or leave those contexts out"
            )
    if edits is not None:
        return
    r = config.rest_em
    if "train" in contexts and r.rewards is not None and r.rounds:
        recorded(config, task, contexts["train"][: r.contexts])
    figures(config, task)


def recorded(config: RunConfig, task: Task, contexts: Sequence[Context]) -> list[Recorded]:
    """What `rest_em.rewards` says of the first `rest_em.edits` self-edits of each context. Raises `SealError` if it has not so many."""
    path, count = str(config.rest_em.rewards), config.rest_em.edits
    ask = getattr(task, "recorded", None)
    if ask is None:
        raise SealError(f"rest_em.rewards={path}: the task {config.task.name!r} has no files of recorded rewards; leave it out")
    found: list[Recorded] = ask(path, contexts)
    least, name = min((len(r.edits), c.id) for r, c in zip(found, contexts, strict=True))
    if least < count:
        raise SealError(f"rest_em.rewards={path}: {least} self-edits of {name}; rest_em.edits={count} are asked for, set {least}")
    return [Recorded(r.unadapted, r.edits[:count]) for r in found]


def figures(config: RunConfig, task: Task) -> list[Figure]:
    """The rows of `evaluate.beside`. Raises `SealError` for a file that cannot be used."""
    ask = getattr(task, "figures", None)
    if config.evaluate.beside and ask is None:
        line = config.evaluate.beside[0]
        raise SealError(f"evaluate.beside={line}: the task {config.task.name!r} has no files of recorded results; leave it out")
    return [figure for line in config.evaluate.beside for figure in ask(line)]
