import pytest

from seal_jax.tasks.base import Prompt
from seal_jax.tasks.knowledge import prompts

TITLE, CONTEXT = "The {title} mill", "A mill with {context}, {{braces}} and 100 % of a\ttab."


@pytest.mark.parametrize("style", prompts.EDIT_STYLES)
def test_edit_prompts_hold_title_and_passage_as_they_are(style):
    prompt = prompts.edit_prompt(style, TITLE, CONTEXT)
    assert (prompt.text is None) != (prompt.messages is None)
    whole = prompt.text if prompt.text is not None else "\n".join(m["content"] for m in prompt.messages)
    assert whole.count(CONTEXT) == 1
    if style == "facts":  # the rewriting assistant gets the passage alone; the title heads every training sequence anyway
        assert TITLE not in whole
    else:
        assert whole.count(TITLE) == 1
        assert whole.index(TITLE) < whole.index(CONTEXT)


@pytest.mark.parametrize("style", prompts.ANSWER_STYLES)
def test_answer_prompts_hold_the_question_under_its_topic(style):
    prompt = prompts.answer_prompt(style, prompts.topic_question("The {question} mill", "Who built {it}?"))
    whole = prompt.text if prompt.text is not None else "\n".join(m["content"] for m in prompt.messages)
    assert whole.count("Topic: The {question} mill\nWho built {it}?") == 1


def test_our_styles_are_chat_that_ends_with_the_user():
    for prompt in (prompts.edit_prompt("facts", "T", "C"), prompts.answer_prompt("chat", "Q?")):
        assert {m["role"] for m in prompt.messages} <= {"system", "user"}
        assert prompt.messages[-1]["role"] == "user"
        assert Prompt.from_json({"text": None, "messages": [dict(m) for m in prompt.messages]}) == prompt


def test_chat_markup_comes_from_the_model_alone():
    """The chat styles carry no model's own markup, so that any chat template can render them."""
    for prompt in (prompts.edit_prompt("facts", "T", "C"), prompts.answer_prompt("chat", "Q?")):
        assert not any("<|" in m["content"] for m in prompt.messages)


def test_self_qa_leaves_the_first_question_open():
    assert prompts.edit_prompt("self-qa", "T", "C").text.endswith("\n\nQuestion 1: ")
