"""Continual self-edits on a tiny model: the methods do what they say, and a run can be stopped and gone on with."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from seal_jax import config
from seal_jax.errors import SealError
from seal_jax.experiments import continual
from seal_jax.rest_em import loop
from seal_jax.rest_em import stage as stage_lib
from seal_jax.rest_em.policy import Policy
from seal_jax.runs import checkpoint
from seal_jax.runs.store import RunStore

METHODS = {
    "replay": {"replay": 3},
    "anchored": {"anchor": 100.0},
    "refusing": {"gate": {"measure": "kl", "budget": 0.0, "scales": [1.0, 0.5]}},
    "scaling": {"gate": {"measure": "kl", "budget": 0.04, "scales": [1.0, 0.5, 0.1]}},
    "by answers": {"gate": {"measure": "answers", "budget": 1.0}},
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory, write_config):
    texts = tmp_path_factory.mktemp("texts") / "texts.txt"
    texts.write_text("Jumpy zebras quiz 17 vexed foxes? No!\n\nA quick judge waxes; he hums.\n")
    section = {"sequences": 1, "passages": 2, "methods": METHODS, "texts": str(texts)}
    return config.load(write_config(tmp_path_factory.mktemp("continual"), continual=section))


@pytest.fixture(scope="module")
def finished(settings, quick_compile, units):
    with quick_compile():
        continual.run(settings)
    return units(settings.run_dir)


def lanes(finished, step):
    return {lane["method"]: lane for lane in finished[f"continual/steps/{step:03d}"]["lanes"]}


def test_every_passage_so_far_is_asked(finished):
    order = finished["continual/start"]["sequences"][0]
    for step in (0, 1):
        assert set(lanes(finished, step)) == {"sequential", *METHODS}
        for lane in lanes(finished, step).values():
            assert lane["context"] == order[step] and list(lane["answers"]) == order[: step + 1]


def test_methods_are_as_sequential_where_they_have_nothing_to_do(finished):
    """Replay at the first passage, and a gate with room for everything: the same draws, the same outcome."""
    first, second = lanes(finished, 0), lanes(finished, 1)
    for lane in (first["replay"], first["by answers"], second["by answers"]):
        plain = (first if lane["context"] == first["sequential"]["context"] else second)["sequential"]
        assert {k: v for k, v in lane.items() if k not in ("method", "bits")} == {
            k: v for k, v in plain.items() if k not in ("method", "bits")
        }
        assert lane["bits"] == pytest.approx(plain["bits"], rel=1e-5)


def test_replay_trains_on_earlier_sequences_again(finished):
    first, second = lanes(finished, 0)["replay"], lanes(finished, 1)["replay"]
    again = second["sequences"][-second["replayed"] :]
    assert second["replayed"] == min(3, len(first["sequences"])) > 0
    assert set(again) <= set(first["sequences"])
    assert second["steps"] > lanes(finished, 1)["sequential"]["steps"] and second["bits"] != lanes(finished, 1)["sequential"]["bits"]


def test_an_anchored_edit_moves_less(finished):
    base = finished["continual/start"]["bits"]
    plain, anchored = (abs(lanes(finished, 1)[name]["bits"] - base) for name in ("sequential", "anchored"))
    assert anchored < 0.5 * plain


def test_gates_refuse_and_scale_down_with_a_reason(finished):
    base = finished["continual/start"]
    for step in (0, 1):
        refused, scaled = lanes(finished, step)["refusing"], lanes(finished, step)["scaling"]
        assert refused["scale"] == 0.0 and refused["gate"].startswith("refused: bits per token by which predictions moved")
        assert refused["bits"] == pytest.approx(base["bits"], rel=1e-5)  # nothing was learnt
        assert {k: v["outputs"] for k, v in refused["answers"].items()} == {k: base["answers"][k]["outputs"] for k in refused["answers"]}
        assert scaled["gate"] is None if scaled["scale"] == 1.0 else scaled["gate"].endswith("; budget 0.04")
    scales = [lanes(finished, step)["scaling"]["scale"] for step in (0, 1)]
    assert any(0 < scale < 1 for scale in scales)  # or nothing was tested


def test_held_adapters_equal_merged_weights(finished, settings, quick_compile):
    """The answers of the sequential lane at the end, by its adapters merged into the weights one after the other."""
    store = RunStore(settings.run_dir)
    with quick_compile():
        stage = stage_lib.build(settings, ("validation",))
        number = list(lanes(finished, 1)).index("sequential")
        for step in (0, 1):
            part, _ = checkpoint.load_adapters(store.folder / "adapters" / f"{step:03d}")
            stage.policy.merge(_lane(part, number), 1.0)
        ended = lanes(finished, 1)["sequential"]
        contexts = {c.id: c for c in stage.contexts["validation"]}
        outputs = stage.policy.answer([stage.task.probes(contexts[name]) for name in ended["answers"]])
        assert outputs == [trial["outputs"] for trial in ended["answers"].values()]
        texts = stage.policy.texts(continual.general.texts(settings.continual.texts))
        np.testing.assert_allclose(stage.policy.bits(texts)[0], ended["bits"], rtol=1e-5)


def _lane(tree, number):
    return {k: _lane(v, number) if isinstance(v, dict) else v[number] for k, v in tree.items()}


def test_going_on_equals_not_stopping(finished, settings, units, quick_compile):
    """Stopped after the first passage; and with the last passage's adapters lost."""
    store = RunStore(settings.run_dir)
    for gone in ("table", "continual/steps/001"):
        store._path(gone).unlink()
    shutil.rmtree(store.folder / "adapters" / "001")
    with quick_compile():
        continual.run(settings)
        assert units(settings.run_dir) == finished
        shutil.rmtree(store.folder / "adapters" / "001")
        store._path("table").unlink()
        continual.run(settings)
    assert units(settings.run_dir) == finished


def test_other_data_is_refused(finished, settings, tmp_path):
    shutil.copytree(settings.run_dir, tmp_path / "run")
    (tmp_path / "texts.txt").write_text("Something else is held now.\n")
    validation = json.loads(pathlib.Path(settings.task.validation).read_text())
    validation[0]["questions"][0]["answer"] = "another"
    (tmp_path / "validation.json").write_text(json.dumps(validation))
    for key, path in (("continual.texts", "texts.txt"), ("task.validation", "validation.json")):
        changed = config.load(f"{settings.run_dir}/config.yaml", [f"{key}={tmp_path / path}", f"run_dir={tmp_path / 'run'}"])
        (tmp_path / "run/config.yaml").write_text(config.to_yaml(changed))  # as if the file of that name had changed
        with pytest.raises(SealError, match=f"holds results of other data than {key} now has, at '0"):
            continual.run(changed)


def test_folders_of_other_commands_are_refused(finished, settings, tiny_run):
    with pytest.raises(SealError, match=r"holds what `seal-jax continual` made; choose another run_dir for evaluate"):
        loop.evaluate_only(settings)
    with pytest.raises(SealError, match=r"holds what `seal-jax train` made; choose another run_dir for continual"):
        continual.run(config.load(tiny_run / "config.yaml"))


def test_a_step_without_a_usable_self_edit_changes_nothing(settings, tmp_path, units, quick_compile, monkeypatch):
    """Nor does it stop the run, whether the number of slots is set or to be found."""
    monkeypatch.setattr(Policy, "write", lambda self, prompts, keys, *_: [["\n"] for _ in keys])
    changes = ["fit.slots=null", "continual.passages=2", f"run_dir={tmp_path / 'run'}"]
    with quick_compile():
        table = continual.run(config.load(f"{settings.run_dir}/config.yaml", changes))
    found = units(tmp_path / "run")
    for lane in [*lanes(found, 0).values(), *lanes(found, 1).values()]:
        assert lane["problem"] and lane["scale"] == 0.0 and lane["steps"] == 0
        assert lane["bits"] == pytest.approx(found["continual/start"]["bits"], rel=1e-5)
    assert [row["unusable"] for row in table["rows"]] == [0, *[2] * 6]


def test_one_writer_for_all_methods(settings, tmp_path, units, quick_compile):
    """With the policy before as the writer, all lanes of a sequence learn the same self-edits, at the second passage too."""
    changes = ["continual.writer=base", "continual.methods.replay.replay=0", f"run_dir={tmp_path / 'run'}"]
    with quick_compile():
        continual.run(config.load(f"{settings.run_dir}/config.yaml", changes))
    for step in (0, 1):
        assert len({lane["edit"] for lane in lanes(units(tmp_path / "run"), step).values()}) == 1


def test_too_few_passages_are_said(settings, tmp_path):
    with pytest.raises(SealError, match=r"continual.passages=3: task.validation has 2 usable contexts"):
        continual.run(config.load(f"{settings.run_dir}/config.yaml", ["continual.passages=3", f"run_dir={tmp_path / 'run'}"]))
