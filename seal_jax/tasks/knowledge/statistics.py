"""The original's statistics over recorded verdicts (`query_server.py`, `main`), number for number.

Accuracies are rounded to four places before they are averaged, because its TTT server sends them so; deviations are sample deviations
over the unrounded means of the level below, and 0 for a single value.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from seal_jax.errors import SealError

Verdicts = Sequence[bool | None]  # one a question; None is "ungraded" and left out


def aggregate(verdicts: Sequence[Sequence[Sequence[tuple[Verdicts, Verdicts]]]]) -> dict[str, Any]:
    """The reported means and deviations of `verdicts[article][completion][rep] = (baseline, adapter)`.

    Returns {"completions": [article][completion] -> dict, "articles": [article] -> dict, "overall": dict}; completions are unrounded,
    the other two are rounded to four places. Raises `SealError` if a level is empty or a rep has no graded question.
    """
    completions = [[_completion(reps) for reps in article] for article in verdicts]
    means = [_article(article) for article in completions]
    baseline = [m["baseline_accuracy"] for m in means]
    adapter = [m["adapter_mean_accuracy"] for m in means]
    overall = {
        "baseline_mean_accuracy": _mean(baseline),
        "baseline_std_of_article_means": _deviation(baseline),
        "adapter_mean_accuracy": _mean(adapter),
        "adapter_std_of_article_means": _deviation(adapter),
        "mean_adapter_std_over_completions": _mean([m["adapter_std_over_completions"] for m in means]),
        "mean_adapter_std_within_completions": _mean([c["adapter_std"] for article in completions for c in article]),
        "mean_gain": _mean(adapter) - _mean(baseline),
    }
    return {"completions": completions, "articles": [_rounded(m) for m in means], "overall": _rounded(overall)}


def _completion(reps: Sequence[tuple[Verdicts, Verdicts]]) -> dict[str, float]:
    accuracies = [(_accuracy(baseline), _accuracy(adapter)) for baseline, adapter in reps]
    baseline = [round(b, 4) for b, _ in accuracies]
    adapter = [round(a, 4) for _, a in accuracies]
    return {
        "baseline_mean": _mean(baseline),
        "baseline_std": _deviation(baseline),
        "adapter_mean": _mean(adapter),
        "adapter_std": _deviation(adapter),
        "gain_mean": _mean([round(a - b, 4) for b, a in accuracies]),
    }


def _article(completions: Sequence[dict[str, float]]) -> dict[str, float]:
    adapter = [c["adapter_mean"] for c in completions]
    return {
        "baseline_accuracy": _mean([c["baseline_mean"] for c in completions]),
        "adapter_mean_accuracy": _mean(adapter),
        "adapter_std_over_completions": _deviation(adapter),
        "mean_adapter_std_within_completions": _mean([c["adapter_std"] for c in completions]),
        "mean_gain": _mean([c["gain_mean"] for c in completions]),
    }


def _accuracy(verdicts: Verdicts) -> float:
    graded = [v for v in verdicts if v is not None]
    if not graded:
        raise SealError("statistics: a repetition has no graded question")
    return sum(graded) / len(graded)


def _mean(values: Sequence[float]) -> float:
    if not values:
        raise SealError("statistics: no verdicts to aggregate")
    return statistics.mean(values)


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _rounded(numbers: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 4) for key, value in numbers.items()}
