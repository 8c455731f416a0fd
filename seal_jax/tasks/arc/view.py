"""How ARC is shown: grids as pictures in the customary ten colours, and the rows of the result table by the paper's words.

Grids are written as text for it (in `Score.answers` and the like): rows joined by "/", a digit a cell; pairs as "input>output", joined by
";" with the test pair last. What a model wrote may hold other numbers than colours: such a cell is "?".
"""

from __future__ import annotations

import re

from seal_jax.tasks.arc.grids import Grid, Pair, Puzzle
from seal_jax.tasks.base import View

COLORS = ("#000000", "#0074d9", "#ff4136", "#2ecc40", "#ffdc00", "#aaaaaa", "#f012be", "#ff851b", "#7fdbff", "#870c25")
UNKNOWN = "#ffffff"  # what is no colour
CELL = 16  # pixels, at most
SIDE = 176  # pixels of a grid, at most
GRID = r"[0-9?/]*"


def grid_code(grid: Grid) -> str:
    """A grid as text."""
    return "/".join("".join(str(cell) if 0 <= cell <= 9 else "?" for cell in row) for row in grid)


def pair_code(pair: Pair) -> str:
    return f"{grid_code(pair.input)}>{grid_code(pair.output)}"


def puzzle_code(puzzle: Puzzle) -> str:
    """A puzzle as text, with the answer to its test pair."""
    return ";".join(map(pair_code, puzzle.pairs))


def html(kind: str, text: str) -> str | None:
    """The picture of a text of grids; None for any other text."""
    if kind in ("question", "reference", "answer") and re.fullmatch(f"{GRID}( {GRID})?", text):
        return _row([picture(code) for code in text.split(" ")])
    if kind in ("context", "sequence") and re.fullmatch(f"{GRID}>{GRID}(;{GRID}>{GRID})*", text):
        return "".join(_row([picture(code) for code in pair.split(">")], "→") for pair in text.split(";"))
    return None


def picture(code: str) -> str:
    """A grid's text as an SVG picture, which says the text to those who do not see it. Nothing but digits, "?" and "/" may be in it."""
    rows = code.split("/")
    height, width = len(rows), max(map(len, rows))
    if not width:
        return '<span class="muted">(no grid)</span>'
    cells: dict[str, list[str]] = {}
    for y, row in enumerate(rows):
        for x, cell in enumerate(row):
            cells.setdefault(cell, []).append(f"M{x} {y}h1v1h-1z")
    paths = "".join(f'<path fill="{COLORS[int(c)] if c != "?" else UNKNOWN}" d="{"".join(at)}"/>' for c, at in sorted(cells.items()))
    lines = "".join(f"M0 {y}h{width}" for y in range(height + 1)) + "".join(f"M{x} 0v{height}" for x in range(width + 1))
    cell = min(CELL, SIDE / max(width, height))
    return (
        f'<svg role="img" aria-label="grid {code}" width="{width * cell:.0f}" height="{height * cell:.0f}" '
        f'viewBox="-0.04 -0.04 {width + 0.08} {height + 0.08}">{paths}'
        f'<path fill="none" stroke="#777777" stroke-width="0.08" d="{lines}"/></svg>'
    )


def _row(pictures: list[str], between: str = " ") -> str:
    return f'<div class="pictures">{f" {between} ".join(pictures)}</div>'


VIEW = View({"no adaptation": "no adaptation, in context", "passage + self-edit": "TTT, self-edit"}, "Pairs", html)
