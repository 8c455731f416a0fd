"""Means and deviations over recorded verdicts, against what the original reported."""

import pytest

from seal_jax.tasks.knowledge.statistics import aggregate


def flags(bits: str) -> list[bool]:
    return [bit == "1" for bit in bits]


def test_recorded_statistics(golden):
    cases = golden("aggregate_stats")["cases"]
    assert cases
    for case in cases:
        verdicts = [[[(flags(b), flags(a)) for b, a in reps] for reps in article] for article in case["verdicts"]]
        ours, expected = aggregate(verdicts), case["expected"]
        assert ours["overall"] == expected["overall"], case["id"]
        assert ours["articles"] == expected["articles"], case["id"]
        for article, recorded in zip(ours["completions"], expected["completions"], strict=True):
            for completion, numbers in zip(article, recorded, strict=True):
                assert completion == pytest.approx(numbers, rel=1e-12, abs=1e-12), case["id"]
