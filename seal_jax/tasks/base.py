"""The records that flow through SEAL, and what a task must know about them.

    Context --prompt--> policy --sample--> SelfEdit --parse--> TrainingSet --fit--> adapter
        --answer--> outputs --score--> Score --select--> (prompt, self-edit) pairs

A task owns everything that knows what a context means. It is host code: plain Python on text, no arrays and no devices. ReST-EM
and the experiments see only what stands in this file. Every record survives `to_json` / `from_json`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable


def to_json(record: Any) -> dict[str, Any]:
    """A record (frozen dataclass) as plain JSON data."""
    return dataclasses.asdict(record)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What the policy is asked: raw text, or chat messages rendered with the model's own chat template.

    Exactly one of `text` and `messages` is set. `messages` are `{"role": ..., "content": ...}`. `schema` is the JSON schema of what is to
    be written (`seal_jax.sample.schema` says what it may hold); a policy that samples under constraints writes nothing else, or with
    `then_text` a line break after it and then any text.
    """

    text: str | None = None
    messages: tuple[Mapping[str, str], ...] | None = None
    schema: Mapping[str, Any] | None = None
    then_text: bool = False

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Prompt:
        messages = data.get("messages")
        messages = None if messages is None else tuple(dict(m) for m in messages)
        return cls(data.get("text"), messages, data.get("schema"), data.get("then_text", False))


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
    """One training sequence: `completion` after `prompt`, with the loss on the completion, or `on_prompt` on both.

    After chat messages the completion is the assistant's turn, and the end of the turn is learnt with it. Raw text (or none) goes on as
    text and has no end. `label` is what a reader of the report sees of the sequence; default: all of its text.
    """

    completion: str
    prompt: Prompt = Prompt(text="")
    on_prompt: bool = False
    label: str | None = None

    @property
    def shown(self) -> str:
        """The sequence as a reader sees it."""
        before = [self.prompt.text or ""] if self.prompt.messages is None else [m["content"] for m in self.prompt.messages]
        return "".join([*before, self.completion]) if self.label is None else self.label


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
    questions, in [0, 1], or None if none could be graded. `answers` says what stood as the answer to each question where that is
    not the output of one probe (a vote over several, say).
    """

    verdicts: tuple[bool | None, ...]
    reward: float | None
    answers: tuple[str, ...] | None = None

    @classmethod
    def of(cls, verdicts: Sequence[bool | None], answers: Sequence[str] | None = None) -> Score:
        graded = [v for v in verdicts if v is not None]
        return cls(tuple(verdicts), sum(graded) / len(graded) if graded else None, None if answers is None else tuple(answers))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Score:
        answers = data.get("answers")
        return cls(tuple(data["verdicts"]), data["reward"], None if answers is None else tuple(answers))


@dataclasses.dataclass(frozen=True)
class Trial:
    """The outputs of one model on a context's probes, one a question, and their score."""

    outputs: tuple[str, ...]
    score: Score


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What was measured elsewhere on a context: the model without adaptation, and each self-edit's text with its trials."""

    unadapted: Trial
    edits: tuple[tuple[str, tuple[Trial, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A row of the result table that was measured elsewhere.

    `policy`, `method` and `statistic` are what its columns say, methods by their usual names. `contexts`, `questions` and `ungraded` are
    counts. `values` has one accuracy a context, None where nothing was graded; where single contexts are not known it is empty, and `mean`
    is the accuracy. `note` goes below the table.
    """

    policy: str
    method: str
    statistic: str
    contexts: int
    questions: int
    ungraded: int
    values: tuple[float | None, ...] = ()
    mean: float | None = None
    note: str | None = None


@dataclasses.dataclass(frozen=True)
class View:
    """How the records of a task are shown: the attribute `VIEW` of the task's package, where this default does not do.

    `names` are other words for methods in the result table, by the usual ones ("no adaptation", "passage + self-edit"). `context` heads a
    context's text. `html` makes of a text of some kind ("context", "edit", "sequence", "question", "reference", "answer") a fragment of
    HTML, trusted and complete, or None where it should stand as it is. Texts are untrusted: whatever a model wrote.
    """

    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    context: str = "Context"
    html: Callable[[str, str], str | None] = lambda kind, text: None


class Task(Protocol):
    """What ReST-EM and the experiments ask of a task.

    One that asks the grader it is built with keeps it as `grader`: whether that can work is then seen before anything is computed.
    """

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
        """Scores of the outputs (one a probe) of many contexts at once, so that a remote grader is called concurrently.

        A score has a verdict for each question of `describe`.
        """
        ...

    def text(self, context: Context) -> str:
        """The context as a reader of the report wants to see it."""
        ...

    def describe(self, context: Context) -> list[tuple[str, str]]:
        """(question, reference answer) of each question, for the report. Without `Score.answers`, there is one for each probe."""
        ...


@runtime_checkable
class Apart(Protocol):
    """What a task has besides `Task` whose outputs may be scored elsewhere, while the devices go on."""

    def begin(self, items: Sequence[tuple[Context, Sequence[str]]]) -> Callable[[], list[Score]] | None:
        """Has `score(items)` begin; what is returned waits for it, with its errors. None: it would be computed here."""
        ...


class Given(Protocol):
    """What a task may have besides `Task`; each method may be missing. What it gives stands in for what would be made or measured."""

    def chosen(self) -> Sequence[str]:
        """The settings of the inner loop (names of `config.FitConfig`) that self-edits choose for themselves, whatever the config has."""
        ...

    def given_edits(self, context: Context) -> Sequence[str] | None:
        """The self-edits of the context, in order, instead of the policy's; None where the policy writes them."""
        ...

    def recorded(self, path: str, contexts: Sequence[Context]) -> list[Recorded]:
        """What the file `path` (`rest_em.rewards`) says was measured on `contexts`, in their order. Raises `SealError` if it does not."""
        ...

    def figures(self, line: str) -> list[Figure]:
        """The rows of one entry of `evaluate.beside`. Raises `SealError` for a file that is missing or of another form."""
        ...
