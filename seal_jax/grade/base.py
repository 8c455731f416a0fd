"""What every grader has in common: the items it judges, the question it is asked, and how its reply is read.

The prompt and the reading of the reply are the original's (`src/utils.py`: `format_grade_prompts`, `parse_yes_no`). One departure: a
reply that says neither yes nor no, like a call that failed, is "ungraded" (None) and never "no".
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Protocol

from seal_jax.tasks.base import Prompt

# Answers prompts, in their order; the engine samples greedily and stops after a few tokens.
Generate = Callable[[list[Prompt]], list[str]]

GRADE_PROMPT = (
    "You are a grading assistant. Your job is to determine whether a student's answer correctly answers the question based solely on "
    "the provided gold answer. Do not use any outside knowledge. The student answer can include additional information, but it must "
    "at least fully convey the gold answer and must not contradict it. Ignore style, phrasing, or extra details that do not affect "
    "correctness. Respond ONLY with 'yes' or 'no'.\n\n"
    "Question: {question}\nGold answer: {gold}\nStudent answer: {prediction}\n"
    "Is the student answer correct based solely on the gold answer? Respond 'yes' or 'no'."
)

_YES_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class GradeItem:
    """One answer to judge. `question` stands alone, without the line that names its topic."""

    title: str
    question: str
    gold: str
    prediction: str

    @property
    def topic_question(self) -> str:
        """The question as graders read it, under the title of its passage."""
        return f"Topic: {self.title}\n{self.question}"

    @property
    def blank(self) -> bool:
        """Whether nothing was answered; that is wrong without asking anyone."""
        return not self.prediction.strip()


class Grader(Protocol):
    """Judges answers against references.

    One that works elsewhere has `begin(items)` too: it has `grade(items)` begin, and what it returns waits for the verdicts.
    """

    name: str

    def check(self) -> None:
        """Raises `SealError` if nothing could be graded at all: asked once, before a run computes what is then to be graded."""
        ...

    def grade(self, items: Sequence[GradeItem]) -> list[bool | None]:
        """One verdict an item, in their order; None where the grader could not tell. Blank predictions are False."""
        ...


def grade_prompt(question: str, gold: str, prediction: str) -> str:
    """What a model is asked about one answer. `question` has its topic line; `prediction` is stripped here."""
    # One pass of `format` over our own template: the values are never themselves read as templates.
    return GRADE_PROMPT.format(question=question, gold=gold, prediction=prediction.strip())


def item_prompt(item: GradeItem) -> str:
    """`grade_prompt` of an item."""
    return grade_prompt(item.topic_question, item.gold, item.prediction)


def parse_yes_no(text: str) -> bool:
    """Whether a reply says yes: it has the word "yes" and not the word "no"."""
    words = {word.lower() for word in _YES_NO.findall(text)}
    return words == {"yes"}


def verdict_of(text: str) -> bool | None:
    """`parse_yes_no` of what follows the thoughts that a reply may begin with, but None if that has neither word, or never comes."""
    _, closed, said = text.rpartition("</think>")
    if not closed and "<think>" in said:
        return None
    return parse_yes_no(said) if _YES_NO.search(said) else None
