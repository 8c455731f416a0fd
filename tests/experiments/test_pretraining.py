"""Continued pretraining on a tiny model: one model for many passages, results by passage, stopped and gone on with."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest

from seal_jax import config
from seal_jax.errors import SealError
from seal_jax.experiments import pretraining
from seal_jax.models.load import load_model
from seal_jax.runs import checkpoint

SFT = {"lora": {"rank": 4, "alpha": 8.0}, "learning_rate": 0.02, "epochs": 3, "batch_size": 2, "microbatch": 2, "row_length": 192}


@pytest.fixture(scope="module")
def settings(tmp_path_factory, write_config):
    """Two passages of one title, which must not be taken for each other."""
    folder = tmp_path_factory.mktemp("pretraining")
    section = {"sizes": [2, 1], "edits": 2, "group": 1, "sft": SFT, "checkpoint_every": 2}
    made = config.load(write_config(folder, pretraining=section))
    passages = json.loads((folder / "validation.json").read_text())
    passages[1]["title"] = passages[0]["title"]
    (folder / "validation.json").write_text(json.dumps(passages))
    return made


@pytest.fixture(scope="module")
def finished(settings, quick_compile, units):
    with quick_compile():
        pretraining.run(settings)
    return units(settings.run_dir)


def test_each_size_has_its_models_and_each_passage_its_results(finished, settings):
    rows = finished["table"]["rows"]
    assert [(r["policy"], r["method"], r["statistic"], r["contexts"], r["questions"]) for r in rows] == [
        (policy, method, "single", n, 2 * n)
        for policy, n in (("1", 1), ("2 at once", 2))
        for method in ("no adaptation", "passages only", "passages + self-edits")
    ]
    both = finished["evaluate/0002_passages/000"]
    assert len({r["id"] for r in both["contexts"]}) == 2 and len({r["title"] for r in both["contexts"]}) == 1
    for record in both["contexts"]:
        assert record["methods"]["no adaptation"][0] == finished["pretraining/start"]["answers"][record["id"]]
        assert len(record["edits"][0]["trials"][0]["outputs"]) == len(record["questions"]) == 2
    one = finished["evaluate/0001_passages/000"]
    assert one["sequences"]["passage only"] == 1 and both["sequences"]["passage only"] == 2
    lines = sum(len(r["edits"][0]["sequences"]) for r in both["contexts"])
    assert both["sequences"][pretraining.EDITS] == lines > 4
    assert len(both["losses"][pretraining.EDITS]) == 3 * -(-lines // 2)
    for losses in both["losses"].values():
        assert losses[-1] < losses[0]  # it learns


def test_every_model_starts_from_the_same_weights(finished, settings, units, tmp_path, quick_compile):
    """The larger size alone gives what it gives after the smaller one."""
    alone = config.load(f"{settings.run_dir}/config.yaml", ["pretraining.sizes=[2]", f"run_dir={tmp_path / 'run'}"])
    with quick_compile():
        pretraining.run(alone)
    assert units(alone.run_dir)["evaluate/0002_passages/000"] == finished["evaluate/0002_passages/000"]


def test_going_on_from_a_checkpoint_equals_not_stopping(finished, settings, units, tmp_path, quick_compile, monkeypatch):
    """Stopped in the middle of training, right after a checkpoint."""
    again = dataclasses.replace(settings, run_dir=str(tmp_path / "run"))
    written, save = [], checkpoint.save_adapters

    def stop_after(folder, *args):
        save(folder, *args)
        written.append(folder)
        if len(written) == 4:
            raise KeyboardInterrupt

    with quick_compile():
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(checkpoint, "save_adapters", stop_after)
            pretraining.run(again)
        assert checkpoint.is_complete(written[-1])
        pretraining.run(again)
    assert units(again.run_dir) == finished
    assert not list((tmp_path / "run" / "states").iterdir())  # of use no longer


def test_all_weights_train_and_the_model_can_be_kept(settings, units, tmp_path, quick_compile):
    changes = ["pretraining.sft.weights=full", "pretraining.sft.learning_rate=0.005", "pretraining.sizes=[2]", "pretraining.save=true"]
    full = config.load(f"{settings.run_dir}/config.yaml", [*changes, f"run_dir={tmp_path / 'run'}"])
    with quick_compile():
        pretraining.run(full)
    losses = units(full.run_dir)["evaluate/0002_passages/000"]["losses"][pretraining.EDITS]
    assert losses[-1] < losses[0] - 0.1
    before = load_model(full.model)
    folders = sorted((tmp_path / "run" / "models").iterdir())
    assert [f.name for f in folders] == ["passage_only_2_passages", "passages_and_self_edits_2_passages"]
    after = load_model(dataclasses.replace(full.model, name=str(folders[1])))
    moved = [
        np.abs(
            np.asarray(after.params[k]["scale" if "norm" in k else "embedding"])
            - np.asarray(before.params[k]["scale" if "norm" in k else "embedding"])
        ).max()
        for k in ("embed", "final_norm")
    ]
    assert min(moved) > 1e-3  # embeddings and norms too


def test_other_data_is_refused(finished, settings, tmp_path):
    shutil.copytree(settings.run_dir, tmp_path / "run")
    path = pathlib.Path(settings.task.validation)
    passages = path.read_text()
    try:
        path.write_text(json.dumps(list(reversed(json.loads(passages)))))
        with pytest.raises(SealError, match=r"holds results of other data than task.validation now has, at '0"):
            pretraining.run(dataclasses.replace(settings, run_dir=str(tmp_path / "run")))
    finally:
        path.write_text(passages)


def test_a_training_that_diverges_stops_the_run(settings, tmp_path, quick_compile):
    keys = ["pretraining.sft.learning_rate=1e38", "pretraining.sft.max_grad_norm=0", f"run_dir={tmp_path / 'run'}"]
    with quick_compile(), pytest.raises(SealError, match=r"training on passage only, 1 passage: diverged: .*lower pretraining"):
        pretraining.run(config.load(f"{settings.run_dir}/config.yaml", keys))


def test_too_few_passages_are_said(settings, tmp_path):
    with pytest.raises(SealError, match=r"pretraining.sizes=\[3\]: task.validation has 2 usable contexts"):
        pretraining.run(config.load(f"{settings.run_dir}/config.yaml", ["pretraining.sizes=[3]", f"run_dir={tmp_path / 'run'}"]))


def test_the_table_names_methods_as_the_experiment_does():
    trial = {"reward": 1.0, "verdicts": [True]}
    record = {
        "questions": [["q", "a"]],
        "methods": {"no adaptation": [trial]},
        "edits": [{"candidate": 0, "problem": None, "trials": [trial], "reward": 1.0}],
    }
    made = pretraining.summary(config.build({"task": {"name": "knowledge"}}), {1: [record]}, [])
    assert [r["method"] for r in made["rows"]] == ["no adaptation", pretraining.EDITS]
