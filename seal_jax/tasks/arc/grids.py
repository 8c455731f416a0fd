"""The records of an ARC puzzle: grids of colours, pairs of an input and its output, and the puzzle itself.

A grid is a tuple of its rows, which are tuples of colours: it compares and hashes by value, cannot be changed, and is JSON but for its
parentheses. What is made of grids here (`augmenters`, `vote`) is small, and quicker on tuples than through arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

Grid = tuple[tuple[int, ...], ...]  # [height][width] colours, which are 0 to 9; 0 is the background

MAX_SIDE = 30  # of a grid of ARC
BLANK: Grid = ((0,),)  # the answer where there is none


@dataclasses.dataclass(frozen=True)
class Pair:
    """An input grid and the output grid that the puzzle's rule makes of it."""

    input: Grid
    output: Grid

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Pair:
        """The pair of {"input": rows, "output": rows}; raises `ValueError` where it is not one."""
        if not isinstance(data, Mapping):
            raise ValueError(f"with a pair that is {type(data).__name__}")
        for side in ("input", "output"):
            if data.get(side) is None:
                raise ValueError(f"with a pair without an {side}")
        return cls(grid(data["input"]), grid(data["output"]))

    def to_json(self) -> dict[str, Any]:
        return {"input": rows(self.input), "output": rows(self.output)}


@dataclasses.dataclass(frozen=True)
class Puzzle:
    """Pairs that show a rule, and one pair to test it on. `id` is the task's name and the number of the test pair: "007bbfb7-0"."""

    id: str
    train: tuple[Pair, ...]
    test: Pair

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Puzzle:
        return cls(data["id"], tuple(Pair.from_json(pair) for pair in data["train"]), Pair.from_json(data["test"]))

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "train": [pair.to_json() for pair in self.train], "test": self.test.to_json()}

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """All pairs, the test pair last."""
        return (*self.train, self.test)

    @property
    def side(self) -> int:
        """The largest height or width of its grids."""
        return max(max(shape(g)) for pair in self.pairs for g in (pair.input, pair.output))


def grid(rows: Any) -> Grid:
    """A grid from JSON's lists; raises `ValueError` unless it is a rectangle of the colours 0 to 9, at most 30 by 30."""
    if not isinstance(rows, (list, tuple)) or not all(isinstance(row, (list, tuple)) for row in rows):
        raise ValueError("with a grid that is not a list of rows")
    if not 1 <= len(rows) <= MAX_SIDE or not 1 <= len(rows[0]) <= MAX_SIDE or len({len(row) for row in rows}) > 1:
        raise ValueError(f"with a grid that is not a rectangle of at most {MAX_SIDE} by {MAX_SIDE}")
    if not all(type(cell) is int and 0 <= cell <= 9 for row in rows for cell in row):
        raise ValueError("with a grid of other things than the colours 0 to 9")
    return tuple(map(tuple, rows))


def rows(grid: Grid) -> list[list[int]]:
    """A grid as JSON's lists."""
    return [list(row) for row in grid]


def shape(grid: Grid) -> tuple[int, int]:
    """(height, width); a model's output can have no row, or rows without cells."""
    return len(grid), len(grid[0]) if grid else 0
