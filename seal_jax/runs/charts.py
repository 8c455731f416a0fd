"""The report's charts: matplotlib figures as inline SVG, coloured by the page's CSS variables so that light and dark mode both fit."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from seal_jax.words import counted

# Stand-ins that are swapped for the page's colours in the finished SVG.
INK, MUTED, GRID, PAPER, MAIN, SECOND = "#010203", "#010204", "#010205", "#010206", "#010207", "#010208"
_COLOURS = {INK: "--ink", MUTED: "--muted", GRID: "--line", PAPER: "--paper", MAIN: "--main", SECOND: "--second"}
_PALETTE = (  # the page's (report.html.j2)
    "svg { --paper: #fff; --ink: #1b1f24; --muted: #5d6670; --line: #d9dee3; --main: #1f5fa8; --second: #b4530b; background: var(--paper); "
    "font-family: system-ui, sans-serif; } @media (prefers-color-scheme: dark) { svg { --paper: #15181c; --ink: #e4e7ea; --muted: #9aa4ae; "
    "--line: #363d45; --main: #7db4f2; --second: #f0a15c; } }"
)
STYLE = {
    "svg.fonttype": "none",  # text stays text: the page's font, selectable
    "svg.hashsalt": "seal_jax",  # equal runs, equal reports
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "mathtext.default": "regular",
}
MOST_CONTEXTS = 100  # shown in one panel of `reward_spread`


def standalone(figure: Figure, label: str) -> bytes:
    """The figure as an SVG file, which has the page's colours and font with it."""
    text = str(_svg(figure, label)).replace(">", f"><style>{_PALETTE}</style>", 1)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'.encode()


def _svg(figure: Figure, label: str) -> Markup:
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    for stand_in, variable in _COLOURS.items():
        text = text.replace(stand_in, f"var({variable})")
    text = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", text)  # "px" here are the figure's points
    text = re.sub(r"font-family: [^;\"]+;? ?", "", text)
    used = set(re.findall(r"(?:#|url\(#)([\w-]+)", text))
    text = re.sub(r' id="([\w-]+)"', lambda found: found[0] if found[1] in used else "", text)  # several charts share one page
    text = re.sub(
        r'^<svg [^>]*?viewBox="([^"]+)"[^>]*>',
        lambda found: f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{found[1]}" role="img" aria-label="{escape(label)}">',
        text,
        count=1,
    )
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)  # the style would hold for the whole page
    return Markup(text.replace("xlink:href", "href"))


def reward_by_round(rounds: Sequence[Mapping[str, Any]]) -> Markup:
    """`rounds`: {"round", "unadapted", "mean", "best"}, the last three (value, low, high) in [0, 1] or None; low and high may be None."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.0), layout="constrained")
        axes = figure.subplots()
        series = (
            ("best", "best of K", SECOND, "s", 0.07),
            ("mean", "mean of K", MAIN, "o", 0.0),
            ("unadapted", "no adaptation", MUTED, "D", -0.07),
        )
        for key, label, colour, marker, shift in series:
            known = [(r["round"] + shift, *(r[key][0] if v is None else v for v in r[key])) for r in rounds if r[key] is not None]
            if not known:
                continue
            x, y, low, high = np.array(known).T
            axes.errorbar(
                x, y, [y - low, high - y], color=colour, marker=marker, markersize=6, linewidth=1.6, elinewidth=1.2, capsize=4, label=label
            )
        numbers = [r["round"] for r in rounds]
        axes.set_xlim(min(numbers) - 0.5, max(numbers) + 0.5)
        axes.set_xticks(numbers if len(numbers) <= 20 else axes.get_xticks(), [str(n) for n in numbers] if len(numbers) <= 20 else None)
        axes.set_xlabel("round")
        reward_axis(axes, max(v for r in rounds for key in ("best", "mean", "unadapted") for v in r[key] or () if v is not None))
        figure.legend(loc="outside right upper")
        return _svg(figure, "Reward by round: mean and best of K self-edits and no adaptation, with 95% intervals")


def reward_spread(panels: Sequence[Mapping[str, Any]]) -> Markup:
    """One panel a round. `panels`: {"title", "contexts": [{"unadapted": float | None, "rewards": [float], "kept": [float]}]}.

    Contexts stand side by side in order of their mean reward. A panel of more than `MOST_CONTEXTS` shows evenly spaced ones of them.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 2.5 * len(panels) + 0.5), layout="constrained")  # inches; 620 points of it are for the contexts
        for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
            _spread(axes, panel)
        handles: dict[str, Any] = {}
        for axes in figure.axes:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        figure.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=3)
        return _svg(figure, "Reward of each self-edit, by context")


def _spread(axes: Axes, panel: Mapping[str, Any]) -> None:
    contexts = sorted(panel["contexts"], key=lambda c: (np.mean(c["rewards"]) if c["rewards"] else -1.0, c["unadapted"] or 0.0))
    total = len(contexts)
    if total > MOST_CONTEXTS:
        contexts = [contexts[i] for i in np.linspace(0, total - 1, MOST_CONTEXTS).round().astype(int)]
    size = float(np.clip(900 / len(contexts), 9, 32))  # square points
    beside = 1.2 * size**0.5 * max(len(contexts), 8) / 620  # a marker's width and some air, in contexts
    plain, kept, marks = [], [], []
    for x, context in enumerate(contexts):
        left = list(context["kept"])
        for value in sorted(set(context["rewards"])):  # equal rewards stand side by side
            same = context["rewards"].count(value)
            step = min(beside, 0.8 / same)
            for i in range(same):
                is_kept = value in left
                if is_kept:
                    left.remove(value)
                (kept if is_kept else plain).append((x + (i - (same - 1) / 2) * step, value))
        if context["unadapted"] is not None:
            marks.append((x, context["unadapted"]))
    if marks:
        x, y = np.array(marks).T
        axes.hlines(y, x - 0.4, x + 0.4, color=MUTED, linewidth=1.6, label="no adaptation")
    for points, style, label in (
        (plain, {"facecolors": "none", "edgecolors": MAIN, "linewidths": 1.2}, "self-edit"),
        (kept, {"color": SECOND, "linewidths": 1.2}, "self-edit kept for the M-step"),
    ):
        if points:
            axes.scatter(*np.array(points).T, s=size, label=label, clip_on=False, zorder=3, **style)
    shown = counted(total, "context") if total == len(contexts) else f"{len(contexts)} of {total} contexts, evenly spaced"
    axes.set_title(panel["title"], loc="left", fontsize=10, fontweight="bold", color=INK)
    axes.set_xlabel(f"{shown}, in order of mean reward")
    axes.set_xticks([])
    axes.set_xlim(-0.8, max(len(contexts), 8) - 0.2)
    reward_axis(axes, 1.0)


def losses(series: Sequence[tuple[str, Sequence[float | None]]]) -> Markup:
    """M-step losses, a line a round. `series`: (label, loss by step; None where it was not finite)."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.8), layout="constrained")
        axes = figure.subplots()
        for i, (label, values) in enumerate(series):
            y = np.array([np.nan if v is None else v for v in values])
            alpha = 1.0 if len(series) == 1 else 0.35 + 0.65 * i / (len(series) - 1)  # later rounds stand out
            axes.plot(
                1 + np.arange(len(y)),
                y,
                color=MAIN,
                alpha=alpha,
                linewidth=1.6,
                marker="o",
                markersize=4 if len(y) <= 40 else 0,
                label=label,
            )
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("loss (nats a token)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        figure.legend(loc="outside right upper")
        return _svg(figure, "M-step loss by step, a line a round")


def reward_axis(axes: Axes, top: float) -> None:
    top = min(1.0, max(0.1, top * 1.1))
    axes.set_ylim(-0.02 * top, top * 1.02)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.set_ylabel("reward")
