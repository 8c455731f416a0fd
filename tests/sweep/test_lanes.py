"""Lanes: the same numbers as `seal-jax evaluate` with each lane's settings, and nothing computed twice."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from seal_jax import cli
from seal_jax.errors import SealError
from seal_jax.rest_em import loop
from seal_jax.rest_em import stage as stage_lib
from seal_jax.rest_em.policy import Adapted, Policy
from seal_jax.runs.report import write_report
from seal_jax.sweep import config as sweep_config
from seal_jax.sweep import lanes as lanes_lib
from seal_jax.sweep import run as sweep_run
from seal_jax.sweep import table as table_lib

SPACE = {"fit.learning_rate": [0.02, 0.005], "fit.lora.rank": [4, 2], "fit.batch_size": [1, 2]}


@pytest.fixture(scope="module", autouse=True)
def quick(quick_compile):
    with quick_compile():
        yield


def apart(record):
    """A context's record with its losses apart: (what must be equal, losses)."""
    record = json.loads(json.dumps(record))
    trials = [t for edit in record["edits"] for t in edit["trials"]] + [t for found in record["methods"].values() for t in found]
    return record, [t.pop(key) for t in trials for key in ("loss_first", "loss_last")]


def test_a_lane_is_an_evaluation(write_sweep, tiny_run, tmp_path, units, monkeypatch, capsys):
    """Number by number: self-edits, answers, verdicts, rewards, table; losses up to rounding."""
    sweep = sweep_config.load(write_sweep(search="lanes", space=SPACE, set={}))
    asked, answer = [], Policy.answer
    monkeypatch.setattr(Policy, "answer", lambda self, probes, lora=None, *rest, **more: (
        asked.append((len(probes), lora is None)) or answer(self, probes, lora, *rest, **more)))  # fmt: skip
    table = sweep_run.run(sweep)
    assert asked == [(1, True), (48, False)] * 2, "of each context: bare once, then all lanes' passages and self-edits at once"
    assert len(table["rows"]) == 8 and len({json.dumps(row["result"]) for row in table["rows"]}) > 1, "settings differ"
    monkeypatch.undo()
    capsys.readouterr()
    assert cli.main(["sweep", str(tmp_path / "sweep.yaml")]) == 0, "the command goes on with it"
    assert f"table: {tmp_path / 'sweep/sweep.json'}" in capsys.readouterr().out
    assert sweep_run.run(sweep)["rows"] == table["rows"]

    def compare(lane, unit, theirs):
        ours = json.loads((pathlib.Path(lane["run"]) / f"{unit}.json").read_text())
        (ours, our_losses), (theirs, their_losses) = map(apart, (ours["contexts"][0], theirs["contexts"][0]))
        assert ours == theirs
        np.testing.assert_allclose(*([x for x in found if x is not None] for found in (our_losses, their_losses)), rtol=1e-4)

    # The settings of the finished run, which began with an evaluation.
    (lane,) = [row for row in table["rows"] if list(row["settings"].values()) == [0.02, 4, 1]]
    assert lane["result"] == table_lib.result(units(tiny_run)["table"], "base")
    for unit in ("000", "001"):
        compare(lane, unit, units(tiny_run)[f"evaluate/before/{unit}"])
    # Settings of another rank and batch size, in an evaluation that has no more than these.
    (lane,) = [row for row in table["rows"] if list(row["settings"].values()) == [0.005, 2, 2]]
    config = sweep.trial(lane["settings"], str(tmp_path / "alone"))
    loop.evaluate_only(dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, contexts=1)))
    compare(lane, "000", units(config.run_dir)["evaluate/before/000"])

    # Again, with a value more: what is there is read, and only the new lanes are fitted.
    made = []

    def adapt(self, edits, what):
        made.append(len(edits))
        return [Adapted(tuple("x" for _ in edit.probes), np.asarray([1.0])) for edit in edits]

    monkeypatch.setattr(Policy, "write", None)
    monkeypatch.setattr(Policy, "adapt", adapt)
    more = sweep_config.load(write_sweep(search="lanes", space={**SPACE, "fit.learning_rate": [0.02, 0.005, 0.01]}, set={}))
    rows = sweep_run.run(more)["rows"]
    assert made == [24, 24] and len(rows) == 12
    before = {row["trial"]: row["result"] for row in table["rows"]}
    assert {row["trial"]: row["result"] for row in rows if row["trial"] in before} == before
    shown = table_lib.format_table(table)
    assert "results" in shown.splitlines()[0] and "run folder" not in shown, "a lane has no run folder of its own"
    data = pathlib.Path(sweep.base.task.validation)
    data.write_text(json.dumps(list(reversed(json.loads(data.read_text())))))
    with pytest.raises(SealError, match=r"holds results of other data than task.validation now has, at '00000-"):
        sweep_run.run(more)
    for folder, said in ((sweep.folder, "holds a sweep, whose table is"), (sweep.folder / "lanes", "holds the lanes of a sweep")):
        with pytest.raises(SealError, match=rf"{said}.*{sweep.folder / 'sweep.json'}"):
            write_report(folder)


def test_lanes_of_an_edit_that_chooses_for_itself(write_sweep):
    """It keeps what it chose, whatever its lane says of that; the other settings are the lane's."""
    directed = {"task.directives": {"epochs": [1, 5]}, "evaluate.seeds": 1}
    with pytest.raises(SealError, match=r"space.fit.epochs: self-edits of the task 'knowledge' choose it themselves"):
        sweep_run.run(sweep_config.load(write_sweep(search="lanes", space={"fit.epochs": [1, 2]}, set=directed)))
    sweep = sweep_config.load(write_sweep(search="lanes", space={"fit.max_grad_norm": [0.5, 1.0]}, set=directed))
    lane = lanes_lib.lanes_of(sweep)[0]
    fitted = []

    class Stop(Exception):
        pass

    class Recorder:
        config = sweep.base

        def checked(self, data):
            return data

        def adapt(self, edits, what):
            fitted.extend(edits)
            raise Stop

    from seal_jax import tasks

    task = tasks.build(sweep.base.task, None)
    context = task.contexts("validation")[0]
    shared = {"contexts": [{"id": context.id, "edits": ['{"epochs": 5}\nIt sells tin.', "It sells tin."], "bare": {}}]}
    with pytest.raises(Stop):
        lanes_lib._measure(stage_lib.Stage(Recorder(), task, {}), [lane], [context], shared, "")
    assert [dict(e.training.fit) for e in fitted] == [
        {"max_grad_norm": 0.5},
        {"max_grad_norm": 0.5, "epochs": 5},
        {"max_grad_norm": 0.5},
    ]


def test_ranges_are_drawn(write_sweep):
    space = {"fit.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}, "fit.epochs": [1, 2]}
    lanes = lanes_lib.lanes_of(sweep_config.load(write_sweep(search="lanes", trials=5, space=space)))
    assert len({lane.name for lane in lanes}) == 5
    assert all(lane.fit == {"learning_rate": lane.config.fit.learning_rate, "epochs": lane.config.fit.epochs} for lane in lanes)


def test_the_program_has_the_largest_rank_and_batch(write_sweep):
    sweep = sweep_config.load(write_sweep(search="lanes", space=SPACE))
    config = lanes_lib.engine_config(sweep.base, lanes_lib.lanes_of(sweep))
    assert (config.fit.lora.rank, config.fit.batch_size) == (4, 2)
    assert dataclasses.replace(config, fit=sweep.base.fit) == sweep.base


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (
            {"space": {"sample.temperature": [0.5, 1.0]}},
            "space.sample.temperature: lanes share one program, and differ in fit.learning_rate",
        ),
        ({"space": {"fit.lora.targets": [["q_proj"]]}}, "space.fit.lora.targets: lanes share one program"),
        ({"space": {"fit.tokens_per_step": [64]}}, "space.fit.tokens_per_step: lanes share one program"),
        (
            {"space": {"fit.epochs": [1]}, "set": {"m_step.epochs": "${fit.epochs}"}},
            "fit.epochs=1 changes more than fit.*, by an interpolat",
        ),
    ],
)
def test_what_lanes_cannot_differ_in_is_refused_before_anything_is_made(write_sweep, tmp_path, capsys, said, problem):
    assert cli.main(["sweep", str(write_sweep(search="lanes", **said))]) == 2
    assert problem in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "sweep").exists()
