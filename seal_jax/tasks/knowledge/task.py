"""The knowledge task: a passage is to be remembered, and questions about it are asked without it (arXiv 2506.10943, section 3.1)."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from seal_jax.errors import SealError
from seal_jax.tasks.base import Context, Figure, Prompt, Recorded, Score, TrainingSet, TrainSequence
from seal_jax.tasks.knowledge import directives as directives_lib
from seal_jax.tasks.knowledge import original, prompts, sequences, sources
from seal_jax.tasks.knowledge.directives import Directives

if TYPE_CHECKING:
    from seal_jax.grade.base import GradeItem, Grader


@dataclasses.dataclass
class Config:
    """The options of the knowledge task. Prompts default to the paper's."""

    name: str = "knowledge"  # the package under seal_jax/tasks
    train: str = "fictional"  # where the passages come from that the policy learns on: a source line (sources.py)
    validation: str = "fictional"  # where those come from that the table is measured on
    train_edits: str = "policy"  # who writes the self-edits of `train`: "policy", or "given": they are the source's, under `completions`
    validation_edits: str = "policy"  # as train_edits, of `validation`
    shuffle: int | None = None  # seed of the order in which passages are taken (the original: 42); null: as stored
    prompt: str = "implications"  # what the policy is asked for (prompts.py)
    answer_prompt: str = "base"  # how questions are asked: "base", "instruct" or "chat" (prompts.py)
    split_newlines: bool = True  # one training sequence a line (or question-answer pair) of the self-edit
    split_sentences: bool = False  # and one a sentence of it, for policies that write paragraphs
    drop_headers: bool = True  # "Sure, here is ..." and the like are not trained on; false: exactly the original's sequences
    deduplicate: bool = False  # train on equal lines once
    include_passage: bool = True  # the passage itself is a training sequence too
    directives: directives_lib.Config | None = None  # {learning_rates: [0.0001, 0.005], epochs: [1, 20]}: edits choose theirs; null: off


class KnowledgeTask:
    """Implements `seal_jax.tasks.base.Task` and `Given` for passages with questions."""

    def __init__(self, config: Config, grader: Grader):
        _choice("prompt", config.prompt, prompts.EDIT_STYLES)
        _choice("answer_prompt", config.answer_prompt, prompts.ANSWER_STYLES)
        for key in ("train_edits", "validation_edits"):
            _choice(key, getattr(config, key), ("policy", "given"))
        if config.directives is not None:
            directives_lib.check(config.directives)
        for line in (config.train, config.validation):
            sources.parse(line)
        self.config = config
        self.grader = grader
        self._contexts: dict[str, list[Context]] = {}

    def contexts(self, split: str) -> list[Context]:
        c = self.config
        lines = {"train": (c.train, c.train_edits), "validation": (c.validation, c.validation_edits)}
        _choice("split", split, tuple(lines))
        if split not in self._contexts:
            line, edits = lines[split]
            self._contexts[split] = [_with_edits(context, edits == "given") for context in sources.load(line, split, c.shuffle)]
        return self._contexts[split]

    def chosen(self) -> Sequence[str]:
        return () if self.config.directives is None else ("learning_rate", "epochs")

    def given_edits(self, context: Context) -> Sequence[str] | None:
        return context.payload.get("completions")

    def edit_prompt(self, context: Context) -> Prompt:
        bounds = self.config.directives
        prompt = prompts.edit_prompt(self.config.prompt, context.title, context.payload["context"], bounds)
        return prompt if bounds is None else dataclasses.replace(prompt, schema=directives_lib.schema(bounds), then_text=True)

    def training_set(self, context: Context, edit: str) -> TrainingSet:
        """The self-edit's lines, then the passage, each after the title; every token carries the loss, or as its directives say."""
        c, chosen = self.config, Directives()
        if c.directives is not None:
            found = directives_lib.split(edit, c.directives)
            if isinstance(found, str):
                return TrainingSet((), problem=found)
            chosen, edit = found
        lines, dropped = sequences.edit_lines(edit, c.split_newlines, c.drop_headers, c.deduplicate, context.title, c.split_sentences)
        if not any(line.strip() for line in lines):
            return TrainingSet((), problem="no usable line in the self-edit", dropped=dropped)
        if c.include_passage:
            lines = [*lines, context.payload["context"].strip()]
        before = sequences.sequence(context.title, "")
        made = [
            TrainSequence(line, Prompt(text=before)) if chosen.loss == "part" else TrainSequence(sequences.sequence(context.title, line))
            for line in lines
        ]
        return TrainingSet(tuple(made), chosen.fit, dropped=dropped)

    def baselines(self, context: Context) -> dict[str, TrainingSet]:
        passage = sequences.sequence(context.title, context.payload["context"].strip())
        return {"passage only": TrainingSet((TrainSequence(passage),))}

    def probes(self, context: Context) -> list[Prompt]:
        return [
            prompts.answer_prompt(self.config.answer_prompt, prompts.topic_question(context.title, question))
            for question, _ in self.describe(context)
        ]

    def score(self, items: Sequence[tuple[Context, Sequence[str]]]) -> list[Score]:
        """All answers of all contexts go to the grader in one call. Raises `ValueError` if a context has not one output a probe."""
        return _scores(items, self.grader.grade(self._asked(items)))

    def begin(self, items: Sequence[tuple[Context, Sequence[str]]]) -> Callable[[], list[Score]] | None:
        if (begin := getattr(self.grader, "begin", None)) is None:
            return None
        wait = begin(self._asked(items))
        return lambda: _scores(items, wait())

    def _asked(self, items: Sequence[tuple[Context, Sequence[str]]]) -> list[GradeItem]:
        from seal_jax.grade.base import GradeItem

        asked = []
        for context, outputs in items:
            # strict: outputs that do not match the probes are the caller's mistake, and would pair answers with the wrong questions
            for (question, gold), output in zip(self.describe(context), outputs, strict=True):
                asked.append(GradeItem(context.title, question, gold, output.strip()))
        return asked

    def text(self, context: Context) -> str:
        return context.payload["context"]

    def describe(self, context: Context) -> list[tuple[str, str]]:
        return [(q["question"], q["answer"]) for q in context.payload["questions"]]

    def recorded(self, path: str, contexts: Sequence[Context]) -> list[Recorded]:
        return original.recorded(path, contexts)

    def figures(self, line: str) -> list[Figure]:
        return original.figures(line)


def _scores(items: Sequence[tuple[Context, Sequence[str]]], verdicts: Sequence[bool | None]) -> list[Score]:
    left = iter(verdicts)
    return [Score.of([next(left) for _ in outputs]) for _, outputs in items]


def _with_edits(context: Context, given: bool) -> Context:
    """The context with the self-edits of its source, none if it has none; if not `given`, without any."""
    payload = {key: value for key, value in context.payload.items() if key != "completions"}
    if given:
        payload["completions"] = context.payload.get("completions", [])
    return dataclasses.replace(context, payload=payload)


def build(config: Config, grader: Grader) -> KnowledgeTask:
    """The task of a configuration; `SealError` for a value that is not known."""
    return KnowledgeTask(config, grader)


def _choice(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        close = difflib.get_close_matches(str(value), known, 1, 0.5)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise SealError(f"task.{key}={value!r} is unknown{hint}; one of: {', '.join(known)}")
