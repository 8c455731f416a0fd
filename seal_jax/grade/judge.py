"""A language model of ours as judge: asked as a chat message, read by its yes or no."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from seal_jax.grade.base import Generate, GradeItem, item_prompt, verdict_of
from seal_jax.tasks.base import Prompt


class JudgeGrader:
    """Asks `generate` about every item that is not blank. `failures` counts replies without a yes or a no, over the grader's life.

    `check` raises `SealError` if the model cannot be had, without loading it.
    """

    name = "judge"

    def __init__(self, generate: Generate, check: Callable[[], None] = lambda: None):
        self._generate, self._check = generate, check
        self.failures = 0

    def check(self) -> None:
        self._check()

    def grade(self, items: Sequence[GradeItem]) -> list[bool | None]:
        verdicts: list[bool | None] = [False] * len(items)
        asked = [i for i, item in enumerate(items) if not item.blank]
        # Many candidates give the same answer: each prompt is decoded once.
        texts = list(dict.fromkeys(item_prompt(items[i]) for i in asked))
        prompts = [Prompt(messages=({"role": "user", "content": text},)) for text in texts]
        replies = dict(zip(texts, self._generate(prompts) if prompts else [], strict=True))
        for i in asked:
            verdicts[i] = verdict_of(replies[item_prompt(items[i])])
            self.failures += verdicts[i] is None
        return verdicts
