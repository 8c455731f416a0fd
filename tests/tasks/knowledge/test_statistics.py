import pytest

from seal_jax.errors import SealError
from seal_jax.tasks.knowledge.statistics import aggregate

T, F = True, False


def test_two_completions_by_hand():
    # completion 0: baseline 1/2 and 0, adapter 1 and 1/2; completion 1: baseline 0 and 0, adapter 0 and 0
    verdicts = [[[([T, F], [T, T]), ([F, F], [T, F])], [([F, F], [F, F]), ([F, F], [F, F])]]]
    result = aggregate(verdicts)
    half = 0.5**0.5 / 2  # the sample deviation of 1/2 and 0, and of 1 and 1/2
    first = {"baseline_mean": 0.25, "baseline_std": half, "adapter_mean": 0.75, "adapter_std": half, "gain_mean": 0.5}
    assert result["completions"][0][0] == pytest.approx(first)
    assert result["articles"][0] == {
        "baseline_accuracy": 0.125,
        "adapter_mean_accuracy": 0.375,
        "adapter_std_over_completions": 0.5303,  # of 0.75 and 0
        "mean_adapter_std_within_completions": 0.1768,
        "mean_gain": 0.25,
    }
    assert result["overall"]["mean_gain"] == 0.25
    assert result["overall"]["adapter_std_of_article_means"] == 0.0


def test_articles_weigh_the_same_but_completions_weigh_the_same_within():
    one, other = ([F], [T]), ([F], [F])
    result = aggregate([[[one]], [[other], [other], [other]]])
    assert result["overall"]["adapter_mean_accuracy"] == 0.5


def test_ungraded_questions_are_left_out_and_not_counted_as_wrong():
    assert aggregate([[[([None, F], [T, None])]]])["overall"]["adapter_mean_accuracy"] == 1.0


@pytest.mark.parametrize("verdicts", [[], [[]], [[[]]], [[[([None], [T])]]], [[[([], [])]]]])
def test_nothing_to_aggregate_is_one_clear_line(verdicts):
    with pytest.raises(SealError, match=r"^statistics: .*(no verdicts|no graded)"):
        aggregate(verdicts)
