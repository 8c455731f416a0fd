import json

import pytest

from seal_jax.tasks.arc.grids import Pair, Puzzle, grid, rows, shape

SMALL, WIDE = ((1, 2), (3, 4)), ((0, 1, 2),)
PUZZLE = Puzzle("a-0", (Pair(SMALL, WIDE), Pair(WIDE, SMALL)), Pair(SMALL, SMALL))


def test_puzzles_survive_json_and_compare_by_value():
    again = Puzzle.from_json(json.loads(json.dumps(PUZZLE.to_json())))
    assert again == PUZZLE and hash(again) == hash(PUZZLE)
    assert again != Puzzle("a-0", PUZZLE.train[::-1], PUZZLE.test)


def test_shape_and_side():
    assert shape(WIDE) == (1, 3) and PUZZLE.side == 3
    assert shape(((),)) == (1, 0) and shape(()) == (0, 0)
    assert grid(rows(SMALL)) == SMALL


@pytest.mark.parametrize(
    "bad", [None, "12", [], [[]], [1, 2], [[1, 2], [3]], [[10]], [[-1]], [[True]], [[1.0]], [["1"]], [[0] * 31], [[0]] * 31]
)
def test_what_is_no_grid_is_refused(bad):
    with pytest.raises(ValueError, match=r"^with a grid"):
        grid(bad)


@pytest.mark.parametrize("bad", [None, [], {"input": [[1]]}, {"output": [[1]]}, {"input": [[1]], "output": None}])
def test_what_is_no_pair_is_refused(bad):
    with pytest.raises(ValueError, match=r"^with a pair"):
        Pair.from_json(bad)
