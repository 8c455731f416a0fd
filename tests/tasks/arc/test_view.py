import xml.etree.ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_jax.tasks.arc import VIEW
from seal_jax.tasks.arc.grids import Pair, Puzzle
from seal_jax.tasks.arc.view import COLORS, UNKNOWN, grid_code, html, puzzle_code

PUZZLE = Puzzle("a-0", (Pair(((0, 1), (2, 3)), ((9,),)),), Pair(((4,),), ((5, 6),)))


def drawn(picture):
    """The colour of each cell, by place."""
    found = {}
    for path in xml.etree.ElementTree.fromstring(picture).iter("path"):
        if path.get("fill") != "none":
            for cell in path.get("d").split("M")[1:]:
                x, y = cell.split("h")[0].split()
                found[int(y), int(x)] = path.get("fill")
    return found


def test_grids_are_pictures_in_their_colours():
    for kind in ("question", "reference", "answer"):
        found = drawn(html(kind, "01/9?"))
        assert found == {(0, 0): COLORS[0], (0, 1): COLORS[1], (1, 0): COLORS[9], (1, 1): UNKNOWN}
    assert html("answer", "01/23 4").count("<svg") == 2, "both attempts"
    assert 'aria-label="grid 01/23"' in html("answer", "01/23 4")


def test_a_puzzle_is_its_pairs_in_rows():
    code = puzzle_code(PUZZLE)
    assert code == "01/23>9;4>56"
    for kind in ("context", "sequence"):
        picture = html(kind, code)
        assert picture.count("<svg") == 4 and picture.count("→") == 2
        xml.etree.ElementTree.fromstring(f"<div>{picture}</div>")


@pytest.mark.parametrize("text", ["<script>", "12 34 56 a", "1>2>3x", "a", '0" onload="x', "0\n", "٣"])
def test_what_is_no_grid_is_not_drawn(text):
    for kind in ("context", "sequence", "question", "reference", "answer"):
        assert html(kind, text) is None


def test_a_self_edit_stays_text_and_an_empty_grid_says_so():
    assert html("edit", "0/1") is None
    assert "<svg" not in html("answer", "") and "no grid" in html("answer", " ")


@given(st.lists(st.lists(st.integers(-128, 127), max_size=4), max_size=4))
def test_every_grid_that_a_model_can_write_has_a_picture(rows):
    assert html("answer", grid_code(tuple(map(tuple, rows)))) is not None


def test_the_table_speaks_of_test_time_training():
    assert VIEW.names == {"no adaptation": "no adaptation, in context", "passage + self-edit": "TTT, self-edit"}
