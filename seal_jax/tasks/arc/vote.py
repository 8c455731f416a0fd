"""From many answers to a puzzle to the two that count, and how submissions of them score.

A tie goes to what came first, where the original follows the order of a Python set.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

from seal_jax.tasks.arc.augmenters import Augmenter, Transpose
from seal_jax.tasks.arc.grids import BLANK, Grid, shape

T = TypeVar("T", bound=Hashable)

IDENTITY = "identity"
# Views that have a say of their own, beside that in the vote of all.
CATEGORIES = (IDENTITY, "Transpose()", "Flip(0)", "Flip(1)", "Rotate(180)", "Rotate(270)")

Attempts = tuple[Grid, Grid]
Submission = dict[str, list[Attempts]]  # by task: the attempts at each of its test pairs


def vote(candidates: Sequence[tuple[Augmenter | str | None, Grid]]) -> Attempts:
    """The two attempts that the candidates vote for: each is an answer and what it was turned back with (None: it was asked as it is).

    All candidates, and those of each view alone, put up three grids each; among these it is voted again. `BLANK` without candidates.
    """
    if not candidates:
        return BLANK, BLANK
    categories: dict[str, list[Grid]] = {}
    for inverter, grid in candidates:
        categories.setdefault(IDENTITY if inverter is None else str(inverter), []).append(grid)
    put_up = list(top_three([grid for _, grid in candidates]))
    for name in CATEGORIES:
        put_up += top_three(categories[name]) if name in categories else ()
    first, second, third = top_three(put_up)
    plain = categories.get(IDENTITY)
    # Among equal runners-up the answers to the puzzle as it is decide; where these do not either, the original takes the third.
    if plain is not None and put_up.count(second) == put_up.count(third) and plain.count(second) <= plain.count(third):
        second = third
    return first, second


def top_three(grids: Sequence[Grid]) -> tuple[Grid, Grid, Grid]:
    """The most frequent grids. Where there are fewer than three different ones, the majority by rows or else by columns fills up, and
    may be a grid that is there already.
    """
    ranked = [grid for grid, _ in Counter(grids).most_common(3)]
    by_row, by_column = row_majority(grids), column_majority(grids)
    while len(ranked) < 3:
        ranked.append(by_row if by_row not in ranked else by_column)
    first, second, third = ranked
    return first, second, third


def row_majority(grids: Sequence[Grid]) -> Grid:
    """The grid of the most frequent shape, each of whose rows is the most frequent in that place among all grids of that width."""
    height, width = _most_frequent(map(shape, grids))
    return tuple(_most_frequent(grid[i] for grid in grids if len(grid) > i and len(grid[i]) == width) for i in range(height))


def column_majority(grids: Sequence[Grid]) -> Grid:
    """The same for columns."""
    return Transpose().grid(row_majority([Transpose().grid(grid) for grid in grids]))


def _most_frequent(items: Iterable[T]) -> T:
    return Counter(items).most_common(1)[0][0]  # the first of them, if several are


# ---- Submissions --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Result:
    """How a submission did. A test pair is right if one of its two attempts is; a task is if all its test pairs are.

    `correct` has the tasks that were tried, by name. `right` of `total` attempted test pairs are. `points` are out of `tasks`, all there
    are: one a correct task, or with subpoints its share of right test pairs.
    """

    correct: dict[str, bool]
    right: int
    total: int
    points: float
    tasks: int

    @property
    def accuracy(self) -> float:
        """The share of test pairs that are right, of those tried."""
        return self.right / self.total if self.total else 0.0

    @property
    def competition_accuracy(self) -> float:
        """The share of points, of all tasks there are."""
        return self.points / self.tasks if self.tasks else 0.0


def submission(attempts: Iterable[tuple[str, Attempts]]) -> Submission:
    """The attempts at puzzles ("007bbfb7-0") by task, sorted. A test pair that was left out before one that is there gets `BLANK`."""
    tasks: Submission = {}
    for (name, index), pair in sorted(((_split(puzzle), pair) for puzzle, pair in attempts), key=lambda item: item[0]):
        pairs = tasks.setdefault(name, [])
        pairs += [(BLANK, BLANK)] * (index + 1 - len(pairs))
        pairs[index] = pair
    return tasks


def evaluate(submission: Submission, solutions: Mapping[str, Sequence[Grid]], subpoints: bool = False) -> Result:
    """How a submission does against the solutions of all tasks, which may be more."""
    correct, right, total, points = {}, 0, 0, 0.0
    for name, pairs in submission.items():
        hits = [solution in pair for solution, pair in zip(solutions[name], pairs, strict=False)]
        correct[name] = all(hits) and len(hits) == len(solutions[name])
        right, total = right + sum(hits), total + len(hits)
        points += sum(hits) / len(solutions[name]) if subpoints else correct[name]
    return Result(correct, right, total, points, len(solutions))


def _split(puzzle: str) -> tuple[str, int]:
    name, _, index = puzzle.rpartition("-")
    return name, int(index)
