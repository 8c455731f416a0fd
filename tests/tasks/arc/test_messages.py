import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_jax.tasks.arc import leave_out, messages
from seal_jax.tasks.arc.grids import Pair, Puzzle

GRID = ((1, 2, 3), (4, 5, 6))
PUZZLE = Puzzle("a-0", (Pair(GRID, ((7,),)),), Pair(((8, 9),), ((0,),)))


def test_a_puzzle_shows_its_pairs_and_asks_for_the_test_output():
    system, user = messages.puzzle_prompt(PUZZLE).messages
    assert system["content"].endswith("[[1 2 3]\n [4 5 6]] -> [[7]]#\n") and "{" not in system["content"]
    assert user == {"role": "user", "content": "[[8 9]] -> "}


def test_the_self_edit_prompt_shows_the_training_pairs_alone():
    _, user = messages.edit_prompt(PUZZLE).messages
    assert (
        user["content"].startswith("Input:\n1 2 3\n4 5 6\n\nOutput:\n7\n\n------\n\n\nYou are configuring") and "8 9" not in user["content"]
    )


def test_what_is_written_is_read_back():
    assert messages.decode(messages.answer_text(GRID)) == GRID
    for view in leave_out.VIEWS:
        assert messages.decode(messages.answer_text(view.grid(GRID)), view.inverse()) == GRID


@pytest.mark.parametrize(
    "text, expected",
    [
        ("[[1 2 3]\n [4]]", ((1, 2), (3, 4))),  # as many rows as there are lines, if the numbers fit
        ("[[200 -1]]", ((-56, -1),)),
        (f"[[{2**63 - 1} 0]]", ((-1, 0),)),
        (f"[[{2**63} 0]]", None),
        ("[[" + "9" * 5000 + "]]", None),
        ("[[1 2]\r\n [3 4]]", ((1, 2), (3, 4))),
        ("The answer is [[1]]", None),
        ("[]\n[]", ((), ())),
    ],
)
def test_odd_outputs(text, expected):
    assert messages.decode(text) == expected


@given(st.one_of(st.text(), st.text("[]0123456789 #\n`-_", max_size=40)), st.sampled_from([None, *(v.inverse() for v in leave_out.VIEWS)]))
def test_any_text_gives_a_rectangle_or_nothing(text, inverter):
    grid = messages.decode(text, inverter)
    assert grid is None or len({len(row) for row in grid}) <= 1
