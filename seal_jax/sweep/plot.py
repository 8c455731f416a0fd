"""The plot of a sweep: what each key does to the accuracy, and how the rewards of trials grow from round to round. An SVG file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from seal_jax.runs import charts
from seal_jax.sweep import space as space_lib
from seal_jax.sweep.space import Choices, Range, Space

WIDE = 3  # panels side by side


def draw(name: str, rows: Sequence[dict[str, Any]], space: Space) -> bytes:
    """The plot of the rows of a sweep's table: a panel a key, each trial a point with its interval; best trial in the second colour."""
    known = [row for row in rows if row["result"] is not None and row["result"]["mean"] is not None]
    rounds = [row for row in rows if any(r is not None for r in row["rewards"])]
    panels = len(space) * bool(known) + bool(rounds)
    with matplotlib.rc_context(charts.STYLE | {"text.parse_math": False}):  # a value may look like mathematics
        columns = min(WIDE, max(panels, 1))
        lines = -(-max(panels, 1) // columns)
        figure = Figure(figsize=(3.4 * columns + 0.4, 2.9 * lines + 0.3), layout="constrained")
        axes = list(figure.subplots(lines, columns, squeeze=False).flat)
        for spare in axes[max(panels, 1) :]:
            spare.set_axis_off()
        if not panels:
            axes[0].set_axis_off()
            axes[0].text(0.5, 0.5, "nothing measured yet", ha="center", color=charts.MUTED)
        if known:
            for place, (key, dimension) in zip(axes, space.items(), strict=False):
                _key(place, key, dimension, known)
        if rounds:
            _rounds(axes[panels - 1], rounds)
        return charts.standalone(figure, f"Sweep {name}: accuracy by setting")


def _key(axes: Axes, key: str, dimension: Choices | Range, rows: Sequence[dict[str, Any]]) -> None:
    """Accuracy by one key. Numbers stand where they are; other values, and those of a list, side by side."""
    values = [row["settings"][key] for row in rows]
    if isinstance(dimension, Range):
        places = [float(value) for value in values]
        axes.set_xscale("log" if dimension.log else "linear")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=5) if dimension.log else MaxNLocator(4))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        choices = [re.sub(r"[\x00-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", space_lib.shown(value)) for value in dimension.values]
        of_choice = [[row for row in rows if row["settings"][key] == value] for value in dimension.values]
        places = []
        for row in rows:  # those of one value beside each other
            index = dimension.values.index(row["settings"][key])
            same = of_choice[index]
            places.append(index + 0.6 * ((same.index(row) + 0.5) / len(same) - 0.5))
        axes.set_xticks(range(len(choices)), [text if len(text) < 14 else f"{text[:12]}…" for text in choices])
        axes.set_xlim(-0.6, len(choices) - 0.4)
    for number, (place, row) in reversed(list(enumerate(zip(places, rows, strict=True)))):
        found, colour = row["result"], charts.SECOND if number == 0 else charts.MAIN
        spread = None if found["low"] is None else [[found["mean"] - found["low"]], [found["high"] - found["mean"]]]
        axes.errorbar([place], [found["mean"]], spread, color=colour, marker="o", markersize=5, elinewidth=1.0, capsize=2)
    axes.set_title(key, loc="left", fontsize=10, fontweight="bold", color=charts.INK)
    charts.reward_axis(axes, max(row["result"]["high"] or row["result"]["mean"] for row in rows))
    axes.set_ylabel("accuracy")


def _rounds(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Reward by round, a line a trial."""
    for number, row in reversed(list(enumerate(rows))):
        y = [float("nan") if r is None else r for r in row["rewards"]]
        colour = charts.SECOND if number == 0 else charts.MAIN
        axes.plot(range(1, len(y) + 1), y, color=colour, alpha=1.0 if number == 0 else 0.6, marker="o", markersize=4, linewidth=1.4)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("reward by round", loc="left", fontsize=10, fontweight="bold", color=charts.INK)
    charts.reward_axis(axes, max(r for row in rows for r in row["rewards"] if r is not None))
