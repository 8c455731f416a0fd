import numpy as np
import pytest

from seal_jax.fit.engine import Tokens
from seal_jax.sft import pack


def sequences(count, seed, longest=40):
    """Sequences of distinct tokens, so that each token slot says where it comes from; some begin without a loss, one has no input."""
    draw = np.random.default_rng(seed)
    lengths = [1, *draw.integers(2, longest + 2, count - 1).tolist()]
    starts = np.cumsum([0, *lengths])
    return [Tokens(tuple(range(a, a + n)), int(draw.integers(0, n))) for a, n in zip(starts, lengths, strict=False)]


def test_rows_hold_every_item_and_no_two_of_them_would_go_into_one():
    for seed in range(200):
        draw = np.random.default_rng(seed)
        sizes = draw.integers(0, 33, draw.integers(1, 40)).tolist()
        rows = pack.fill(sizes, 32)
        assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
        used = sorted(sum(sizes[i] for i in row) for row in rows)
        assert used[-1] <= 32 and (len(used) == 1 or used[0] + used[1] > 32)
        assert rows == pack.fill(sizes, 32)
    assert pack.fill([3, 5, 4, 2, 4], 9) == [[1, 2], [4, 0, 3]], "the largest first, of equals the first"


def test_a_step_is_laid_out_whole():
    for seed in range(50):
        found = sequences(9, seed)
        shape = pack.shape(found, [range(9)], 48, 1 + seed % 3, 2)
        rows = pack.rows(found, shape)
        assert all(x.shape == (shape.microbatches, shape.rows, shape.length) for x in rows)
        flat = [x.reshape(-1, 48) for x in rows]
        labelled = {(int(i), int(t)) for i, t, w in zip(*(x.ravel() for x in flat[:3]), strict=True) if w}
        assert labelled == {(a, b) for s in found for n, (a, b) in enumerate(zip(s.ids, s.ids[1:], strict=False)) if n + 1 >= s.loss_from}
        assert flat[2].sum() == len(labelled)
        begins = {s.ids[0] for s in found}
        for inputs, _, _, positions, first in zip(*flat, strict=True):
            index = np.arange(48)
            real = sum(np.diff(inputs, prepend=-1) != 0)  # the rest is zeros at the end
            np.testing.assert_array_equal(positions[:real], (index - first)[:real])
            assert all(int(inputs[i]) in begins for i in first[:real] if real > 1)
            np.testing.assert_array_equal(first[real:], index[real:])


def test_padding_is_seen_by_itself_alone():
    rows = pack.rows([Tokens((5, 6, 7)), Tokens((8, 9))], pack.Shape(1, 2, 5))
    assert rows.inputs[0].tolist() == [[5, 6, 8, 0, 0], [0] * 5] and rows.targets[0, 0].tolist() == [6, 7, 9, 0, 0]
    assert rows.first[0].tolist() == [[0, 0, 2, 3, 4], [0, 1, 2, 3, 4]] and rows.positions[0, 0].tolist() == [0, 1, 0, 0, 0]
    assert rows.weights[0].tolist() == [[1, 1, 1, 0, 0], [0] * 5]


@pytest.mark.parametrize(
    ("microbatch", "shards", "expected"),
    [(1, 1, (4, 1)), (2, 1, (2, 2)), (3, 1, (2, 2)), (9, 1, (1, 4)), (1, 2, (2, 2)), (1, 3, (2, 3)), (2, 8, (1, 8))],
)
def test_the_shape_is_that_of_the_step_with_the_most_rows(microbatch, shards, expected):
    """Steps of one to four rows; no microbatch of nothing but padding where one fewer would do."""
    found = [Tokens(tuple(range(21)))] * 4 + [Tokens((1, 2, 3))] * 4
    steps = [[0, 4], [1, 2, 5, 6], [0, 1, 2, 3], [7]]
    shape = pack.shape(found, steps, 24, microbatch, shards)
    assert (shape.microbatches, shape.rows, shape.length) == (*expected, 24)


def test_a_row_holds_the_longest_sequence():
    found = [Tokens(tuple(range(n))) for n in (3, 30)]
    assert [pack.row_length(found, wanted) for wanted in (None, 8, 100)] == [32, 32, 100]
