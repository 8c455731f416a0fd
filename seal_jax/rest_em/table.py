"""The result table: accuracies over contexts with bootstrap intervals. Host code, numpy only.

Source: the paper's Table 2, whose figures are means of article means. Added here: best of K chosen on one inner-loop seed and scored on the
others (chosen and scored on the same trial, the best of K noisy rewards looks better than any of the edits is), and 95 % intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from seal_jax import rng
from seal_jax.tasks.base import Figure
from seal_jax.words import counted

EDIT = "passage + self-edit"


def bootstrap(values: np.ndarray, resamples: int, seed: int) -> tuple[float, float] | tuple[None, None]:
    """The 95 % percentile interval of the mean of `values` [n], resampled over contexts with replacement; one alone has none."""
    if len(values) == 1:
        return None, None
    draws = rng.generator(seed, "bootstrap").integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def best_of_k(context: Mapping[str, Any]) -> float | None:
    """The reward of the self-edit that is best on seed 0 (the first of equals), over the other seeds."""
    first = {e["candidate"]: (0.0 if e["problem"] else e["trials"][0]["reward"]) for e in context["edits"]}
    known = [k for k, reward in first.items() if reward is not None]
    if not known:
        return None
    winner = max(known, key=lambda k: first[k])
    edit = next(e for e in context["edits"] if e["candidate"] == winner)
    if edit["problem"]:
        return 0.0
    return _mean([t["reward"] for t in edit["trials"][1:]])


def rows(contexts: Sequence[Mapping[str, Any]], policy: str, seeds: int, edits: int) -> list[dict[str, Any]]:
    """Per context values of every method, as rows without intervals: {"method", "policy", "statistic", "values", "ungraded"}."""
    methods = list(contexts[0]["methods"])
    found = [_row(m, policy, "single", [_mean([t["reward"] for t in c["methods"][m]]) for c in contexts],
                  _ungraded(t for c in contexts for t in c["methods"][m])) for m in methods]  # fmt: skip
    if edits:
        ungraded = _ungraded(t for c in contexts for e in c["edits"] for t in e["trials"])
        found.append(_row(EDIT, policy, "mean of K", [_mean([e["reward"] for e in c["edits"]]) for c in contexts], ungraded))
        if edits > 1 and seeds > 1:  # chosen and scored on one seed, the best of K flatters itself
            found.append(_row(EDIT, policy, "best of K", [best_of_k(c) for c in contexts], ungraded))
    return found


def _row(method: str, policy: str, statistic: str, values: list[float | None], ungraded: int) -> dict[str, Any]:
    return {"method": method, "policy": policy, "statistic": statistic, "values": values, "ungraded": ungraded}


def _trials(context: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """All trials of a context's record."""
    return [t for trials in (*context["methods"].values(), *(e["trials"] for e in context["edits"])) for t in trials]


def _ungraded(trials: Any) -> int:
    return sum(v is None for t in trials for v in t["verdicts"])


def table(
    groups: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    seeds: int,
    edits: int,
    resamples: int,
    seed: int,
    notes: Sequence[str] = (),
    names: Mapping[str, str] | None = None,
    beside: Sequence[Figure] = (),
) -> dict[str, Any]:
    """The table of the evaluations `groups` (policy name -> its contexts' records; all of the same contexts).

    `gain` is over "no adaptation" of the first policy, paired by context. `names` are other words for methods (`tasks.base.View`).
    `beside` was measured elsewhere: its rows come last and have no gain, for want of paired contexts.
    """
    found = [row for policy, contexts in groups.items() if contexts for row in rows(contexts, policy, seeds, edits)]
    first = next(iter(groups.values()))
    reference = found[0]["values"]
    questions = sum(len(c["questions"]) for c in first)
    result = []
    for row in found:
        values = row.pop("values")
        row["method"] = (names or {}).get(row["method"], row["method"])
        _estimate(row, values, questions, resamples, seed)
        paired = np.asarray([v - r for v, r in zip(values, reference, strict=True) if v is not None and r is not None], np.float64)
        if len(paired) and values is not reference:
            row["gain"] = float(paired.mean())
            row["gain_low"], row["gain_high"] = bootstrap(paired, resamples, seed)
        result.append(row)
    for figure in beside:
        row = {"method": (names or {}).get(figure.method, figure.method), "policy": figure.policy, "statistic": figure.statistic}
        row["ungraded"] = figure.ungraded
        _estimate(row, figure.values, figure.questions, resamples, seed)
        result.append(row if figure.values else {**row, "contexts": figure.contexts, "mean": figure.mean})
    said = [
        "accuracy: mean over contexts of the share of questions answered right; "
        f"[95 % bootstrap interval over contexts, {resamples} resamples]"
    ]
    if edits > 1:
        said.append(f"mean of K: over the K = {edits} self-edits of each context; single: rows without self-edits")
    if edits > 1 and seeds > 1:
        said.append(f"best of K: of {edits} self-edits the best on seed 0, scored on the other seeds")
    for method in next(iter(first))["methods"] if first else ():
        if unmade := [c["unmade"][method] for c in first if method in c.get("unmade", {})]:
            said.append(f"{(names or {}).get(method, method)}: without {len(unmade)} of {len(first)} contexts, as of one: {unmade[0]}")
    fits = [t for contexts in groups.values() for c in contexts for t in _trials(c) if t.get("steps")]
    if diverged := sum(t["loss_last"] is None for t in fits):  # of a loss that is no number, a record has none
        said.append(f"{diverged} of {counted(len(fits), 'fit')} diverged, and count as what they then answered; lower fit.learning_rate")
    below = dict.fromkeys(figure.note for figure in beside if figure.note)
    if beside:
        said.append("rows of other files were measured with their own model, contexts and grader, so that they have no gain")
    return {"rows": result, "notes": [*said, *notes, *below]}


def _estimate(row: dict[str, Any], values: Sequence[float | None], questions: int, resamples: int, seed: int) -> None:
    """Fills the row's figures in, but for the gain."""
    known = np.asarray([v for v in values if v is not None], np.float64)
    row.update(contexts=len(known), questions=questions, mean=None, low=None, high=None, gain=None, gain_low=None, gain_high=None)
    if len(known):
        row["mean"] = float(known.mean())
        row["low"], row["high"] = bootstrap(known, resamples, seed)
