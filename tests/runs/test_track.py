"""Curves for TensorBoard and Weights & Biases, and the profiler's trace: of a tiny run, which they leave as it is."""

import dataclasses
import pathlib
import struct
import sys
import types

import pytest

from seal_jax import config as config_lib
from seal_jax.errors import SealError
from seal_jax.rest_em import loop
from seal_jax.runs import health, track
from seal_jax.runs.events import read_events
from seal_jax.runs.places import place
from seal_jax.runs.store import RunStore


def points(folder):
    """{tag: [(step, value)]} of the event files in `folder`: records of a length, a checksum, data and a checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            size = struct.unpack("<Q", data[:8])[0]
            event = Event.FromString(data[12 : 12 + size])
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
            data = data[16 + size :]
    return found


@pytest.fixture
def wandb(monkeypatch):
    """A module in place of wandb, which keeps what it is given."""
    made = types.SimpleNamespace(started=[], logged=[], axes=[], finished=0)

    def init(**options):
        made.started.append(options)
        return made

    def finish():
        made.finished += 1

    made.init, made.finish, made.log = init, finish, made.logged.append
    made.define_metric = lambda name, step_metric=None: made.axes.append((name, step_metric))
    monkeypatch.setitem(sys.modules, "wandb", made)
    return made


@pytest.fixture
def settings(write_config, tmp_path):
    changes = ["track.tensorboard=true", "track.wandb=ours", f"track.profile={tmp_path / 'trace'}"]
    return config_lib.load(write_config(tmp_path), [*changes, "rest_em.rounds=1", "evaluate.during_training=false"])


def test_a_run_is_tracked_and_none_the_worse_for_it(settings, tiny_run, wandb, tmp_path, quick_compile, units):
    with quick_compile():
        loop.train(settings)
    expected = {name: unit for name, unit in units(tiny_run).items() if name.startswith("rounds/1/")}
    assert units(tmp_path / "run") == expected
    curves = points(tmp_path / "run" / "tensorboard")
    assert [step for step, _ in curves["sft/tokens_per_s"]] == [9], "after two groups of four steps each"
    assert [step for step, _ in curves["fit/tokens"]] == [2, 6] and "fit/utilisation" not in curves
    ((step, best),) = curves["reward/best"]
    rewards = [[e["reward"] for e in c["edits"]] for n in (0, 1) for c in expected[f"rounds/1/e_step/00{n}"]["contexts"]]
    assert step == 1 and best == pytest.approx(sum(map(max, rewards)) / 2)
    assert curves["loss/last"][0][1] == pytest.approx(expected["rounds/1/m_step"]["losses"][-1])
    (started,) = wandb.started
    assert (started["project"], started["name"], started["resume"]) == ("ours", "tiny", "allow") and wandb.finished == 1
    assert [x["step"] for x in wandb.logged if "step" in x] == list(range(1, 10))
    assert next(x for x in wandb.logged if "round" in x)["reward/best"] == pytest.approx(best)
    assert ("fit/*", "step") in wandb.axes and ("reward/*", "round") in wandb.axes
    (trace,) = (tmp_path / "trace").rglob("*.xplane.pb")
    assert b"_step" in trace.read_bytes(), "the fit step's name"
    # Gone on with: numbers go on, nothing is told twice, and it is the same run elsewhere.
    with RunStore.create_or_open(settings.run_dir, settings) as store, track.tracked(store, settings):
        health.tell("step", **dict.fromkeys(track.STEP, 1), kind="fit")
    assert "track.profile: no second group" in read_events(tmp_path / "run" / "events.jsonl")[-2]["message"]
    assert wandb.logged[-1]["step"] == 10 and wandb.started[1]["id"] == started["id"]


@pytest.mark.parametrize(("key", "value", "module"), [("tensorboard", True, "tensorboardX"), ("wandb", "ours", "wandb")])
def test_a_package_that_is_missing_is_named(settings, monkeypatch, key, value, module):
    monkeypatch.setitem(sys.modules, module, None)
    asked = dataclasses.replace(settings, track=config_lib.TrackConfig(**{key: value}))
    with pytest.raises(SealError, match=rf'^track.{key} needs the package {module}: pip install "seal_jax\[{key}\]"$'):
        loop.train(asked)


def test_what_wandb_refuses_is_one_line(settings, wandb):
    def init(**_):
        raise RuntimeError("no API key configured.\nUse `wandb login`")

    wandb.init = init
    with pytest.raises(SealError, match=r"^track.wandb='ours': no API key configured. Use `wandb login`$"):
        loop.train(dataclasses.replace(settings, track=config_lib.TrackConfig(wandb="ours")))


def test_curves_of_a_run_in_a_store_are_there_at_its_end(tmp_path):
    module = pytest.importorskip("tensorboardX")
    folder = place(f"memory:/{tmp_path}/run")
    board = track.TensorBoard(module, folder)
    board.add("step", 1, {"fit/tokens": 7.0})
    board.close()
    assert points(folder / "tensorboard") == {"fit/tokens": [(1, 7.0)]}


def test_wandb_keeps_its_own_files_on_this_machine(settings, wandb, tmp_path):
    track.Wandb(wandb, place("memory://bucket/run"), settings, "id")
    assert pathlib.Path(wandb.started[0]["dir"]).is_dir()
