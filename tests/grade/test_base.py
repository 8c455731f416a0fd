import pytest

from seal_jax.grade import base


def test_topic_question():
    item = base.GradeItem("Lake Orve", "How deep is it?", "40 metres", "40 m")
    assert item.topic_question == "Topic: Lake Orve\nHow deep is it?"


def test_prompt_strips_the_prediction_and_keeps_braces():
    text = base.grade_prompt("Topic: {t}\nWhat is {0}?", "{gold}", "  {prediction} {}\n")
    assert "Question: Topic: {t}\nWhat is {0}?\nGold answer: {gold}\nStudent answer: {prediction} {}\nIs the" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes", True),
        ("Yes!", True),
        ("I say YES", True),
        ("no", False),
        ("yes and no", False),
        ("yesterday, nobody", None),
        ("yes_no", None),
        ("", None),
        ("I cannot tell", None),
    ],
)
def test_verdict_of(text, expected):
    assert base.verdict_of(text) is expected
    assert base.parse_yes_no(text) is (expected is True)


def test_the_thoughts_of_a_reply_are_no_verdict():
    assert base.verdict_of("<think>\nIs it no? There is no other.\n</think>\n\nYes.") is True
    assert base.verdict_of("It is yes.</think>no") is False
    assert base.verdict_of("<think>Yes, I think that the") is None, "cut short"
    assert base.verdict_of("<think>yes</think>") is None
