import gzip
import json
import os
import pathlib

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_jax.errors import SealError
from seal_jax.runs import matrix

ROOT = pathlib.Path(__file__).resolve().parents[2]
HAND = matrix.from_rows([[0.1, 0.2, 0.3], [0.9], [0.6, 0.8], [0.5, 0.4, 0.7]])


@st.composite
def stacks(draw, unknown: bool = False):
    """Matrices [S, T + 1, T] of whole quarters, NaN above the diagonal, and `unknown` ones below."""
    count, length = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    cells = draw(arrays.arrays(np.float64, (count, length + 1, length), elements=st.integers(0, 4).map(lambda n: n / 4)))
    if unknown:
        cells[draw(arrays.arrays(bool, cells.shape))] = np.nan
    keep = np.tri(length + 1, length, -1, dtype=bool)
    keep[0] = True
    return np.where(keep, cells, np.nan)


def test_measures_by_hand():
    assert matrix.newest(HAND) == pytest.approx((0.9 + 0.8 + 0.7) / 3)
    assert matrix.earlier(HAND) == pytest.approx((0.5 + 0.4) / 2)
    assert matrix.backward(HAND) == pytest.approx(((0.5 - 0.9) + (0.4 - 0.8)) / 2)


def test_one_passage_has_nothing_to_forget():
    one = matrix.from_rows([[0.5], [1.0]])
    assert matrix.newest(one) == 1.0
    assert np.isnan(matrix.earlier(one)) and np.isnan(matrix.backward(one))


def test_unknown_cells_are_left_out():
    rows = [[0.1, 0.2, 0.3], [None], [0.6, 0.8], [0.5, 0.4, 0.7]]
    known = matrix.from_rows(rows)
    assert matrix.newest(known) == pytest.approx((0.8 + 0.7) / 2)
    assert matrix.backward(known) == pytest.approx(0.4 - 0.8), "of the first passage the diagonal is not known"
    assert np.isnan(matrix.earlier(matrix.from_rows(rows[:3]))), "not come to the last row"


def test_above_the_diagonal_nothing_stands():
    zeros = matrix.from_rows([[0.5, 0.5], [0.5, 0.0], [0.5, 0.5]])
    assert np.isnan(zeros[1, 1]) and np.isfinite(zeros).sum() == 5


@given(stacks())
def test_without_forgetting_there_is_no_backward_transfer(stack):
    for t in range(1, stack.shape[1]):  # after its own edit each passage stays where it is
        for i in range(t - 1):
            stack[:, t, i] = stack[:, i + 1, i]
    transfer = matrix.backward(stack)
    assert np.all((transfer == 0) if stack.shape[2] > 1 else np.isnan(transfer))


@given(stacks())
def test_backward_transfer_is_what_is_left_less_what_was_learnt(stack):
    if stack.shape[2] == 1:
        return
    learnt = matrix.newest(stack[:, :-1, :-1])
    np.testing.assert_allclose(matrix.backward(stack), matrix.earlier(stack) - learnt, atol=1e-12)


@given(stacks(unknown=True), st.randoms(use_true_random=False))
def test_the_order_of_sequences_changes_nothing(stack, random):
    order = list(range(len(stack)))
    random.shuffle(order)
    one, other = matrix.aggregate(stack), matrix.aggregate(stack[order])
    np.testing.assert_allclose(one.mean, other.mean, atol=1e-12)
    np.testing.assert_allclose(one.std, other.std, atol=1e-12)
    np.testing.assert_array_equal(matrix.newest(stack)[order], matrix.newest(stack[order]))


@given(stacks())
def test_the_mean_matrix_has_the_mean_measures(stack):
    mean = matrix.aggregate(stack).mean
    for measure in (matrix.newest, matrix.earlier, matrix.backward):
        np.testing.assert_allclose(measure(mean), measure(stack).mean(), atol=1e-12)


@given(stacks(unknown=True))
def test_cells_that_are_unknown_do_not_count(stack):
    summary = matrix.aggregate(stack)
    for cell in np.ndindex(stack.shape[1:]):
        known = [v for v in stack[(slice(None), *cell)] if np.isfinite(v)]
        expected = [np.mean(known) if known else np.nan, np.std(known, ddof=1) if len(known) > 1 else 0.0 if known else np.nan]
        np.testing.assert_allclose([summary.mean[cell], summary.std[cell]], expected, atol=1e-12)


def test_matrices_come_from_records(continual_records):
    one = [[0.0, 0.25], [0.5], [0.25, 1.0]]
    two = [[0.5, None], [1.0], [None, 0.75]]
    start, steps = continual_records({"sequential": [one, two], "gated": [one, two[:2]]})
    found = matrix.from_records(start, steps)
    assert list(found) == ["sequential", "gated"]
    np.testing.assert_array_equal(found["sequential"], [matrix.from_rows(one), matrix.from_rows(two)])
    np.testing.assert_array_equal(found["gated"], [matrix.from_rows(one), matrix.from_rows(two[:2])])
    np.testing.assert_array_equal(matrix.from_records(start, steps[1:])["gated"][0], matrix.from_rows([one[0], [None], one[2]]))
    assert matrix.from_records(start, []) == {}


def test_sequences():
    drawn = matrix.sequences(5, 4, 6, 1)
    assert drawn == matrix.sequences(5, 4, 6, 1) != matrix.sequences(5, 4, 6, 2)
    assert all(len(set(s)) == 4 and set(s) <= set(range(6)) for s in drawn) and len(drawn) == 5
    assert matrix.sequences(7, 4, 6, 1)[:5] == drawn, "more sequences go on from fewer"
    with pytest.raises(SealError, match="a sequence of 7 passages was asked for, but there are 6"):
        matrix.sequences(1, 7, 6, 1)


def test_the_published_matrix():
    folder = pathlib.Path(os.environ.get("SEAL_ORIGINAL") or ROOT.parent / "shared" / "data" / "original")
    path = folder / "results__continual_self_edits__overall_results.json.gz"
    if not path.is_file():
        pytest.skip(f"no result files of the original at {path}: set SEAL_ORIGINAL to the folder that has them")
    published = matrix.read_original(path)
    assert (published.sequences, published.mean.shape, published.model) == (64, (9, 8), "models/iter2")
    assert published.mean[0, 7] == 0.2529 and published.mean[8, 0] == 0.1894 and published.std[1, 0] == 0.2184
    assert np.isnan(published.mean[1, 1]) and np.isnan(published.std[7, 7])
    assert matrix.newest(published.mean) == pytest.approx(3.3168 / 8)
    assert matrix.earlier(published.mean) == pytest.approx(1.6397 / 7)
    assert matrix.backward(published.mean) == pytest.approx(1.6397 / 7 - 2.9771 / 7)


def summary(**changes):
    mean = np.nan_to_num(HAND).tolist()
    return {"mean_over_sequences": mean, "std_over_sequences": mean, "n_sequences": 8, "base_model": "some/model", **changes}


def test_runs_of_the_original_are_averaged(tmp_path):
    halves = (np.nan_to_num(HAND) / 2).tolist()
    for name, data in {"run0/summary_a.json": summary(), "run1/summary_b.json.gz": summary(mean_over_sequences=halves)}.items():
        path = tmp_path / name
        path.parent.mkdir()
        text = json.dumps(data).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    (tmp_path / "overall_results.json").write_text(json.dumps(summary()))
    found = matrix.read_original(tmp_path)
    np.testing.assert_allclose(found.mean, HAND * 0.75)
    np.testing.assert_allclose(found.std, HAND)
    assert (found.sequences, found.model) == (16, "some/model")
    (tmp_path / "run1" / "summary_c.json").write_text(json.dumps(summary(n_sequences=4)))
    with pytest.raises(SealError, match=r"sequences 8, but 4 in .*only equal runs can be averaged|sequences 4, but 8 in"):
        matrix.read_original(tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "not readable as JSON"),
        ("[]", "not a result file"),
        ("{}", "no 'mean_over_sequences'"),
        (json.dumps(summary(mean_over_sequences=[[0.1, 0.2], [0.3, 0.4]])), "expected T \\+ 1 rows of T cells"),
        (json.dumps(summary(std_over_sequences=[[0.1], [0.2]])), "expected T \\+ 1 rows of T cells"),
        (json.dumps(summary(mean_over_sequences=[[0.1, 0.2], [0.3]])), "not a result file"),
        (json.dumps(summary(mean_over_sequences="much")), "not a result file"),
        (json.dumps(summary(n_sequences=0)), "n_sequences is 0"),
    ],
)
def test_files_that_are_not_the_originals(tmp_path, content, problem):
    path = tmp_path / "overall_results.json"
    path.write_text(content)
    with pytest.raises(SealError, match=problem) as told:
        matrix.read_original(path)
    assert "\n" not in str(told.value) and str(path) in str(told.value)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(SealError, match="no summary_"):
        matrix.read_original(tmp_path)
    with pytest.raises(SealError, match="no such file"):
        matrix.read_original(tmp_path / "x.json")
    (tmp_path / "x.json.gz").write_bytes(b"no gzip")
    with pytest.raises(SealError, match="not readable as JSON"):
        matrix.read_original(tmp_path / "x.json.gz")
