import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_jax.errors import SealError
from seal_jax.rest_em.select import Candidate, best, gain, right, select, top


def candidates(*rewards, texts=None):
    return [Candidate(i, texts[i] if texts else f"edit {i}", reward) for i, reward in enumerate(rewards)]


def test_best_and_top_with_ties_in_order():
    c = candidates(0.2, 0.4, 0.4, 0.9, 0.4)
    assert best(c) == [3]
    assert top(c, 3) == [3, 1, 2]
    assert top(c, 99) == [3, 1, 2, 4, 0]
    assert top(c, 0) == []


def test_a_blank_winner_is_dropped_and_not_replaced():
    c = candidates(0.9, 0.4, 0.5, texts=[" \n", "b", "c"])
    assert best(c) == []
    assert top(c, 2) == [2]
    assert gain(c, 0.45) == [2]


def test_ungraded_is_never_kept_and_takes_no_place():
    c = candidates(None, 0.1, float("nan"), 0.0)
    assert best(c) == [1]
    assert top(c, 4) == [1, 3]
    assert best(candidates(None, None)) == []
    assert gain(candidates(None, 0.1), 0.0) == [1]


def test_right_keeps_all_that_got_everything_right():
    assert right(candidates(1.0, 0.8, None, 1.0)) == [0, 3]
    assert right(candidates(0.9)) == [] == right(candidates(1.0, texts=[" "]))


def test_gain_is_strict_and_needs_a_graded_baseline():
    c = candidates(0.5, 0.6, 0.4, 0.7)
    assert gain(c, 0.5) == [3, 1]
    assert gain(c, 0.7) == []
    assert gain(c, None) == []


def test_indices_are_the_candidates_own():
    assert top([Candidate(7, "x", 0.1), Candidate(3, "y", 0.2)], 2) == [3, 7]


def test_select_by_name():
    c = candidates(0.2, 0.8, 0.6)
    assert select("best", c, keep=2, unadapted=0.1) == [1]
    assert select("top", c, keep=2) == [1, 2]
    assert select("gain", c, unadapted=0.5) == [1, 2]
    with pytest.raises(SealError, match="best, top, gain"):
        select("bset", c)


@given(st.lists(st.one_of(st.none(), st.sampled_from([0.0, 0.25, 0.5, 1.0])), max_size=8), st.integers(0, 9))
def test_top_is_a_prefix_of_a_longer_top_and_holds_the_highest(rewards, keep):
    c = candidates(*rewards)
    kept = top(c, keep)
    assert kept == top(c, keep + 1)[:keep]
    left = [r for i, r in enumerate(rewards) if i not in kept and r is not None]
    assert not kept or not left or min(rewards[i] for i in kept) >= max(left)
