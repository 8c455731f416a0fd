"""The folder of a sweep, and what is refused before anything of it is run."""

import json
import shutil
import sys

import pytest

import seal_jax.sweep
from seal_jax import cli
from seal_jax import config as config_lib
from seal_jax.errors import SealError
from seal_jax.runs import files
from seal_jax.sweep import config as sweep_config
from seal_jax.sweep import run as sweep_run
from seal_jax.sweep import space as space_lib
from seal_jax.sweep import table as table_lib
from seal_jax.sweep import trial as trial_lib
from seal_jax.sweep.config import ResourcesConfig

SPACE = {"fit.epochs": [1, 2]}


def test_without_ray_one_line_says_what_to_install(write_sweep, monkeypatch, capsys, tmp_path):
    monkeypatch.delitem(sys.modules, "seal_jax.sweep.trials", raising=False)
    monkeypatch.delattr(seal_jax.sweep, "trials", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cli.main(["sweep", str(write_sweep(space=SPACE))]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == 'seal-jax: search=grid needs Ray Tune (ray is missing): pip install "seal_jax[ray]"'
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_over_what_self_edits_choose_is_refused(write_sweep, tmp_path):
    (tmp_path / "arc.yaml").write_text("task: {name: arc}")
    for search in ("grid", "lanes"):
        sweep = sweep_config.load(write_sweep(search=search, space={"fit.learning_rate": [1e-3, 2e-3]}, base="arc.yaml", set={}))
        with pytest.raises(SealError, match=r"space.fit.learning_rate: self-edits of the task 'arc' choose it themselves"):
            sweep_run.run(sweep)


def opened(path):
    with sweep_run._folder(sweep_config.load(path)):
        pass


def test_a_folder_goes_on_with_the_same_config_alone(write_sweep, tmp_path):
    opened(write_sweep(space=SPACE))
    opened(write_sweep(space={**SPACE, "fit.learning_rate": [0.1]}, name="other"))
    opened(
        write_sweep(
            space=SPACE, set={"rest_em.rounds": 1, "evaluate.contexts": 1, "evaluate.edits": 1, "evaluate.seeds": 1, "answer.rows": 2}
        )
    )
    with pytest.raises(SealError, match=r"holds a run with rest_em.rounds=1, the config has rest_em.rounds=2"):
        opened(write_sweep(space=SPACE, set={"rest_em.rounds": 2}))
    sweep = sweep_config.load(write_sweep(space=SPACE))
    with sweep_run._folder(sweep), pytest.raises(SealError, match="another process runs this sweep"):
        opened(write_sweep(space=SPACE))
    files.write_atomic(tmp_path / "sweep/records/a.json", files.dump({"does": "evaluate", "trial": "a"}))
    with pytest.raises(SealError, match="holds trials that evaluate, run=train; choose another run_dir"):
        sweep_run.read_records(sweep)


def test_results_of_another_config_are_not_shown_as_those_of_this_one(write_sweep, tmp_path):
    """A key that is swept in between may have another value in the config when it no longer is."""
    rate = {"fit.learning_rate": [0.1]}
    first = sweep_config.load(write_sweep(space=rate, set={"rest_em.rounds": 1, "fit.epochs": 4}))
    (settings,) = first.settings()
    name = space_lib.digest(settings)
    run_dir = tmp_path / "sweep" / "trials" / name
    files.write_atomic(run_dir / "config.yaml", config_lib.to_yaml(first.trial(settings, str(run_dir))).encode())
    files.write_atomic(tmp_path / f"sweep/records/{name}.json", files.dump({"does": first.run, "trial": name, "settings": settings}))
    assert list(sweep_run.read_records(first)) == [name]
    other = sweep_config.load(write_sweep(space={**rate, "fit.epochs": [1]}, set={"rest_em.rounds": 1}))
    assert list(sweep_run.read_records(other)) == [name], "of another space, and not shown"
    with pytest.raises(SealError, match=rf"{name}: holds a run with fit.epochs=4, the config has fit.epochs=1; "):
        sweep_run.read_records(sweep_config.load(write_sweep(space=rate, set={"rest_em.rounds": 1, "fit.epochs": 1})))


def test_a_trial_tells_the_rounds_of_its_run(tiny_run, tmp_path, monkeypatch, quick_compile):
    """On a finished run, where nothing is left to compute."""
    from seal_jax.rest_em import loop

    folder = shutil.copytree(tiny_run, tmp_path / "copy")
    config = config_lib.load(folder / "config.yaml", [f"run_dir={folder}"])
    monkeypatch.setattr(loop, "measure", None)
    told = []
    with quick_compile():
        found = trial_lib.measure("train", config, told.append)
    means = []
    for number in (1, 2):
        contexts = [json.loads((folder / f"rounds/{number}/e_step/{unit}.json").read_text())["contexts"][0] for unit in ("000", "001")]
        means.append(sum(sum(e["reward"] for e in c["edits"]) / len(c["edits"]) for c in contexts) / 2)
    assert [(t["round"], t["rewards"]) for t in told] == [(1, pytest.approx(means[:1])), (2, pytest.approx(means))]
    table = json.loads((folder / "table.json").read_text())
    assert found["table"] == table and found["result"] in table["rows"] and found["result"]["policy"] == "after 2 rounds"
    assert found["seconds"] > 0 and table_lib.score(found) == found["result"]["mean"]


@pytest.mark.parametrize(
    ("resources", "told"),
    [
        (ResourcesConfig(), {"NPROC": "1", "JAX_PLATFORMS": "cpu"}),
        (ResourcesConfig(cpu=8, gpu=1), {"NPROC": "8"}),
        (ResourcesConfig(cpu=2, gpu=0.5), {"NPROC": "2", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.450"}),
        (ResourcesConfig(cpu=4, tpu=4), {"NPROC": "4"}),
    ],
)
def test_a_trials_process_has_what_it_was_given(resources, told):
    assert trial_lib.environment(resources) == told


def test_a_server_that_cannot_grade_stops_a_sweep_before_its_trials(write_sweep, tmp_path):
    pytest.importorskip("ray", reason="trials need Ray; pip install seal_jax[ray]")
    said = {"rest_em.rounds": 1, "grade.name": "endpoint", "grade.base_url": "http://127.0.0.1:9/v1"}
    sweep = sweep_config.load(write_sweep(space={"rest_em.keep": [1, 2]}, set=said))
    with pytest.raises(SealError, match=r"127\.0\.0\.1:9/v1 cannot be reached"):
        sweep_run.run(sweep)
    assert not (tmp_path / "sweep").exists()


def test_trials_of_other_data_are_told(tmp_path):
    def row(trial, digest, settings):
        (tmp_path / trial).mkdir(exist_ok=True)
        (tmp_path / trial / "data.json").write_text(json.dumps({"task.train": [["a", digest]]}))
        return {"trial": trial, "run": str(tmp_path / trial), "settings": settings}

    rates = [{"fit.learning_rate": rate} for rate in (1, 2, 3)]
    same = [row(trial, "1", settings) for trial, settings in zip("abc", rates, strict=True)]
    assert sweep_run.of_other_data({"rows": [*same, {"trial": "z", "run": str(tmp_path / "none"), "settings": {}}]}) == []
    other = {"rows": [*same[:2], row("c", "2", rates[2])]}
    assert sweep_run.of_other_data(other) == ["NOT COMPARABLE: the data files were others for c than for most trials"]
    assert sweep_run.of_other_data({"rows": [{**found, "settings": {"task.train": "x"}} for found in other["rows"]]}) == []


def test_an_error_is_one_line():
    assert trial_lib.reason(SealError("a: b")) == "a: b"
    assert trial_lib.reason(ValueError("x\n  y")) == "ValueError: x y" and trial_lib.reason(KeyError()) == "KeyError"


def test_trials_in_a_bucket_are_refused_before_anything_is_made(write_sweep):
    sweep = sweep_config.load(write_sweep(space={"fit.epochs": [1]}, run_dir="memory://bucket/sweep"))
    with pytest.raises(SealError, match=r"run_dir=memory://bucket/sweep: only a sweep of lanes can be in a bucket"):
        sweep_run.run(sweep)
    assert not sweep.folder.exists()
