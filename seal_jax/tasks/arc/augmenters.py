"""Augmenters: puzzles made from a puzzle, by the same change to all its grids.

Each is a record whose `repr` is the name that it has in the original. Those that draw take a `numpy.random.RandomState` (numpy keeps its
streams the same over versions), and draw from it what the original's draw.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from numpy.random import RandomState

from seal_jax.tasks.arc.grids import Grid, Pair, Puzzle

# ---- Helpers ------------------------------------------------------------------------------------------------------------------------


def _transpose(grid: Grid) -> Grid:
    return tuple(zip(*grid, strict=True))


def _flip(grid: Grid, axis: int) -> Grid:
    return grid[::-1] if axis == 0 else tuple(row[::-1] for row in grid)


def _join(grids: tuple[Grid, ...], axis: int) -> Grid:
    if axis == 0:
        return tuple(row for grid in grids for row in grid)
    return tuple(tuple(cell for row in rows for cell in row) for rows in zip(*grids, strict=True))


def _roll(grid: Grid, down: int, right: int) -> Grid:
    grid = grid[len(grid) - down :] + grid[: len(grid) - down]
    return tuple(row[len(row) - right :] + row[: len(row) - right] for row in grid)


def _state(rng: RandomState | None) -> RandomState:
    if rng is None:
        raise ValueError("this augmenter draws: it needs an rng")
    return rng


def _one_of(name: str, value: int, known: tuple[int, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value}: expected one of {', '.join(map(str, known))}")


# ---- Augmenters ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, repr=False)
class Augmenter:
    """A change to a grid, to both grids of a pair, to all pairs of a puzzle. `rng` is read by those that draw."""

    def grid(self, grid: Grid, rng: RandomState | None = None) -> Grid:
        raise NotImplementedError

    def pair(self, pair: Pair, rng: RandomState | None = None) -> Pair:
        return Pair(self.grid(pair.input, rng), self.grid(pair.output, rng))

    def puzzle(self, puzzle: Puzzle, rng: RandomState | None = None) -> Puzzle:
        *train, test = (self.pair(pair, rng) for pair in puzzle.pairs)
        return Puzzle(puzzle.id, tuple(train), test)

    def inverse(self) -> Augmenter | None:
        """What undoes this on a grid, or None where nothing does."""
        return None

    def __repr__(self) -> str:
        fields = ", ".join(repr(getattr(self, field.name)) for field in dataclasses.fields(self))
        return f"{type(self).__name__}({fields})"


# ---- One grid from one grid ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, repr=False)
class IdentityAugmenter(Augmenter):
    def grid(self, grid: Grid, rng: RandomState | None = None) -> Grid:
        return grid

    def inverse(self) -> Augmenter:
        return self


@dataclasses.dataclass(frozen=True, repr=False)
class Rotate(Augmenter):
    """Turned anticlockwise by 90, 180 or 270 degrees."""

    angle: int

    def __post_init__(self) -> None:
        _one_of("angle", self.angle, (90, 180, 270))

    def grid(self, grid: Grid, rng: RandomState | None = None) -> Grid:
        if self.angle == 180:
            return _flip(_flip(grid, 0), 1)
        return _flip(_transpose(grid), 0) if self.angle == 90 else _transpose(_flip(grid, 0))

    def inverse(self) -> Augmenter:
        return Rotate(360 - self.angle)


@dataclasses.dataclass(frozen=True, repr=False)
class Flip(Augmenter):
    """Mirrored: top and bottom swapped for axis 0, left and right for axis 1."""

    axis: int

    def __post_init__(self) -> None:
        _one_of("axis", self.axis, (0, 1))

    def grid(self, grid: Grid, rng: RandomState | None = None) -> Grid:
        return _flip(grid, self.axis)

    def inverse(self) -> Augmenter:
        return self


@dataclasses.dataclass(frozen=True, repr=False)
class Transpose(Augmenter):
    def grid(self, grid: Grid, rng: RandomState | None = None) -> Grid:
        return _transpose(grid)

    def inverse(self) -> Augmenter:
        return self


@dataclasses.dataclass(frozen=True, repr=False)
class Reflect(Augmenter):
    """The grid and its mirror image, joined along `axis`; the image first if `reverse`."""

    axis: int
    reverse: bool = False

    def __post_init__(self) -> None:
        _one_of("axis", self.axis, (0, 1))

    def grid(self, grid: Grid, rng: RandomState | None = None) -> Grid:
        image = _flip(grid, self.axis)
        return _join((image, grid) if self.reverse else (grid, image), self.axis)

    def __repr__(self) -> str:
        return f"Reflect({self.axis}, reverse={self.reverse})"


@dataclasses.dataclass(frozen=True, repr=False)
class Repeat(Augmenter):
    """`n` copies joined along axis 0 or 1; for axis 2, n by n of them."""

    axis: int
    n: int

    def __post_init__(self) -> None:
        _one_of("axis", self.axis, (0, 1, 2))

    def grid(self, grid: Grid, rng: RandomState | None = None) -> Grid:
        if self.axis == 2:
            return _join((_join((grid,) * self.n, 0),) * self.n, 1)
        return _join((grid,) * self.n, self.axis)


@dataclasses.dataclass(frozen=True, repr=False)
class IncreaseHeight(Augmenter):
    """Each row `factor` times."""

    factor: int

    def grid(self, grid: Grid, rng: RandomState | None = None) -> Grid:
        return tuple(row for row in grid for _ in range(self.factor))


@dataclasses.dataclass(frozen=True, repr=False)
class IncreaseWidth(Augmenter):
    """Each cell of a row `factor` times."""

    factor: int

    def grid(self, grid: Grid, rng: RandomState | None = None) -> Grid:
        return tuple([tuple([cell for cell in row for _ in range(self.factor)]) for row in grid])


@dataclasses.dataclass(frozen=True, repr=False)
class IncreaseResolution(Augmenter):
    """Each cell a square of `factor` by `factor`."""

    factor: int

    def grid(self, grid: Grid, rng: RandomState | None = None) -> Grid:
        return IncreaseHeight(self.factor).grid(IncreaseWidth(self.factor).grid(grid))


@dataclasses.dataclass(frozen=True, repr=False)
class MapColors(Augmenter):
    """Each colour replaced by another, as `pairs` of (colour, new colour) say; the others stay."""

    pairs: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, colors: Mapping[int, int]) -> MapColors:
        return cls(tuple(colors.items()))

    def grid(self, grid: Grid, rng: RandomState | None = None) -> Grid:
        colors = dict(self.pairs)
        return tuple([tuple([colors.get(cell, cell) for cell in row]) for row in grid])  # lists: quicker, and this runs most

    def inverse(self) -> Augmenter:
        return MapColors(tuple((new, old) for old, new in self.pairs))


# ---- Drawn --------------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, repr=False)
class RandomTranslateXY(Augmenter):
    """Rolled down and to the right, by 0 to 3 cells each.

    In a puzzle the shifts are drawn anew for each pair from the same state, and the caller's state stays as it is. So all pairs of grids
    of one size shift alike, but the output of a pair, which is drawn after its input, shifts otherwise than that. This is the original's.
    """

    def grid(self, grid: Grid, rng: RandomState | None = None) -> Grid:
        down = _state(rng).randint(0, min(4, len(grid)))
        right = _state(rng).randint(0, min(4, len(grid[0])))
        return _roll(grid, down, right)

    def puzzle(self, puzzle: Puzzle, rng: RandomState | None = None) -> Puzzle:
        rng = _state(rng)
        start, pairs = rng.get_state(), []
        for pair in puzzle.pairs:
            pairs.append(self.pair(pair, rng))
            rng.set_state(start)
        return Puzzle(puzzle.id, tuple(pairs[:-1]), pairs[-1])


@dataclasses.dataclass(frozen=True, repr=False)
class RandomTranslateX(RandomTranslateXY):
    """Rolled down by 1 to 3 cells; `ValueError` for a grid of one row."""

    def grid(self, grid: Grid, rng: RandomState | None = None) -> Grid:
        return _roll(grid, _state(rng).randint(1, min(4, len(grid))), 0)


@dataclasses.dataclass(frozen=True, repr=False)
class RandomTranslateY(RandomTranslateXY):
    """Rolled to the right by 1 to 3 cells; `ValueError` for a grid of one column."""

    def grid(self, grid: Grid, rng: RandomState | None = None) -> Grid:
        return _roll(grid, 0, _state(rng).randint(1, min(4, len(grid[0]))))


@dataclasses.dataclass(frozen=True, repr=False)
class PermuteColors(Augmenter):
    """Other colours for the puzzle's: those that it does not use, as long as there are any, then swaps among its own. 0 stays."""

    def draw(self, puzzle: Puzzle, rng: RandomState) -> MapColors:
        """The colours that `puzzle` draws."""
        # Sets, because the original's draws follow their order. It is the same in every run, as integers are their own hash.
        used = {cell for pair in puzzle.pairs for g in (pair.input, pair.output) for row in g for cell in row} - {0}
        unused = list(set(range(1, 10)) - used)
        rng.shuffle(unused)
        own = rng.permutation(list(used)).tolist()
        colors = {0: 0}
        for color in used:
            if color in colors:
                continue
            if unused:
                colors[color] = unused.pop()
                continue
            other = own.pop()
            if color in own:
                own.remove(color)
            colors[other] = color
            colors[color] = other
        return MapColors.of(colors)

    def puzzle(self, puzzle: Puzzle, rng: RandomState | None = None) -> Puzzle:
        return self.draw(puzzle, _state(rng)).puzzle(puzzle)


@dataclasses.dataclass(frozen=True, repr=False)
class PermuteExamples(Augmenter):
    """The training pairs in another order."""

    def puzzle(self, puzzle: Puzzle, rng: RandomState | None = None) -> Puzzle:
        order = _state(rng).permutation(len(puzzle.train))
        return dataclasses.replace(puzzle, train=tuple(puzzle.train[i] for i in order))


# ---- Composed -----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, repr=False)
class Chain(Augmenter):
    """One after the other."""

    augmenters: tuple[Augmenter, ...]

    def grid(self, grid: Grid, rng: RandomState | None = None) -> Grid:
        for augmenter in self.augmenters:
            grid = augmenter.grid(grid, rng)
        return grid

    def puzzle(self, puzzle: Puzzle, rng: RandomState | None = None) -> Puzzle:
        for augmenter in self.augmenters:
            puzzle = augmenter.puzzle(puzzle, rng)
        return puzzle

    def __repr__(self) -> str:
        return f"Chain({list(self.augmenters)})"


@dataclasses.dataclass(frozen=True, repr=False)
class Concat(Augmenter):
    """What each makes of the grid, joined along `axis`."""

    augmenters: tuple[Augmenter, ...]
    axis: int = 0

    def grid(self, grid: Grid, rng: RandomState | None = None) -> Grid:
        return _join(tuple(augmenter.grid(grid, rng) for augmenter in self.augmenters), self.axis)

    def __repr__(self) -> str:
        return f"Concat({self.augmenters}, axis={self.axis})"


# ---- What a self-edit chooses from --------------------------------------------------------------------------------------------------

_TURNS = (Rotate(90), Rotate(270), Rotate(180), Flip(0), Flip(1))
_MIRRORS = (Reflect(0, True), Reflect(1, True), Reflect(0, False), Reflect(1, False))

BASIC = (*_TURNS, *_MIRRORS, RandomTranslateXY(), Transpose())
SIZE = (IncreaseResolution(2), IncreaseHeight(2), IncreaseWidth(2))
CONCAT = (Concat((IdentityAugmenter(), Rotate(180)), 0), Concat((IdentityAugmenter(), Rotate(180)), 1))
CHAIN = tuple(Chain((turn, IncreaseResolution(2))) for turn in (*_TURNS, Transpose()))
REPEAT = (Repeat(0, 2), Repeat(1, 2), Repeat(2, 2))


def chosen(basic: bool = True, size: bool = True, chain: bool = True, repeat: bool = True, concat: bool = False) -> tuple[Augmenter, ...]:
    """The augmenters of the groups that are on, in the original's order. No self-edit can ask for `concat`."""
    groups = ((basic, BASIC), (size, SIZE), (concat, CONCAT), (chain, CHAIN), (repeat, REPEAT))
    return tuple(augmenter for on, group in groups if on for augmenter in group)
