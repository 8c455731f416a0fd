"""Runs by workers of a Ray cluster with two nodes on this machine: the results are those of a run of one process, whoever is lost."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from seal_jax import cli, config
from seal_jax.errors import SealError
from seal_jax.fleet import run as fleet_run
from seal_jax.runs.events import read_events
from seal_jax.sweep import config as sweep_config
from seal_jax.sweep import run as sweep_run
from seal_jax.sweep import table as sweep_table

ROOT = pathlib.Path(__file__).parents[2]
ray = pytest.importorskip("ray", reason='runs by Ray\'s workers; pip install "seal_jax[ray]"')


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    with (
        pytest.MonkeyPatch.context() as patch
    ):  # of the workers; programs as in `quick_compile`, so that they share what `tiny_run` compiled
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "node_ip_address": "127.0.0.2"})
        made.add_node(num_cpus=1, node_ip_address="127.0.0.3")
        ray.init(address=made.address, log_to_driver=False, logging_level="ERROR", _node_ip_address="127.0.0.2")
        yield made
        ray.shutdown()
        made.shutdown()


def by_workers(tiny_run, folder, *overrides):
    return config.load(
        tiny_run.parent / "config.yaml", ["executor.name=ray", "executor.workers=2", f"run_dir={folder}", "rest_em.rounds=2", *overrides]
    )


def strike(folder, unit, number, struck):
    """Sends the signal `number` to the first worker that claims a unit that begins with `unit`."""
    for _ in range(1200):
        events = read_events(folder / "events.jsonl")
        pids = {e["worker"]: e["pid"] for e in events if e["event"] == "worker_started"}
        if claims := [e["worker"] for e in events if e["event"] == "unit_claimed" and e["unit"].startswith(unit)]:
            os.kill(pids[claims[0]], number)
            struck.append(claims[0])
            return
        time.sleep(0.05)


def continued(tiny_run, folder, *done):
    """A run folder that has these units of `tiny_run` already: so that less is left to do here, and what is there is used."""
    for name in ("config.yaml", "versions.json", *done):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (tiny_run / name).is_dir() else shutil.copy
        copy(tiny_run / name, folder / name)
    return folder


def lost(folder):
    return {e["worker"]: e["reason"] for e in read_events(folder / "events.jsonl") if e["event"] == "worker_lost"}


def test_a_worker_that_is_killed_changes_nothing(cluster, tiny_run, tmp_path, units):
    folder, killed = continued(tiny_run, tmp_path / "run", "evaluate/before"), []
    watch = threading.Thread(target=strike, args=(folder, "rounds/1/e_step", signal.SIGKILL, killed))
    watch.start()
    table = fleet_run.train(by_workers(tiny_run, folder))
    watch.join()
    assert killed and list(lost(folder)) == killed
    assert table == json.loads((tiny_run / "table.json").read_text())
    assert units(folder) == units(tiny_run)
    events = read_events(folder / "events.jsonl")
    done = [e["unit"] for e in events if e["event"] == "unit_done" and e["unit"] != "table"]
    assert len(done) == len(set(done)), "each result is written once"
    assert {e["worker"].split(".")[0] for e in events if e["event"] == "unit_claimed"} == {"0", "1"}, "both slices worked"
    assert (folder / "policy/2/manifest.json").exists() and (folder / "report.html").exists()


def test_a_worker_that_stalls_is_replaced(cluster, tiny_run, tmp_path, units):
    """The claim of a stopped process is given to another after `executor.timeout`. It is short here, for a slow machine maybe too short:
    then workers are replaced that only were slow, which changes nothing either."""
    done = ("evaluate/before", "evaluate/after/000.json", "rounds", "policy")
    folder, stalled = continued(tiny_run, tmp_path / "run", *done), []
    watch = threading.Thread(target=strike, args=(folder, "evaluate/after/001", signal.SIGSTOP, stalled))
    watch.start()
    fleet_run.train(by_workers(tiny_run, folder, "executor.timeout=15", "executor.retries=20"))
    watch.join()
    assert stalled and "stalled" in lost(folder)[stalled[0]]
    assert units(folder) == units(tiny_run)


def test_a_worker_of_two_hosts(cluster, tiny_run, tmp_path, units):
    """Its processes share a mesh, so that results are those of one process but for rounding, which moves no answer here."""
    folder = tmp_path / "run"
    settings = by_workers(tiny_run, folder, "executor.workers=1", "executor.hosts=2", "executor.cpus=0.5", "rest_em.rounds=0")
    fleet_run.train(settings)
    found, expected = units(folder)["evaluate/before/000"], units(tiny_run)["evaluate/before/000"]
    for mine, other in zip(found["contexts"], expected["contexts"], strict=True):
        assert [e["text"] for e in mine["edits"]] == [e["text"] for e in other["edits"]]
        assert [e["reward"] for e in mine["edits"]] == [e["reward"] for e in other["edits"]]


def test_what_is_wrong_comes_as_one_line(cluster, tiny_run, tmp_path):
    settings = by_workers(tiny_run, tmp_path / "run", f"model.name={tmp_path}/nothing")
    with pytest.raises(SealError, match="nothing"):
        fleet_run.train(settings)
    assert read_events(tmp_path / "run" / "events.jsonl")[-1]["event"] == "stopped"
    with pytest.raises(SealError, match="not empty and not a run"):
        fleet_run.train(by_workers(tiny_run, tiny_run.parent))


def test_a_driver_that_is_told_to_end_does(tiny_run, tmp_path):
    """SIGTERM, which Ray would take for itself: code 143 and an end in the log, with a Ray of its own."""
    folder = continued(tiny_run, tmp_path / "run", "evaluate/before")
    command = [sys.executable, "-m", "seal_jax.cli", "train", tiny_run.parent / "config.yaml", "executor.name=ray", f"run_dir={folder}"]
    with open(tmp_path / "said", "w") as said:
        driver = subprocess.Popen(command, stdout=said, stderr=said, cwd=ROOT)
        end = time.monotonic() + 120
        while not any(e["event"] == "worker_started" for e in read_events(folder / "events.jsonl")):
            assert driver.poll() is None and time.monotonic() < end, (tmp_path / "said").read_text()
            time.sleep(0.1)
        driver.terminate()
        assert driver.wait(40) == 143, (tmp_path / "said").read_text()
    last = read_events(folder / "events.jsonl")[-1]
    assert last["event"] == "stopped" and "SIGTERM" in last["error"]


def test_a_sweep_on_the_cluster_with_a_trial_killed(cluster, tiny_run, tmp_path):
    """A trial whose process is lost is started again by Ray Tune, goes on in its run folder, and has the numbers of a run alone."""
    killed, path = [], tmp_path / "sweep.yaml"
    said = {"name": "two", "base": str(tiny_run.parent / "config.yaml"), "run": "evaluate", "run_dir": str(tmp_path / "sweep")}
    path.write_text(json.dumps({**said, "concurrent": 2, "space": {"fit.learning_rate": [0.02, 0.01]}}))

    def strike():
        while not killed:
            for folder in (tmp_path / "sweep/trials").glob("*/"):
                events = read_events(folder / "events.jsonl")
                if any(e["event"] == "unit_done" for e in events):
                    os.kill(events[0]["pid"], signal.SIGKILL)
                    killed.append(folder.name)
                    return
            time.sleep(0.02)

    watch = threading.Thread(target=strike, daemon=True)
    watch.start()
    rows = sweep_run.run(sweep_config.load(path))["rows"]
    watch.join(1)
    assert killed and [row["status"] for row in rows] == ["done", "done"]
    events = read_events(tmp_path / "sweep/trials" / killed[0] / "events.jsonl")
    assert {"created", "opened"} <= {e["event"] for e in events}
    assert [e["unit"] for e in events if e["event"] == "unit_done"].count("evaluate/before/000") == 1, "it went on"
    (same,) = [row for row in rows if row["settings"]["fit.learning_rate"] == 0.02]
    assert same["result"] == sweep_table.result(json.loads((tiny_run / "table.json").read_text()), "base")


def test_the_command_line_runs_by_workers(cluster, tiny_run, tmp_path, capsys):
    folder = continued(tiny_run, tmp_path / "run", "evaluate", "rounds", "policy")
    overrides = ["executor.name=ray", f"run_dir={folder}", "rest_em.rounds=2"]
    assert cli.main(["train", str(tiny_run.parent / "config.yaml"), *overrides]) == 0
    assert "passage + self-edit" in capsys.readouterr().out
    assert json.loads((folder / "table.json").read_text()) == json.loads((tiny_run / "table.json").read_text())
    assert cli.main(["continual", str(tiny_run.parent / "config.yaml"), *overrides]) == 2
    assert "train and evaluate run by workers, continual does not" in capsys.readouterr().err
