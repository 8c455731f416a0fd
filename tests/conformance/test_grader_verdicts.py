"""The offline grader against recorded verdicts of GPT-4.1, and the grading prompt against the original's."""

import pytest

from seal_jax.grade import agreement, base
from seal_jax.grade.match import MatchGrader

# What the offline grader must reach on verdicts that it was not made on.
ACCURACY, PRECISION, RECALL, KAPPA = 0.877, 0.901, 0.800, 0.745


def test_match_reaches_the_reference_on_held_out_titles(golden_path):
    # The recorded file names no split of its own: titles are halved by `agreement.split_of`, and the rule was made on "dev" alone.
    held = [case for case in agreement.read_cases(golden_path("grader_verdicts")) if case.split == "held"]
    assert len({case.item.title for case in held}) > 10
    result = agreement.agreement(MatchGrader().grade([case.item for case in held]), [case.verdict for case in held])
    assert result.ungraded == 0
    assert result.accuracy >= ACCURACY and result.precision >= PRECISION
    assert result.recall >= RECALL and result.kappa >= KAPPA


@pytest.mark.parametrize("function", ["format_grade_prompts", "parse_yes_no"])
def test_grading_prompts(golden, function):
    cases = [case for case in golden("knowledge_prompts")["cases"] if case["fn"] == function]
    assert cases
    for case in cases:
        if function == "parse_yes_no":
            assert base.parse_yes_no(case["text"]) is case["expected"], case
        else:
            assert base.grade_prompt(case["question"], case["gold"], case["prediction"]) == case["expected"]
