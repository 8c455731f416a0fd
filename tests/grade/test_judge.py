from seal_jax.grade.base import GradeItem, item_prompt
from seal_jax.grade.judge import JudgeGrader


def test_judge_asks_once_a_prompt_and_never_about_blanks():
    asked = []

    def generate(prompts):
        asked.extend(prompts)
        return ["Yes." if "Student answer: red" in p.messages[0]["content"] else "hmm" for p in prompts]

    def item(prediction):
        return GradeItem("Kites", "Which colour?", "red", prediction)

    grader = JudgeGrader(generate)
    assert grader.grade([item("red"), item(" \n"), item("blue"), item("red")]) == [True, False, None, True]
    assert [p.messages for p in asked] == [({"role": "user", "content": item_prompt(item(p))},) for p in ("red", "blue")]
    assert grader.failures == 1


def test_judge_does_not_call_the_model_for_nothing():
    def generate(prompts):
        raise AssertionError("called")

    assert JudgeGrader(generate).grade([GradeItem("t", "q", "g", "")]) == [False]
