"""The result table as text. `table` is the content of a run's table.json:

{"rows": [{"method", "policy", "statistic", "contexts", "questions", "mean", "low", "high", "gain", "gain_low", "gain_high", "ungraded"}],
 "notes": [text]}, with accuracies and gains in [-1, 1] and null for what there is not; with "kind": "continual" what
 `seal_jax.experiments.continual_table.table` says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

GAIN = "gain over no adaptation"
COUNTS = {"refused": "refused", "scaled": "scaled down", "unusable": "unusable", "ungraded": "ungraded"}  # shown where any is not 0

Column = tuple[str, str, list[str]]  # head, alignment ("<" or ">"), a cell a row


def percent(value: float | None, sign: bool = False) -> str:
    """0.112 as "11.2"; an en dash for None."""
    if value is None:
        return "–"
    text = f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}"
    return {"-0.0": "0.0", "+0.0": "0.0"}.get(text, text)


def figure(value: float | None) -> str:
    """A perplexity."""
    return "–" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1e6 else f"{value:.1e}"


def interval(low: float | None, high: float | None, sign: bool = False) -> str:
    """ "[5.0, 20.0]"; empty if there is none."""
    return bracket(low, high, functools.partial(percent, sign=sign))


def bracket(low: float | None, high: float | None, show: Callable[[float | None], str] = figure) -> str:
    """An interval of numbers as `show` writes them; empty if there is none."""
    return "" if low is None or high is None else f"[{show(low)}, {show(high)}]"


def format_table(table: Mapping[str, Any]) -> str:
    """The table for a terminal: aligned plain text, accuracy in percent with its 95% interval in brackets, then the notes."""
    rows = table.get("rows", [])
    if not rows:
        return "no results yet"
    return aligned(_continual(rows, table["reference"]) if table.get("kind") == "continual" else _accuracies(rows), table.get("notes", []))


def aligned(columns: Sequence[Column], notes: Sequence[str] = ()) -> str:
    """Columns of equally many cells as plain text, each as wide as it needs, with the notes below."""
    widths = [max(len(head), *map(len, cells)) for head, _, cells in columns]
    lines = [_line([head for head, _, _ in columns], columns, widths), "  ".join("-" * width for width in widths)]
    lines += [_line(row, columns, widths) for row in zip(*(cells for _, _, cells in columns), strict=True)]
    return "\n".join([*lines, *(f"  {note}" for note in notes)])


def _accuracies(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    columns = [
        ("method", "<", [row["method"] for row in rows]),
        ("policy", "<", [row["policy"] for row in rows]),
        ("statistic", "<", [row["statistic"] for row in rows]),
        ("contexts", ">", [str(row["contexts"]) for row in rows]),
        ("questions", ">", [str(row["questions"]) for row in rows]),
        ("accuracy %", ">", estimates([(row.get("mean"), row.get("low"), row.get("high")) for row in rows], percent)),
    ]
    if any(row.get("gain") is not None for row in rows):
        gains = [(row.get("gain"), row.get("gain_low"), row.get("gain_high")) for row in rows]
        columns.append((GAIN, ">", estimates(gains, signed)))
    return columns + _counts(rows, ["ungraded"])


def _continual(rows: Sequence[Mapping[str, Any]], reference: str) -> list[Column]:
    columns = [(what, "<" if what == "method" else ">", [str(row[what]) for row in rows]) for what in ("method", "sequences", "passages")]
    for head, what, show in continual_columns(rows, reference):
        columns.append((head, ">", estimates([row[what] or (None, None, None) for row in rows], show)))
    return columns + _counts(rows, COUNTS)


def continual_columns(rows: Sequence[Mapping[str, Any]], reference: str) -> list[tuple[str, str, Callable[[float | None], str]]]:
    """(head, key, writer of a number) of the columns of estimates in a continual table; those that say nothing are left out."""
    columns = [
        ("newest %", "newest", percent),
        ("earlier %", "earlier", percent),
        ("backward", "backward", signed),
        ("perplexity", "perplexity", figure),
        (f"newest, to {reference}", "newest_difference", signed),
        (f"earlier, to {reference}", "earlier_difference", signed),
    ]
    return [column for column in columns if any(row[column[1]] for row in rows)]


def signed(value: float | None) -> str:
    return percent(value, sign=True)


def _counts(rows: Sequence[Mapping[str, Any]], keys: Iterable[str]) -> list[Column]:
    return [(COUNTS[key], ">", [str(row[key]) for row in rows]) for key in keys if any(row.get(key) for row in rows)]


def estimates(found: Sequence[Sequence[float | None]], show: Callable[[float | None], str]) -> list[str]:
    """A cell an estimate (mean, low, high), the figures and the brackets each below one another."""
    brackets = [bracket(low, high, show) for _, low, high in found]
    width = max(map(len, brackets))
    return [f"{show(mean)} {text:>{width}}" if width else show(mean) for (mean, _, _), text in zip(found, brackets, strict=True)]


def _line(cells: Sequence[str], columns: Sequence[Column], widths: Sequence[int]) -> str:
    return "  ".join(f"{cell:{align}{width}}" for cell, (_, align, _), width in zip(cells, columns, widths, strict=True)).rstrip()
