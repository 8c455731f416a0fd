"""The continual experiment's result table: how well each method learns new passages and keeps earlier ones. Host code, numpy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from seal_jax.rest_em.table import bootstrap
from seal_jax.runs import matrix

NO_ADAPTATION = "no adaptation"
NOTES = (
    "no adaptation: the policy before any edit, on the same passages",
    "newest: accuracy on each passage right after its own edit, mean over passages",
    "earlier: accuracy at the end on the passages before the last, mean over passages",
    "backward: backward transfer, earlier passages at the end less right after their own edits; below 0 is forgetting",
    "perplexity: of the held general text after the last step, 2^bits with the mean over sequences of the bits a token",
)


def table(
    start: Mapping[str, Any],
    steps: Sequence[Mapping[str, Any]],
    *,
    resamples: int,
    seed: int,
    beside: Sequence[matrix.Summary] = (),
) -> dict[str, Any]:
    """The table of a finished run, from its units "continual/start" and "continual/steps/...", as plain JSON data:

        {"kind": "continual", "reference": the first method, "rows": [row], "notes": [text],
         "matrices": {method: {"mean": [T + 1][T], "std": [T + 1][T]}} with null for what there is not}

    A row has "method", "sequences", "passages", the measures "newest", "earlier", "backward" and "perplexity", "newest_difference" and
    "earlier_difference" to the first method, paired by sequence, each [mean, low, high] or null, and the counts "refused", "scaled",
    "unusable" and "ungraded". Intervals are 95 % percentile bootstrap intervals over sequences; null for fewer than two sequences.
    `beside` are results of the original (`matrix.read_original`), rows without intervals.
    """
    found = matrix.from_records(start, steps)
    reference = next(iter(found))
    passages = len(start["sequences"][0])
    base = found[reference][:, 0]
    # The policy that never changes: each passage at every time as in row 0.
    still = np.where(np.tri(passages + 1, passages, -1, dtype=bool), base[:, None], np.nan)
    last = {(lane["method"], lane["sequence"]): lane["bits"] for lane in steps[-1]["lanes"]}
    notes = []

    def estimate(values: np.ndarray) -> list[float | None] | None:
        known = values[np.isfinite(values)]
        if not len(known):
            return None
        return [float(known.mean()), *(bootstrap(known, resamples, seed) if len(known) > 1 else (None, None))]

    def row(method: str, matrices: np.ndarray, bits: Sequence[float | None]) -> dict[str, Any]:
        known = np.asarray([np.nan if b is None else b for b in bits], np.float64)
        general = estimate(known)
        measures = {"newest": matrix.newest(matrices), "earlier": matrix.earlier(matrices)}
        first = {"newest": matrix.newest(found[reference]), "earlier": matrix.earlier(found[reference])}
        differences = {f"{what}_difference": estimate(values - first[what]) for what, values in measures.items()}
        if method == reference:
            differences = dict.fromkeys(differences)
        return {
            "method": method,
            "sequences": len(matrices),
            "passages": passages,
            **{what: estimate(values) for what, values in measures.items()},
            "backward": None if method == NO_ADAPTATION else estimate(matrix.backward(matrices)),
            "perplexity": general and [None if b is None else _perplexity(b) for b in general],
            **differences,
        }

    rows = [row(NO_ADAPTATION, still, [start["bits"]]) | _counts([], start["answers"].values())]
    for method, matrices in found.items():
        bits = [last.get((method, s)) for s in range(len(matrices))]
        lanes = [lane for step in steps for lane in step["lanes"] if lane["method"] == method]
        rows.append(row(method, matrices, bits) | _counts(lanes, [trial for lane in lanes for trial in lane["answers"].values()]))
        if start["bits"] is not None and (lost := sum(b is None for b in bits)):
            notes.append(f"{method}: the perplexity is not finite in {lost} of {len(bits)} sequences, which are left out of it")
    shown = matrix.shown(found)
    for summary in beside:
        method = _free(f"original: {summary.model or 'model not named'}, {summary.sequences} sequences", shown)
        shown[method] = {"mean": matrix.plain(summary.mean), "std": matrix.plain(summary.std)}
        rows.append(_imported(method, summary))
    said = list(NOTES if start["bits"] is not None else NOTES[:-1])
    if len(found) > 1:
        said.append(f"differences: to {reference}, paired by sequence")
    if any(row["refused"] or row["scaled"] for row in rows):
        said.append("refused, scaled down: edits that the method did not merge at all, or merged with a scale below 1")
    if any(row["unusable"] for row in rows):
        said.append("unusable: self-edits that gave nothing to train on")
    if beside:
        said.append("original: from its own result files, which hold no intervals; its passages and model may be others than this run's")
    said.append(f"in brackets: 95 % bootstrap intervals over sequences, {resamples} resamples")
    return {"kind": "continual", "reference": reference, "rows": rows, "matrices": shown, "notes": [*said, *notes]}


def _perplexity(bits: float) -> float:
    return 2.0 ** min(bits, 1000.0)  # a policy that is broken altogether is told apart from others all the same, and nothing overflows


def _counts(lanes: Sequence[Mapping[str, Any]], trials: Any) -> dict[str, int]:
    usable = [lane["scale"] for lane in lanes if lane["problem"] is None]
    return {
        "refused": sum(scale == 0.0 for scale in usable),
        "scaled": sum(0.0 < scale < 1.0 for scale in usable),
        "unusable": len(lanes) - len(usable),
        "ungraded": sum(verdict is None for trial in trials for verdict in trial["verdicts"]),
    }


def _imported(method: str, summary: matrix.Summary) -> dict[str, Any]:
    """A row of measures of the mean matrix, which are the means over sequences of each sequence's measures."""
    measures = {"newest": matrix.newest, "earlier": matrix.earlier, "backward": matrix.backward}
    values = {what: float(measure(summary.mean)) for what, measure in measures.items()}
    return {
        "method": method,
        "sequences": summary.sequences,
        "passages": summary.mean.shape[1],
        **{what: [value, None, None] if np.isfinite(value) else None for what, value in values.items()},
        **{"perplexity": None, "newest_difference": None, "earlier_difference": None},
        **{"refused": 0, "scaled": 0, "unusable": 0, "ungraded": 0},
    }


def _free(name: str, taken: Mapping[str, Any]) -> str:
    """`name`, or with a number after it if it is taken."""
    tries = [name, *(f"{name} ({n})" for n in range(2, len(taken) + 2))]
    return next(t for t in tries if t not in taken)
