import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest

from seal_jax import config as config_lib
from seal_jax import tasks
from seal_jax.errors import SealError
from seal_jax.rest_em import loop
from seal_jax.rest_em import stage as stage_lib
from seal_jax.rest_em.policy import Policy
from seal_jax.runs import checkpoint
from seal_jax.runs.events import read_events
from seal_jax.runs.store import RunStore


@pytest.fixture(scope="module", autouse=True)
def quick(quick_compile):
    with quick_compile():
        yield


@pytest.fixture(scope="module")
def base(tiny_run):
    """The config of the finished run, to be replaced in parts."""
    return config_lib.load(tiny_run / "config.yaml")


@pytest.fixture(scope="module")
def stage(base):
    """Policy, task and contexts at the start of the run. Not for tests that change the policy."""
    return stage_lib.build(base, ("train", "validation"))


def with_config(stage, **sections):
    """The same stage under another config: `with_config(stage, rest_em={"edits": 3})`."""
    config = stage.policy.config
    changes = {
        name: dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value for name, value in sections.items()
    }
    policy = type(stage.policy).__new__(type(stage.policy))
    policy.__dict__ = {**stage.policy.__dict__, "config": dataclasses.replace(config, **changes)}
    return dataclasses.replace(stage, policy=policy)


def fresh(base):
    return stage_lib.build(base, ("train",))


def texts(records):
    return {(r["id"], e["candidate"]): e["text"] for r in records for e in r["edits"]}


def losses(records):
    edits = [(r["id"], e) for r in records for e in r["edits"]]
    return {(name, e["candidate"], t["seed"]): (t["loss_first"], t["loss_last"]) for name, e in edits for t in e["trials"]}


def e_step_records(folder, number):
    return [c for unit in ("000", "001") for c in RunStore(folder).read(f"rounds/{number}/e_step/{unit}")["contexts"]]


def test_e_step_draws_depend_on_seed_round_context_and_candidate_alone(tiny_run, stage, base, tmp_path):
    def e_step(name, number=1, **sections):
        with RunStore.create_or_open(tmp_path / name, base) as store:
            return loop.e_step(with_config(stage, **sections), store, number)

    before = e_step_records(tiny_run, 1)
    together = e_step("together", rest_em={"group": 2, "edits": 3})
    assert texts(before).items() <= texts(together).items() and len(texts(together)) == 6, "neither on the group nor on K"
    for key, value in losses(before).items():
        np.testing.assert_allclose(losses(together)[key], value, rtol=1e-4)
    first = {key: text for key, text in texts(before).items() if key[0].startswith("00000")}
    other_seed = texts(e_step("seed", rest_em={"contexts": 1, "seeds": 1}, seed=1))
    assert other_seed.keys() == first.keys() and not set(other_seed.values()) & set(first.values())
    # The same context in another round: 4 contexts, one a round, so that round 5 has the first again.
    fifth = texts(e_step("round", number=5, rest_em={"contexts": 1, "seeds": 1}))
    assert fifth.keys() == first.keys() and not set(fifth.values()) & set(first.values())


def test_answers_are_graded_elsewhere_while_the_next_group_is_measured(tiny_run, stage, base, tmp_path, monkeypatch):
    order = []

    class Elsewhere:
        grader = stage.task.grader

        def begin(self, items):
            order.append("asked")
            return lambda: order.append("waited") or self.grader.grade(items)

    adapt = Policy.adapt
    monkeypatch.setattr(Policy, "adapt", lambda *args, **options: order.append("fitted") or adapt(*args, **options))
    stage = dataclasses.replace(stage, task=tasks.build(base.task, Elsewhere()))
    with RunStore.create_or_open(tmp_path / "elsewhere", base) as store:
        records = loop.e_step(stage, store, 1)
        assert [name for name in store.names() if "e_step" in name] == ["rounds/1/e_step/000", "rounds/1/e_step/001"]
    assert order == ["fitted", "asked", "fitted", "asked", "waited", "waited"]
    assert records == e_step_records(tiny_run, 1)


def test_rounds_take_the_next_contexts(tiny_run):
    chosen = [[c["title"] for c in e_step_records(tiny_run, n)] for n in (1, 2)]
    assert chosen == [["Orsk", "Vell"], ["Mard", "Tine"]]


@pytest.mark.parametrize(("count", "offset", "taken"), [(2, 0, "ab"), (2, 2, "cd"), (3, 3, "dea"), (2, 10, "ab"), (9, 4, "eabcd")])
def test_take_goes_round_and_takes_nobody_twice(count, offset, taken):
    assert "".join(loop.take("abcde", count, offset)) == taken


def record(name, unadapted, *rewards):
    return {
        "id": name,
        "methods": {"no adaptation": [{"reward": unadapted}]},
        "edits": [{"candidate": k, "text": f"{name} sells {k}", "reward": reward} for k, reward in enumerate(rewards)],
    }


def test_choose_by_each_rule(base):
    records = [record("a", 0.5, 0.0, 1.0, 0.75), record("b", 0.5, 0.25, 0.5), record("c", None, None, 0.1)]

    def kept(**rest_em):
        found = loop.choose(dataclasses.replace(base, rest_em=dataclasses.replace(base.rest_em, **rest_em)), records)
        assert found["contexts"] == 3
        return [(k["context"], k["candidate"], k["reward"], k["unadapted"]) for k in found["kept"]]

    assert kept(select="best") == [("a", 1, 1.0, 0.5), ("b", 1, 0.5, 0.5), ("c", 1, 0.1, None)]
    assert [k[:2] for k in kept(select="top", keep=2)] == [("a", 1), ("a", 2), ("b", 1), ("b", 0), ("c", 1)]
    assert [k[:2] for k in kept(select="gain")] == [("a", 1), ("a", 2)]


def test_an_unusable_self_edit_is_never_kept(base):
    """Not even where all earn nothing, and it is the first of them: it would teach what is no self-edit."""
    first = record("a", 0.0, 0.0, 0.0)
    first["edits"][0]["problem"] = "no usable line in the self-edit"
    for select, kept in (("best", [1]), ("top", [1])):
        config = dataclasses.replace(base, rest_em=dataclasses.replace(base.rest_em, select=select, keep=2))
        assert [k["candidate"] for k in loop.choose(config, [first])["kept"]] == kept
    first["edits"][1]["problem"] = "the same"
    assert not loop.choose(base, [first])["kept"]


def test_a_round_that_keeps_nothing_leaves_the_policy_as_it_is(stage, base, tmp_path):
    nobody = with_config(stage, rest_em={"select": "gain"})
    params = nobody.policy.params
    with RunStore.create_or_open(tmp_path / "run", base) as store:
        loop.m_step(nobody, store, 1, [record("a", 0.5, 0.5, 0.25), record("b", None, 1.0)])
        assert nobody.policy.params is params
        assert store.read("rounds/1/selection") == {"kept": [], "contexts": 2}
        assert store.read("rounds/1/m_step") == {"pairs": 0, "steps": 0, "losses": []}
        assert not (tmp_path / "run" / "policy").exists()
        assert loop.rounds_done(store) == 1
        stage_lib.restore(nobody.policy, store, 1)
        assert nobody.policy.params is params


def test_the_m_step_changes_the_policy_and_goes_on_from_its_checkpoint(tiny_run, base, tmp_path, monkeypatch):
    shutil.copytree(tiny_run, tmp_path / "run")
    folder = tmp_path / "run"
    start = fresh(base).policy
    weights = np.asarray(start.params["layers"]["attn"]["q_proj"]["kernel"])
    stage_lib.restore(start, RunStore(folder), 1)
    after = np.asarray(start.params["layers"]["attn"]["q_proj"]["kernel"])
    assert np.abs(after - weights).max() > 1e-3
    done = RunStore(folder).read("rounds/1/m_step")
    assert done["pairs"] == 2 and done["losses"][-1] < done["losses"][0]
    records = e_step_records(folder, 1)

    def again():
        here = fresh(base)
        with RunStore.create_or_open(folder, base) as store:
            loop.m_step(here, store, 1, records)
        return np.asarray(here.policy.params["layers"]["attn"]["q_proj"]["kernel"])

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "tune", None)  # not called: the checkpoint is there
        np.testing.assert_array_equal(again(), after)
    # Killed after the checkpoint, before the unit; and killed before the checkpoint was whole.
    (folder / "rounds/1/m_step.json").unlink()
    np.testing.assert_array_equal(again(), after)
    (folder / "policy/1/manifest.json").unlink()
    np.testing.assert_array_equal(again(), after)
    assert checkpoint.is_complete(folder / "policy/1")
    redone = RunStore(folder).read("rounds/1/m_step")
    assert redone["losses"] == done["losses"]


def test_rounds_done_counts_from_the_first(tiny_run, tmp_path):
    assert loop.rounds_done(RunStore(tiny_run)) == 2
    assert loop.rounds_done(RunStore(tmp_path)) == 0
    (tmp_path / "rounds/2").mkdir(parents=True)
    (tmp_path / "rounds/2/m_step.json").write_text("{}")
    assert loop.rounds_done(RunStore(tmp_path)) == 0


def test_a_finished_run_computes_nothing_again(tiny_run, base, tmp_path, monkeypatch, units):
    shutil.copytree(tiny_run, tmp_path / "run")
    monkeypatch.setattr(loop, "measure", None)
    monkeypatch.setattr(Policy, "tune", None)
    again = dataclasses.replace(base, run_dir=str(tmp_path / "run"))
    assert loop.train(again) == json.loads((tiny_run / "table.json").read_text())
    assert units(tmp_path / "run") == units(tiny_run)


def test_the_trained_policy_is_evaluated_in_a_folder_of_its_own(tiny_run, base, tmp_path, units):
    config = dataclasses.replace(base, run_dir=str(tmp_path / "e"))
    table = loop.evaluate_only(config, tiny_run)
    assert {row["policy"] for row in table["rows"]} == {"after 2 rounds"}
    # The same validation contexts under the same keys: exactly what the run itself found in the end, and the passage alone besides.
    trained, here = units(tiny_run), units(tmp_path / "e")
    for unit in ("evaluate/after/000", "evaluate/after/001"):
        for there, now in zip(trained[unit]["contexts"], here[unit]["contexts"], strict=True):
            for ours, theirs in zip(now["edits"], there["edits"], strict=True):
                # With the passage alone there are more edits, and so other slots: losses are rounded otherwise, nothing else differs.
                losses = [[[t.pop(name) for name in ("loss_first", "loss_last")] for t in e["trials"]] for e in (ours, theirs)]
                np.testing.assert_allclose(*losses, rtol=1e-5)
                assert ours == theirs
            assert now["methods"].keys() == {"no adaptation", "passage only"} and there["methods"].items() <= now["methods"].items()
    assert here["origin"]["run"] == str(tiny_run) and here["origin"]["rounds"] == 2
    with pytest.raises(SealError, match=r"holds an evaluation of .*; train that run"):
        loop.train(config)
    with pytest.raises(SealError, match=r"holds an evaluation of .*; evaluate that run"):
        loop.evaluate_only(config)
    with pytest.raises(SealError, match=r"holds an evaluation of .*; generate from that run"):
        next(loop.generate(config, "validation", 1, tmp_path / "e"))
    with pytest.raises(SealError, match=r"holds a run of its own, nothing of"):
        loop.evaluate_only(base, tiny_run)
    other = dataclasses.replace(config, model=dataclasses.replace(base.model, name="x/y"), run_dir=str(tmp_path / "f"))
    with pytest.raises(SealError, match=r"model.name='x/y': the policy of .* is '.*tiny', trained; leave model.name out"):
        loop.evaluate_only(other, tiny_run)


def test_an_evaluation_is_not_evaluated(tiny_run, base, tmp_path):
    """Not the base model in place of the policy that it is about."""
    config = dataclasses.replace(base, run_dir=str(tmp_path / "e"), evaluate=dataclasses.replace(base.evaluate, contexts=1))
    loop.evaluate_only(config, tiny_run)
    with pytest.raises(SealError, match=r"holds an evaluation of .*; evaluate that run"):
        loop.evaluate_only(dataclasses.replace(config, run_dir=str(tmp_path / "f")), tmp_path / "e")


def test_a_config_that_was_wrong_may_be_set_right(tiny_run, base, tmp_path):
    wrong = dataclasses.replace(
        base, run_dir=str(tmp_path / "e"), task=dataclasses.replace(base.task, validation=str(tmp_path / "no.json"))
    )
    with pytest.raises(SealError, match=r"no\.json"):
        loop.evaluate_only(wrong, tiny_run)
    right = dataclasses.replace(wrong, task=base.task, evaluate=dataclasses.replace(base.evaluate, contexts=1))
    assert loop.evaluate_only(right, tiny_run)["rows"]


def test_data_that_has_changed_since_is_told(tiny_run, base, tmp_path):
    """Results of the same ids are not taken for those of other texts, nor of another number of contexts."""
    data = json.loads(pathlib.Path(base.task.train).read_text())
    for number, change in enumerate(
        (
            lambda items: items[0]["questions"][0].update(answer="another"),
            lambda items: items[0].update(context=items[0]["context"] + " More."),
            lambda items: items.reverse(),
        )
    ):
        run, path, changed = tmp_path / str(number), tmp_path / f"{number}.json", json.loads(json.dumps(data))
        shutil.copytree(tiny_run, run)
        change(changed)
        path.write_text(json.dumps(changed))
        config = dataclasses.replace(base, run_dir=str(run), task=dataclasses.replace(base.task, train=str(path)))
        (run / "config.yaml").write_text(config_lib.to_yaml(config))
        (gone := run / "evaluate/after/000.json").unlink()
        measured = {found: found.read_bytes() for found in run.rglob("*.json")}
        with pytest.raises(
            SealError, match=rf"{run}: holds results of other data than task.train now has, at '00000-.*; bring the data back"
        ):
            loop.train(config)
        assert not gone.exists() and all(found.read_bytes() == old for found, old in measured.items()), "nothing is mixed"
        path.write_text(json.dumps(data))
        assert loop.train(config)["rows"], "with the data as it was, the run goes on"


def test_an_m_step_that_diverges_stops_the_run_and_merges_nothing(tiny_run, base, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    for gone in ("rounds/1/m_step.json", "table.json"):
        (tmp_path / "run" / gone).unlink()
    for gone in ("policy", "rounds/2", "evaluate/after"):
        shutil.rmtree(tmp_path / "run" / gone)
    m_step = dataclasses.replace(base.m_step, learning_rate=1e38, max_grad_norm=0.0)
    config = dataclasses.replace(base, run_dir=str(tmp_path / "run"), m_step=m_step)
    (tmp_path / "run/config.yaml").write_text(config_lib.to_yaml(config))
    with pytest.raises(SealError, match=r"rounds/1/m_step: diverged: its losses or weights are not finite; lower m_step.learning_rate"):
        loop.train(config)
    assert not (tmp_path / "run/policy/1").exists()


def test_workers_are_not_left_out_in_silence(base, tmp_path):
    config = dataclasses.replace(base, run_dir=str(tmp_path / "run"), executor=dataclasses.replace(base.executor, name="ray"))
    for function in (loop.train, loop.evaluate_only):
        with pytest.raises(SealError, match=r"executor.name=ray: this function computes by itself; call the one in seal_jax.fleet.run"):
            function(config)
    assert not (tmp_path / "run").exists()


def test_an_evaluation_does_not_mix_two_policies(tiny_run, base, tmp_path):
    # A run after its first round, and the same run later.
    shutil.copytree(tiny_run, tmp_path / "run")
    (tmp_path / "run/rounds/2/m_step.json").rename(tmp_path / "aside")
    config = dataclasses.replace(base, run_dir=str(tmp_path / "e"), evaluate=dataclasses.replace(base.evaluate, contexts=1))
    table = loop.evaluate_only(config, tmp_path / "run")
    assert {row["policy"] for row in table["rows"]} == {"after 1 round"}
    (tmp_path / "aside").rename(tmp_path / "run/rounds/2/m_step.json")
    with pytest.raises(SealError, match=r"holds the evaluation of .* after 1 round, .* is after 2, or another; choose another run_dir"):
        loop.evaluate_only(config, tmp_path / "run")


def test_the_base_is_evaluated_in_the_runs_own_folder_and_train_goes_on_from_there(tiny_run, base, tmp_path, monkeypatch, units):
    config = dataclasses.replace(base, run_dir=str(tmp_path / "run"))
    table = loop.evaluate_only(config)
    assert {row["policy"] for row in table["rows"]} == {"base"}
    before = {name: unit for name, unit in units(tiny_run).items() if name.startswith("evaluate/before")}
    assert units(tmp_path / "run") == {**before, "table": table}
    # What is computed once is not computed again, and the run's own table takes the place of the first.
    for name in ("rounds", "policy", "evaluate/after"):
        shutil.copytree(tiny_run / name, tmp_path / "run" / name)
    monkeypatch.setattr(loop, "measure", None)
    assert loop.train(config) == units(tmp_path / "run")["table"] == units(tiny_run)["table"]
    assert loop.evaluate_only(config) == units(tiny_run)["table"], "which `evaluate` then shows"


COLOURS = """
import dataclasses

from seal_jax.tasks.base import Context, Prompt, Score, TrainingSet, TrainSequence


@dataclasses.dataclass
class Config:
    name: str = "colours"
    count: int = 2


class Colours:
    def __init__(self, config):
        self.config = config

    def contexts(self, split):
        return [Context(f"{split}-{i}", str(i), {"word": word}) for i, word in enumerate(("red", "blue", "green")[: self.config.count])]

    def edit_prompt(self, context):
        return Prompt(text=f"Say {context.payload['word']}:")

    def training_set(self, context, edit):
        # A self-edit that chooses its own inner loop, and trains on an answer after a prompt.
        return TrainingSet((TrainSequence(" " + context.payload["word"], prompt=Prompt("Say it:")),), fit={"epochs": 2 + len(edit) % 2})

    def baselines(self, context):
        return {"the word alone": TrainingSet((TrainSequence(f"{context.payload['word']} {context.payload['word']}"),))}

    def probes(self, context):
        return [Prompt(text="Say it:")]

    def score(self, items):
        return [Score.of([len(o) % 2 == 0 for o in outputs]) for _, outputs in items]

    def text(self, context):
        return context.payload["word"]

    def describe(self, context):
        return [("What?", context.payload["word"])]


def build(config, grader):
    return Colours(config)
"""


def test_a_task_that_nobody_knows_runs_from_its_package_alone(base, tmp_path, monkeypatch, units):
    (tmp_path / "colours").mkdir()
    (tmp_path / "colours/__init__.py").write_text(COLOURS)
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    data = {**config_lib.to_dict(base), "task": {"name": "colours", "count": 3}, "run_dir": str(tmp_path / "run")}
    overrides = ["rest_em.rounds=1", "rest_em.contexts=1", "evaluate.contexts=1", "evaluate.seeds=1", "rest_em.seeds=1"]
    config = config_lib.build(data, overrides)
    table = loop.train(config)
    assert [row["method"] for row in table["rows"]][:3] == ["no adaptation", "the word alone", "passage + self-edit"]
    (trial,) = units(tmp_path / "run")["rounds/1/e_step/000"]["contexts"][0]["edits"][0]["trials"]
    assert trial["steps"] in (2, 3)
    assert (tmp_path / "run/report.html").is_file()
    assert [e["event"] for e in read_events(tmp_path / "run/events.jsonl")][-1] == "finished"


@pytest.mark.parametrize(
    ("overrides", "policies"),
    [(["evaluate.during_training=false", "rest_em.rounds=0"], set()), (["rest_em.rounds=0", "evaluate.contexts=1"], {"base"})],
)
def test_without_evaluations_or_rounds(base, tmp_path, overrides, policies):
    table = loop.train(config_lib.build({**config_lib.to_dict(base), "run_dir": str(tmp_path / "run")}, overrides))
    assert {row["policy"] for row in table["rows"]} == policies
    assert (tmp_path / "run/table.json").exists() == bool(policies)
