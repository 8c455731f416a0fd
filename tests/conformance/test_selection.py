"""Which self-edits ReST-EM keeps, against recorded outputs of the original's `_top_k`."""

from seal_jax.rest_em.select import Candidate, best, top


def test_recorded_selections(golden):
    cases = golden("sft_selection")["cases"]
    assert cases
    for case in cases:
        candidates = [Candidate(i, f"edit {i}", reward) for i, reward in enumerate(case["adapter_mean"])]
        assert best(candidates) == top(candidates, 1) == case["expected"]["k1"], case
        assert top(candidates, 2) == case["expected"]["k2"], case


def test_edge_cases(golden):
    cases = golden("sft_selection")["edge_cases"]
    assert cases
    for case in cases:
        candidates = [Candidate(i, c["text"], c["stats"]["adapter_mean"]) for i, c in enumerate(case["completions"])]
        for k, expected in case["expected"].items():
            kept = [candidates[i].text.strip() for i in top(candidates, int(k.removeprefix("k")))]
            assert kept == expected, (case["name"], k)
