"""The records that flow through SEAL, and what a task must know about them.

    Context --prompt--> policy --sample--> SelfEdit --parse--> TrainingSet --fit--> adapter
        --answer--> outputs --score--> Score --select--> (prompt, self-edit) pairs

A task owns everything that knows what a context means. It is host code: plain Python on text, no arrays and no devices. ReST-EM
and the experiments see only what stands in this file. Every record survives `to_json` / `from_json`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol


def to_json(record: Any) -> dict[str, Any]:
    """A record (frozen dataclass) as plain JSON data."""
    return dataclasses.asdict(record)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What the policy is asked: raw text, or chat messages rendered with the model's own chat template.

    Exactly one of `text` and `messages` is set. `messages` are `{"role": ..., "content": ...}`.
    """

    text: str | None = None
    messages: tuple[Mapping[str, str], ...] | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Prompt:
        messages = data.get("messages")
        return cls(data.get("text"), None if messages is None else tuple(dict(m) for m in messages))


@dataclasses.dataclass(frozen=True)
class Context:
    """One thing to adapt to: a passage with its questions, an ARC task.

    `id` is unique within a data set and stable over runs; random draws and result files are keyed by it. `payload` is the task's
    own JSON data, which nothing outside the task reads.
    """

    id: str
    title: str
    payload: Mapping[str, Any]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Context:
        return cls(data["id"], data["title"], data["payload"])


@dataclasses.dataclass(frozen=True)
class TrainSequence:
    """One training sequence: `prompt` is read without a loss, `completion` carries the loss (all of it, if `prompt` is empty)."""

    completion: str
    prompt: str = ""


@dataclasses.dataclass(frozen=True)
class TrainingSet:
    """What a self-edit yields to train on.

    `sequences` are trained on in a random order each epoch. `fit` overrides inner-loop settings (names of `config.FitConfig`), for
    self-edits that choose their own. `problem` says why a self-edit is unusable; then it earns reward 0 and is not fitted.
    `dropped` counts header lines and the like that were left out.
    """

    sequences: tuple[TrainSequence, ...]
    fit: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    problem: str | None = None
    dropped: int = 0


@dataclasses.dataclass(frozen=True)
class Score:
    """How outputs did on a context's downstream evaluation.

    `verdicts` has one entry a question: True, False, or None for "ungraded" (the grader failed). `reward` is the mean over graded
    questions, in [0, 1], or None if none could be graded.
    """

    verdicts: tuple[bool | None, ...]
    reward: float | None

    @classmethod
    def of(cls, verdicts: Sequence[bool | None]) -> Score:
        graded = [v for v in verdicts if v is not None]
        return cls(tuple(verdicts), sum(graded) / len(graded) if graded else None)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Score:
        return cls(tuple(data["verdicts"]), data["reward"])


class Task(Protocol):
    """What ReST-EM and the experiments ask of a task."""

    def contexts(self, split: str) -> list[Context]:
        """The contexts of `split` ("train" or "validation"), in a fixed order. Unusable items are skipped and counted."""
        ...

    def edit_prompt(self, context: Context) -> Prompt:
        """What the policy reads to write a self-edit."""
        ...

    def training_set(self, context: Context, edit: str) -> TrainingSet:
        """The self-edit's text as training data. Never raises: an unusable edit has `problem` set."""
        ...

    def baselines(self, context: Context) -> dict[str, TrainingSet]:
        """Training sets that need no self-edit (the passage alone, say), by the name of their row in the result table."""
        ...

    def probes(self, context: Context) -> list[Prompt]:
        """The prompts that the adapted model answers; the context itself is not in them."""
        ...

    def score(self, items: Sequence[tuple[Context, Sequence[str]]]) -> list[Score]:
        """Scores of the outputs (one a probe) of many contexts at once, so that a remote grader is called concurrently."""
        ...

    def text(self, context: Context) -> str:
        """The context as a reader of the report wants to see it."""
        ...

    def describe(self, context: Context) -> list[tuple[str, str]]:
        """(question, reference answer) of each probe, for the report."""
        ...
