import json

import numpy as np
import pytest

from seal_jax.experiments.continual_table import table
from seal_jax.runs import files, matrix
from seal_jax.runs.table import format_table

BASE = [[0.25, 0.0, 0.5], [0.0, 0.5, 0.25]]
PLAIN = [
    [BASE[0], [1.0], [0.5, 1.0], [0.25, 0.5, 0.75]],
    [BASE[1], [0.75], [0.5, 0.5], [0.5, 0.0, 1.0]],
]
KEPT = [
    [BASE[0], [1.0], [1.0, 0.75], [1.0, 0.75, 0.5]],
    [BASE[1], [0.75], [0.75, 0.5], [0.75, 0.5, 0.75]],
]
OTHER = matrix.Summary(matrix.from_rows(PLAIN[0]), matrix.from_rows(PLAIN[0]) / 2, 64, "some/model")


def made(records, beside=(), **given):
    start, steps = records({"sequential": PLAIN, "kept": KEPT}, **given)
    return table(start, steps, resamples=200, seed=0, beside=beside)


def by_method(result):
    return {row["method"]: row for row in result["rows"]}


def test_measures_differences_and_intervals(continual_records):
    result = made(continual_records, bits={"sequential": [4.0, 5.0], "kept": [3.0, 3.5]})
    assert (result["kind"], result["reference"]) == ("continual", "sequential")
    rows = by_method(result)
    assert list(rows) == ["no adaptation", "sequential", "kept"]
    still, plain, kept = rows.values()
    assert all((row["sequences"], row["passages"]) == (2, 3) for row in rows.values())
    # Two sequences: the interval's ends are the two of them, the mean in between.
    assert plain["newest"] == pytest.approx([(2.75 + 2.25) / 6, 2.25 / 3, 2.75 / 3])
    assert plain["earlier"] == pytest.approx([0.3125, 0.25, 0.375])
    assert plain["backward"] == pytest.approx([(-0.625 - 0.375) / 2, -0.625, -0.375])
    assert kept["backward"] == [0.0, 0.0, 0.0], "nothing forgotten"
    assert still["newest"] == pytest.approx([0.25, 0.25, 0.25]), "row 0: 0.75 / 3 in both sequences"
    assert still["earlier"] == pytest.approx([(0.125 + 0.25) / 2, 0.125, 0.25])
    assert still["backward"] is None
    assert plain["newest_difference"] is plain["earlier_difference"] is None
    # Paired: what differs is each sequence's own difference.
    assert kept["earlier_difference"] == pytest.approx([(0.5 + 0.375) / 2, 0.375, 0.5])
    assert kept["newest_difference"] == pytest.approx([(-0.5 / 3 - 0.25 / 3) / 2, -0.5 / 3, -0.25 / 3])
    assert still["earlier_difference"][0] == pytest.approx(still["earlier"][0] - plain["earlier"][0])
    assert plain["perplexity"] == pytest.approx([2**4.5, 16.0, 32.0])
    assert kept["perplexity"][0] == pytest.approx(2**3.25)
    assert still["perplexity"] == [8.0, None, None], "one policy, no interval"


def test_matrices(continual_records):
    result = made(continual_records, beside=[OTHER])
    assert list(result["matrices"]) == ["sequential", "kept", "original: some/model, 64 sequences"]
    plain = result["matrices"]["sequential"]
    assert plain["mean"] == [[0.125, 0.25, 0.375], [0.875, None, None], [0.5, 0.75, None], [0.375, 0.25, 0.875]]
    assert plain["std"][1] == [pytest.approx(np.std([1.0, 0.75], ddof=1)), None, None]
    start, steps = continual_records({"sequential": PLAIN, "kept": KEPT})
    assert matrix.shown(matrix.from_records(start, steps)) == {name: result["matrices"][name] for name in ("sequential", "kept")}
    assert matrix.shown(matrix.from_records(start, steps[:1]))["kept"]["mean"][2:] == [[None] * 3] * 2
    assert json.loads(files.dump(result)) == result, "plain JSON data"


def test_results_of_the_original_stand_beside(continual_records):
    result = made(continual_records, beside=[OTHER, OTHER])
    row = by_method(result)["original: some/model, 64 sequences"]
    assert row["newest"] == [pytest.approx(2.75 / 3), None, None] and row["backward"] == [pytest.approx(-0.625), None, None]
    assert row["perplexity"] is row["newest_difference"] is None
    assert "original: some/model, 64 sequences (2)" in result["matrices"]
    assert any(note.startswith("original: ") for note in result["notes"])
    assert not any(note.startswith("original: ") for note in made(continual_records)["notes"])


def test_counts(continual_records):
    start, steps = continual_records({"sequential": PLAIN, "kept": KEPT})
    assert not any("refused" in note or "unusable" in note for note in table(start, steps, resamples=10, seed=0)["notes"])
    kept = [[lane for lane in step["lanes"] if lane["method"] == "kept"] for step in steps]
    kept[0][0] |= {"scale": 0.0, "gate": "would forget"}
    kept[1][0] |= {"scale": 0.5, "gate": "halved"}
    kept[1][1] |= {"scale": 0.25}
    kept[2][1] |= {"problem": "no usable line", "scale": 0.0}
    kept[2][0]["answers"]["0-0"]["verdicts"][2] = None
    start["answers"]["1-0"]["verdicts"] = [None, None, False, False]
    result = table(start, steps, resamples=10, seed=0)
    still, plain, row = result["rows"]
    assert [row[what] for what in ("refused", "scaled", "unusable", "ungraded")] == [1, 2, 1, 1]
    assert [plain[what] for what in ("refused", "scaled", "unusable", "ungraded")] == [0, 0, 0, 0]
    assert still["ungraded"] == 2
    assert any("refused" in note for note in result["notes"]) and any("unusable" in note for note in result["notes"])
    text = format_table(result)
    assert all(head in text.splitlines()[0] for head in ("refused", "scaled down", "unusable", "ungraded"))


def test_what_is_not_known_is_null_and_told(continual_records):
    blind = [[[None] * 3, [None], [None] * 2, [None] * 3], PLAIN[1]]
    start, steps = continual_records({"sequential": PLAIN, "blind": blind}, bits={"blind": [None, 5.0]})
    result = table(start, steps, resamples=10, seed=0)
    row = by_method(result)["blind"]
    assert row["newest"] == [0.75, None, None] and row["newest_difference"] == [0.0, None, None], "of one sequence there is no interval"
    assert row["perplexity"] == [32.0, None, None]
    assert "blind: the perplexity is not finite in 1 of 2 sequences, which are left out of it" in result["notes"]
    start, steps = continual_records({"sequential": PLAIN}, start_bits=None)
    result = table(start, steps, resamples=10, seed=0)
    assert [row["perplexity"] for row in result["rows"]] == [None, None]
    assert "perplexity" not in format_table(result) and "difference" not in format_table(result)


def test_one_passage(continual_records):
    start, steps = continual_records({"sequential": [[[0.5], [1.0]]]})
    row = table(start, steps, resamples=10, seed=0)["rows"][1]
    assert row["newest"] == [1.0, None, None] and row["earlier"] is row["backward"] is None
