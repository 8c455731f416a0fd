"""What the report shows of a continual run: its table, a matrix a method, what each edit did, and examples. Host code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from seal_jax.runs import matrix
from seal_jax.runs import table as text

METHODS = 6  # examples: the first methods


def view(start: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], table: Mapping[str, Any] | None) -> dict[str, Any]:
    """What `continual.html.j2` shows, from the units of the run that there are by now."""
    steps = sorted(steps, key=lambda step: step["step"])
    matrices = table["matrices"] if table else matrix.shown(matrix.from_records(start, steps))
    titles = {context["id"]: context["title"] for context in start["contexts"]}
    lanes: dict[str, list[dict[str, Any]]] = {}
    for step in steps:
        for lane in sorted(step["lanes"], key=lambda lane: lane["sequence"]):
            shown = {**lane, "step": step["step"], "title": titles[lane["context"]]}
            new = lane["context"]
            shown |= {"before": start["answers"][new]["reward"], "after": lane["answers"][new]["reward"]}
            lanes.setdefault(lane["method"], []).append(shown)
    return {
        "passages": len(start["sequences"][0]),
        "sequences": len(start["sequences"]),
        "steps": len(steps),
        "table": _table(table) if table else None,
        "matrices": [_matrix(method, values["mean"], values["std"]) for method, values in matrices.items()],
        "lanes": lanes,
        "examples": [_example(start, found) for found in list(lanes.values())[:METHODS]],
    }


def _table(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table's heads and cells as text; an estimate is (mean, interval)."""
    rows = table["rows"]
    columns = text.continual_columns(rows, table["reference"])
    counts = {key: head for key, head in text.COUNTS.items() if any(row[key] for row in rows)}

    def cell(estimate: Sequence[float | None] | None, show: Any) -> tuple[str, str]:
        mean, low, high = estimate or (None, None, None)
        return show(mean), text.bracket(low, high, show)

    return {
        "heads": ["sequences × passages", *(head for head, _, _ in columns), *counts.values()],
        "rows": [
            {
                "method": row["method"],
                "cells": [
                    (f"{row['sequences']} × {row['passages']}", ""),
                    *(cell(row[key], show) for _, key, show in columns),
                    *((str(row[key]), "") for key in counts),
                ],
            }
            for row in rows
        ],
        "notes": table["notes"],
    }


def _matrix(method: str, mean: Sequence[Sequence[float | None]], std: Sequence[Sequence[float | None]]) -> dict[str, Any]:
    """Rows of (mean, std) as far as anything is known; None above the diagonal."""
    rows = []
    for t, (means, stds) in enumerate(zip(mean, std, strict=True)):
        if any(m is not None for m in means):
            rows.append((t, [(m, s) if t == 0 or i < t else None for i, (m, s) in enumerate(zip(means, stds, strict=True))]))
    return {"method": method, "length": len(mean[0]), "rows": rows, "spread": any(s for stds in std for s in stds)}


def _example(start: Mapping[str, Any], lanes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first sequence at its last step, whatever came out: its edit, and the answers on its newest and on its first passage.

    An answer is asked for three times: of the base policy, right after the passage's own edit, and now.
    """
    first = min(lane["sequence"] for lane in lanes)
    steps = [lane for lane in lanes if lane["sequence"] == first]
    last = steps[-1]
    contexts = {context["id"]: context for context in start["contexts"]}
    asked = [("The newest passage", last)]
    if steps[0]["step"] == 0 and last["step"] > 0:
        asked.append(("The first passage of the sequence", steps[0]))
    return {
        "lane": last,
        "passages": [
            {
                "head": head,
                "title": contexts[own["context"]]["title"],
                "passage": contexts[own["context"]].get("passage"),
                "questions": contexts[own["context"]]["questions"],
                "base": start["answers"][own["context"]],
                "own": own["answers"][own["context"]],
                "now": last["answers"][own["context"]],
            }
            for head, own in asked
        ],
    }
