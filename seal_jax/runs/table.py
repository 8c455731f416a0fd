"""The result table as text. `table` is the content of a run's table.json:

{"rows": [{"method", "policy", "statistic", "contexts", "questions", "mean", "low", "high", "gain", "gain_low", "gain_high", "ungraded"}],
 "notes": [text]}, with accuracies and gains in [-1, 1] and null for what there is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

GAIN = "gain over no adaptation"


def percent(value: float | None, sign: bool = False) -> str:
    """0.112 as "11.2"; an en dash for None."""
    if value is None:
        return "–"
    text = f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}"
    return {"-0.0": "0.0", "+0.0": "0.0"}.get(text, text)


def interval(low: float | None, high: float | None, sign: bool = False) -> str:
    """ "[5.0, 20.0]"; empty if there is none."""
    return "" if low is None or high is None else f"[{percent(low, sign)}, {percent(high, sign)}]"


def format_table(table: Mapping[str, Any]) -> str:
    """The table for a terminal: aligned plain text, accuracy in percent with its 95% interval in brackets, then the notes."""
    rows = table.get("rows", [])
    if not rows:
        return "no results yet"
    columns: list[tuple[str, str, list[str]]] = [
        ("method", "<", [row["method"] for row in rows]),
        ("policy", "<", [row["policy"] for row in rows]),
        ("statistic", "<", [row["statistic"] for row in rows]),
        ("contexts", ">", [str(row["contexts"]) for row in rows]),
        ("questions", ">", [str(row["questions"]) for row in rows]),
        ("accuracy %", ">", _with_intervals(rows, "mean", "low", "high")),
    ]
    if any(row.get("gain") is not None for row in rows):
        columns.append((GAIN, ">", _with_intervals(rows, "gain", "gain_low", "gain_high")))
    if any(row.get("ungraded") for row in rows):
        columns.append(("ungraded", ">", [str(row["ungraded"]) for row in rows]))
    widths = [max(len(head), *map(len, cells)) for head, _, cells in columns]
    lines = [_line([head for head, _, _ in columns], columns, widths), "  ".join("-" * width for width in widths)]
    lines += [_line([cells[i] for _, _, cells in columns], columns, widths) for i in range(len(rows))]
    return "\n".join([*lines, *(f"  {note}" for note in table.get("notes", []))])


def _with_intervals(rows: Sequence[Mapping[str, Any]], mean: str, low: str, high: str) -> list[str]:
    """A cell a row, the figures and the brackets each below one another."""
    sign = mean == "gain"
    brackets = [interval(row.get(low), row.get(high), sign) for row in rows]
    width = max(map(len, brackets))
    return [
        f"{percent(row.get(mean), sign)} {bracket:>{width}}" if width else percent(row.get(mean), sign)
        for row, bracket in zip(rows, brackets, strict=True)
    ]


def _line(cells: Sequence[str], columns: Sequence[tuple[str, str, list[str]]], widths: Sequence[int]) -> str:
    return "  ".join(f"{cell:{align}{width}}" for cell, (_, align, _), width in zip(cells, columns, widths, strict=True)).rstrip()
