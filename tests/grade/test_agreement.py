import gzip
import json
import math

import pytest

from seal_jax.errors import SealError
from seal_jax.grade import agreement
from seal_jax.grade.base import GradeItem


class Fixed:
    """Says what the prediction says: "y", "n" or "?"."""

    name = "fixed"

    def __init__(self):
        self.seen = []

    def grade(self, items):
        self.seen += items
        return [{"y": True, "n": False}.get(item.prediction) for item in items]


def case(title="Kites", answers=(("y", True),), **more):
    return {"title": title, "question": "Which?", "gold": "red", "answers": [list(a) for a in answers], **more}


def write(path, cases, **more):
    path.write_text(json.dumps({"cases": cases, **more}))
    return path


def test_agreement_by_hand():
    # 5 right by reference of which 4 found, 1 false alarm among 5 wrong: accuracy .8, chance .5, kappa .6
    verdicts = [True] * 4 + [False] + [True] + [False] * 4 + [None]
    references = [True] * 5 + [False] * 5 + [True]
    result = agreement.agreement(verdicts, references)
    assert (result.n, result.ungraded) == (11, 1)
    assert (result.accuracy, result.precision, result.recall) == pytest.approx((0.8, 0.8, 0.8))
    assert result.kappa == pytest.approx(0.6)


def test_agreement_without_a_denominator():
    result = agreement.agreement([None, None], [True, False])
    assert result.ungraded == 2
    assert all(math.isnan(x) for x in (result.accuracy, result.precision, result.recall, result.kappa))
    assert agreement.table("x", result).splitlines()[1].split() == ["x", "2", "2", "-", "-", "-", "-"]
    assert math.isnan(agreement.agreement([False], [True]).precision)
    assert math.isnan(agreement.agreement([True], [True]).kappa)  # both always say the same: chance agreement is 1


def test_agreement_wants_equal_lengths():
    with pytest.raises(ValueError, match="1 verdicts for 2"):
        agreement.agreement([True], [True, False])


def test_reads_gzipped_by_content(tmp_path):
    plain = write(tmp_path / "a.gz", [case()])  # the name lies, both ways
    packed = tmp_path / "b.json"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    expected = [agreement.RecordedCase(GradeItem("Kites", "Which?", "red", "y"), True, agreement.split_of("Kites"))]
    assert agreement.read_cases(plain) == agreement.read_cases(packed) == expected


def test_reads_fields_by_name(tmp_path):
    path = write(tmp_path / "c.json", [case(answers=[(7, False, "n")])], answer_fields=["n_graded", "verdict", "prediction"])
    (found,) = agreement.read_cases(path)
    assert (found.item.prediction, found.verdict) == ("n", False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe\xfa", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b"\x1f\x8bjunk", "not readable"),
        (gzip.compress(b'{"cases": []}')[:-6], "not readable"),
        (b"[]", "'cases'"),
        (b'{"cases": {}}', "'cases'"),
        (b'{"cases": [], "answer_fields": ["verdict"]}', "'answer_fields'"),
        (b'{"cases": [], "answer_fields": [[], 1]}', "'answer_fields'"),
    ],
)
def test_malformed_files(tmp_path, content, message):
    path = tmp_path / "cases.json"
    path.write_bytes(content)
    with pytest.raises(SealError, match=message) as error:
        agreement.read_cases(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "case 1: expected an object, found list"),
        ({"title": "t", "question": "q", "answers": []}, "case 1: has no 'gold'"),
        (case() | {"gold": 3}, "case 1: 'gold' must be text"),
        (case() | {"answers": {}}, "case 1: 'answers' must be a list"),
        (case() | {"split": 1}, "case 1: 'split' must be text"),
        (case(answers=[("y", True), ("y",)]), "case 1, answer 1: expected a list of prediction, verdict"),
        (case(answers=[(None, True)]), "case 1, answer 0: 'prediction' must be text"),
        (case(answers=[("y", "yes")]), "case 1, answer 0: 'verdict' must be true or false"),
    ],
)
def test_malformed_cases_are_named(tmp_path, bad, message):
    path = write(tmp_path / "cases.json", [case(), bad])
    with pytest.raises(SealError) as error:
        agreement.read_cases(path)
    assert str(error.value) == f"{path}: {message}"


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(SealError, match="no such file"):
        agreement.read_cases(tmp_path / "none.json")
    with pytest.raises(SealError, match="not readable"):
        agreement.read_cases(tmp_path)


def test_run_prints_the_rates(tmp_path):
    path = write(tmp_path / "cases.json", [case(answers=[("y", True), ("n", False), ("y", False), ("n", True), ("?", True)])])
    header, row = agreement.run(path, Fixed()).splitlines()
    assert header.split() == ["grader", "cases", "ungraded", "accuracy", "precision", "recall", "kappa"]
    assert row.split() == ["fixed", "5", "1", "0.500", "0.500", "0.500", "0.000"]


def test_a_sample_has_answers_from_all_places(tmp_path):
    """Of cases with two answers each, the unadapted one first, not those alone; always the same, and each once."""
    path = write(tmp_path / "cases.json", [case(answers=[(f"{i} before", True), (f"{i} after", True)]) for i in range(100)])
    for limit in (10, 50, 100):
        seen = []
        for _ in range(2):
            agreement.run(path, grader := Fixed(), limit=limit)
            seen.append([item.prediction for item in grader.seen])
        assert seen[0] == seen[1] and len(set(seen[0])) == limit
        assert 0.2 < sum(text.endswith("before") for text in seen[0]) / limit < 0.8


def test_run_takes_a_split_and_a_sample_in_order(tmp_path):
    cases = [case(answers=[(f"{i}", True)], split="held" if i % 2 else "dev") for i in range(20)]
    path = write(tmp_path / "cases.json", cases)
    grader = Fixed()
    agreement.run(path, grader, split="held", limit=5)
    taken = [int(item.prediction) for item in grader.seen]
    assert len(set(taken)) == 5 and taken == sorted(taken) and all(i % 2 for i in taken)


def test_files_without_splits_are_halved_by_title(tmp_path):
    titles = [f"Title {i}" for i in range(200)]
    path = write(tmp_path / "cases.json", [case(title=t) for t in titles])
    halves = {}
    for split in ("dev", "held"):
        grader = Fixed()
        agreement.run(path, grader, split=split)
        halves[split] = {item.title for item in grader.seen}
    assert halves["dev"] | halves["held"] == set(titles) and not halves["dev"] & halves["held"]
    assert 60 < len(halves["held"]) < 140


def test_nothing_to_grade(tmp_path):
    path = write(tmp_path / "cases.json", [case(split="dev")])
    with pytest.raises(SealError, match="no case of split 'test'; it has: dev"):
        agreement.run(path, Fixed(), split="test")
    with pytest.raises(SealError, match="limit=0"):
        agreement.run(path, Fixed(), limit=0)
    with pytest.raises(SealError, match="no cases"):
        agreement.run(write(path, []), Fixed())
