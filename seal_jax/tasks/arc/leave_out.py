"""Puzzles from a puzzle's own training pairs: what a self-edit trains on, and in what forms the test pair is asked.

The original takes each list through a Python set, so that the order, and with it who gets which random draw, hangs on the hash seed of
the process. Here lists keep the order in which their members first came up, and are the same in every run.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TypeVar

from numpy.random import RandomState

from seal_jax.tasks.arc.augmenters import Augmenter, Flip, PermuteColors, PermuteExamples, Rotate, Transpose
from seal_jax.tasks.arc.grids import MAX_SIDE, Puzzle

T = TypeVar("T")

LIMIT = 250  # training puzzles of a self-edit
VIEWS = (Transpose(), Flip(0), Flip(1), Rotate(90), Rotate(180))  # in which the test pair is asked too


@dataclasses.dataclass(frozen=True)
class Query:
    """A puzzle whose test pair is asked, and what turns the answer back into the original puzzle's (None: it is that already)."""

    puzzle: Puzzle
    inverter: Augmenter | None = None


def training_puzzles(
    puzzle: Puzzle,
    augmenters: Sequence[Augmenter],
    leave_n: Sequence[int] = (1, 2),
    permute_n: int = 1,
    limit: int | None = LIMIT,
    seed: int = 0,
) -> list[Puzzle]:
    """What is trained on: the `leave_n_puzzles` of every n, and `limited` to `limit` of them (None: all). The test pair is not in them."""
    made = [p for n in leave_n for p in leave_n_puzzles(puzzle, augmenters, n, permute_n, seed)]
    return limited(made, limit, seed)


def leave_n_puzzles(puzzle: Puzzle, augmenters: Sequence[Augmenter], n: int = 1, permute_n: int = 1, seed: int = 0) -> list[Puzzle]:
    """Puzzles with n of the training pairs left out, one of which is the new test pair: each once as drawn, once plain.

    Plain are the puzzles under each augmenter, as far as their grids stay within 30 by 30, and as they are. Drawn, `permute_n` times each,
    are new colours (only if there are augmenters: a self-edit without any leaves the colours alone) and a new order of the pairs.
    """
    rng = RandomState(seed)
    own = []
    for i, test in enumerate(puzzle.train):
        others = [pair for j, pair in enumerate(puzzle.train) if j != i]
        own += [Puzzle(puzzle.id, train, test) for train in _without(others, n - 1)]
    augmented = [p for augmenter in augmenters for p in (augmenter.puzzle(q, rng) for q in own) if p.side <= MAX_SIDE]
    plain = list(dict.fromkeys(augmented + own))
    drawn = []
    for _ in range(permute_n):
        for p in plain:
            recolored = PermuteColors().puzzle(p, rng) if augmenters else p
            drawn.append(PermuteExamples().puzzle(recolored, rng))
    return list(dict.fromkeys(drawn + plain))


def limited(items: Sequence[T], limit: int | None, seed: int = 0) -> list[T]:
    """The items; where there are more than `limit`, that many of them in the original's shuffled order."""
    if limit is None or len(items) <= limit:
        return list(items)
    order = list(range(len(items)))
    RandomState(seed).shuffle(order)
    return [items[i] for i in order[:limit]]


def queries(puzzle: Puzzle, leave_n: Sequence[int] = (1,), permute_n: int = 2, seed: int = 0) -> list[Query]:
    """In what forms the test pair is asked: with each n of the training pairs left out, as stored and in `permute_n` drawn orders, and in
    five views, each of one of those forms, drawn; these come first. n = 0 is the whole puzzle.
    """
    return [query for n in leave_n for query in _leave_n_queries(puzzle, n, permute_n, seed)]


def _leave_n_queries(puzzle: Puzzle, n: int, permute_n: int, seed: int) -> list[Query]:
    rng = RandomState(seed)
    forms = []
    for train in _without(puzzle.train, n):
        form = dataclasses.replace(puzzle, train=train)
        forms += [form, *(PermuteExamples().puzzle(form, rng) for _ in range(permute_n))]
    forms = list(dict.fromkeys(forms))
    seen = dict.fromkeys(forms)
    made = []
    for augmenter in VIEWS if forms else ():
        view = augmenter.puzzle(forms[rng.choice(len(forms))])
        if view not in seen:
            seen[view] = None
            made.append(Query(view, augmenter.inverse()))
    return made + [Query(form) for form in forms]


def _without(items: Sequence[T], n: int) -> list[tuple[T, ...]]:
    """The items without n of them, in every way; the first are left out first. There is no way to leave out more than there are."""
    ways = itertools.combinations(range(len(items)), n)
    return [tuple(item for i, item in enumerate(items) if i not in way) for way in ways]
