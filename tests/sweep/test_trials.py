"""Trials through a local Ray. Where it is about Ray alone, a function stands in for the run, which takes no time."""

import functools
import json
import pathlib
import types

import pytest

from seal_jax import cli
from seal_jax.runs import files
from seal_jax.sweep import config as sweep_config
from seal_jax.sweep import run as sweep_run
from seal_jax.sweep import table as table_lib


@pytest.fixture
def seal(capsys):
    """`seal(...)` runs a command in this process: (exit code, standard output, standard error)."""

    def run(*arguments):
        capsys.readouterr()
        return cli.main([str(a) for a in arguments]), *capsys.readouterr()

    return run


@pytest.fixture
def stand_in(one_ray, monkeypatch, tmp_path):
    """Trials whose reward and accuracy are their learning rate; gives the file in which each leaves a line.

    One with a rate below a thousandth kills its process, unless the file `mended` is there.
    """
    calls, mended = tmp_path / "calls", tmp_path / "mended"
    calls.touch()

    def measure(run, config, report):
        import os

        rate, rewards = config.fit.learning_rate, []
        with open(calls, "a") as file:
            file.write(f"{rate:.6g} {os.environ['NPROC']} {os.environ['JAX_PLATFORMS']} {os.getpid()}\n")
        if rate < 1e-3 and not mended.exists():
            os._exit(3)
        for number in range(1, config.rest_em.rounds + 1):
            rewards.append(rate)
            report({"round": number, "rewards": list(rewards), "seconds": 1.0})
        found = {"mean": rate, "low": rate, "high": rate, "gain": None, "gain_low": None, "gain_high": None, "ungraded": 0}
        return {"round": len(rewards), "rewards": rewards, "seconds": 2.0, "table": {"rows": [found]}, "result": found}

    monkeypatch.setattr(one_ray, "run", functools.partial(one_ray.run, measure=measure))
    return calls


def rates(rows, status):
    return [row["settings"]["fit.learning_rate"] for row in rows if row["status"] == status]


def test_a_grid_of_real_trials(one_ray, seal, write_sweep, tiny_run, tmp_path):
    """Each trial is a run folder as the library makes it. One that fails is a row that says why, and the others go on."""
    missing = tmp_path / "missing.json"
    space = {"fit.learning_rate": [0.02], "task.validation": [str(tmp_path / "validation.json"), str(missing)]}
    sweep = write_sweep(run="evaluate", space=space, set={}, concurrent=2)
    code, out, err = seal("sweep", sweep)
    assert code == 2 and err.splitlines()[-1] == "seal-jax: 1 of 2 trials failed, as the table says; the same command tries them again"
    assert len([line for line in err.splitlines() if line.startswith("trial ")]) == 2, "a line a trial"
    table = json.loads((tmp_path / "sweep/sweep.json").read_text())
    good, bad = table["rows"]
    assert (good["status"], bad["status"]) == ("done", "failed") and f"data source {missing}: no such file" in bad["problem"]
    assert f"failed: data source {missing}" in out and out.splitlines()[-2:] == [
        f"table: {tmp_path / 'sweep/sweep.json'}",
        f"plot:  {tmp_path / 'sweep/sweep.svg'}",
    ]
    alone = json.loads((tiny_run / "table.json").read_text())
    assert good["result"] == table_lib.result(alone, "base"), "the same as in a run alone"
    assert pathlib.Path(f"{good['run']}.log").read_text().strip(), "what the trial printed"


def test_a_crash_is_a_row_and_the_others_go_on(stand_in, write_sweep, tmp_path):
    sweep = sweep_config.load(
        write_sweep(search="random", trials=3, concurrent=2, retries=1, space={"fit.learning_rate": [0.0005, 0.01, 0.02]})
    )
    rows = sweep_run.run(sweep)["rows"]
    assert rates(rows, "done") == [0.02, 0.01], "best first"
    assert rates(rows, "failed") == [0.0005] and rows[-1]["problem"].startswith("its process died: ")
    called = [line.split() for line in stand_in.read_text().splitlines()]
    assert len({pid for *_, pid in called}) == 4, "each in a process of its own, the one that died once more"
    assert {(threads, platform) for _, threads, platform, _ in called} == {("1", "cpu")}
    (tmp_path / "mended").touch()
    assert rates(sweep_run.run(sweep)["rows"], "done") == [0.02, 0.01, 0.0005]
    assert len(stand_in.read_text().splitlines()) == 5, "finished ones are not run again"


def test_optuna_goes_on_from_what_is_known_and_asha_stops_trials(stand_in, write_sweep, monkeypatch):
    said = {
        **{"search": "optuna", "trials": 2, "seed": 4, "asha": {"grace": 1, "factor": 2}, "set": {"rest_em.rounds": 3}},
        "space": {"fit.learning_rate": {"low": 1e-3, "high": 1e-1, "log": True}},
    }
    rows = sweep_run.run(sweep_config.load(write_sweep(**said)))["rows"]
    done, stopped = rates(rows, "done"), rates(rows, "stopped")
    assert len(done) == len(stopped) == 1 and stopped < done
    assert [len(row["rewards"]) for row in rows] == [3, 1] and rows[1]["result"] is None, "after its first round"

    from seal_jax.sweep import optuna_search

    made = []
    real = optuna_search.OptunaTrials
    monkeypatch.setattr(optuna_search, "OptunaTrials", lambda *given: made.append(real(*given)) or made[0])
    other = {**json.loads(json.dumps(rows[0])), "trial": "other", "settings": {"fit.epochs": 3}, "table": None}
    files.write_atomic(stand_in.parent / "sweep/records/other.json", files.dump(other))  # of another space, which is not ours to count
    more = sweep_run.run(sweep_config.load(write_sweep(**{**said, "trials": 3})))["rows"]
    assert len(more) == 3 and [row for row in more if row["settings"] in [r["settings"] for r in rows]] == rows
    assert len(stand_in.read_text().splitlines()) == 3, "only what is new was run"
    past = made[0]._study.trials[:2]
    assert sorted(t.params["fit.learning_rate"] for t in past) == sorted(done + stopped)
    assert sorted(t.value for t in past if t.state.name == "COMPLETE") == sorted(done)
    assert sorted(max(t.intermediate_values.values()) for t in past if t.state.name == "PRUNED") == sorted(stopped)
    assert made[0]._study.trials[2].params["fit.learning_rate"] not in done + stopped, "no draw comes twice"


def test_asha_is_told_of_finished_trials(one_ray, write_sweep):
    path = write_sweep(space={"fit.learning_rate": [0.1, 0.2]}, asha={"grace": 1, "factor": 2}, set={"rest_em.rounds": 3})
    sweep = sweep_config.load(path)
    known = [{"trial": str(n), "rewards": [0.5, 0.5, 0.5]} for n in range(2)]
    new = types.SimpleNamespace(trial_id="new")
    for records, reward, decision in ((known, 0.4, "STOP"), (known, 0.6, "CONTINUE"), ([], 0.4, "CONTINUE")):
        scheduler = one_ray.scheduler(sweep, records)
        scheduler.on_trial_add(None, new)
        assert scheduler.on_trial_result(None, new, {"round": 1, "reward": reward}) == decision


def test_resources_that_are_not_there_are_refused(one_ray):
    from seal_jax.errors import SealError
    from seal_jax.sweep.config import ResourcesConfig

    one_ray.check(ResourcesConfig(cpu=2), {"CPU": 2.0})
    with pytest.raises(SealError, match=r"resources.gpu=1: this machine has 0; set less, or RAY_ADDRESS"):
        one_ray.check(ResourcesConfig(gpu=1), {"CPU": 2.0})
