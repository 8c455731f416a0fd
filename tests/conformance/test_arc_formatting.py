"""Messages, self-edit prompts and decoding of the ARC task against recorded outputs of the original."""

import pytest

from seal_jax.tasks.arc import leave_out, messages
from seal_jax.tasks.arc.grids import Grid, Pair, Puzzle, rows

INVERTERS = {repr(view.inverse()): view.inverse() for view in leave_out.VIEWS}


def grid(text: str) -> Grid:
    return tuple(tuple(map(int, row)) for row in text.split("/"))


def puzzle(text: str) -> Puzzle:
    train, test = text.split("#")
    *pairs, last = (Pair(*map(grid, pair.split(">"))) for pair in [*filter(None, train.split(";")), test])
    return Puzzle("", tuple(pairs), last)


def llama_3(chat) -> str:
    """Messages in Llama 3's format, as the original writes it by hand, ready for the assistant's turn."""
    turns = [f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n{m['content']}<|eot_id|>" for m in chat]
    return "<|begin_of_text|>" + "".join(turns) + "<|start_header_id|>assistant<|end_header_id|>\n\n"


@pytest.fixture(scope="module")
def cases(golden):
    return golden("arc_formatting")


def test_prompt_parts(cases):
    parts = {"system_message": messages.SYSTEM, "self_edit_prompt": messages.SELF_EDIT, "message_prompt": messages.PUZZLE}
    assert parts == cases["prompt_parts"]


def test_messages(cases):
    assert cases["messages"]
    for case in cases["messages"]:
        task = puzzle(case["task_text"])
        assert list(messages.puzzle_prompt(task).messages) == case["input"], case["task"]
        assert {"role": "assistant", "content": messages.answer_text(task.test.output)} == case["output"], case["task"]


def test_self_edit_prompts(cases):
    assert cases["self_edit_prompts"]
    for case in cases["self_edit_prompts"]:
        assert llama_3(messages.edit_prompt(puzzle(case["task_text"])).messages) == case["expected"], case["task"]


def test_decode(cases):
    assert cases["decode"]
    for case in cases["decode"]:
        read = messages.decode(case["text"], INVERTERS[case["inverter"]] if case["inverter"] else None)
        assert (None if read is None else rows(read)) == case["expected"], case
