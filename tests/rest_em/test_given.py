"""What a task has already: checked before a model is loaded, and a whole run on it."""

import json

import pytest

from seal_jax import config as config_lib
from seal_jax.errors import SealError
from seal_jax.rest_em import given, loop
from seal_jax.runs.store import RunStore
from seal_jax.runs.table import format_table
from seal_jax.tasks.base import Context, Recorded, Score, Trial


def config(*overrides, task="knowledge"):
    return config_lib.build({"task": {"name": task}}, list(overrides))


class Task:
    """Has as many self-edits of a context as its payload says."""

    def given_edits(self, context):
        return context.payload["edits"]

    def recorded(self, path, contexts):
        trial = Trial(("x",), Score.of([True]))
        return [Recorded(trial, tuple((f"{path} {k}", (trial,)) for k in range(c.payload["recorded"]))) for c in contexts]


def contexts(*edits, recorded=5):
    return [Context(f"c{i}", "", {"edits": e, "recorded": recorded}) for i, e in enumerate(edits)]


def test_too_few_self_edits_are_told_at_once():
    five, three = ["e"] * 5, ["e"] * 3
    given.check(config(), Task(), {"train": contexts(five, None), "validation": contexts(five)})
    told = (
        r"task.train: rest_em.edits=5, but 2 of 3 contexts come with fewer self-edits \(the fewest: 3, c1\); set rest_em.edits=3, or leave"
    )
    with pytest.raises(SealError, match=told):
        given.check(config(), Task(), {"train": contexts(five, three, ["e"] * 4)})
    with pytest.raises(SealError, match=r"task.validation: evaluate.edits=5, but 1 of 1 .*\(the fewest: 0, c0\), or leave"):
        given.check(config(), Task(), {"validation": contexts([])})
    given.check(config("evaluate.edits=3"), Task(), {"validation": contexts(three)})
    with pytest.raises(SealError, match=r"task.validation: rest_em.edits=5, but"):  # where they are only printed
        given.check(config("evaluate.edits=3"), Task(), {"validation": contexts(three)}, "rest_em.edits")
    given.check(config("pretraining.edits=3"), Task(), {"validation": contexts(three)}, "pretraining.edits")
    with pytest.raises(SealError, match=r"task.validation: pretraining.edits=5, but 1 of 1"):  # a key of its own
        given.check(config("evaluate.edits=3"), Task(), {"validation": contexts(three)}, "pretraining.edits")
    given.check(config(), Task(), {"validation": contexts(["e"])}, "")  # continual: one, always
    with pytest.raises(SealError, match=r"task.validation: one self-edit a context is used, but 1 of 1"):
        given.check(config(), Task(), {"validation": contexts([])}, "")


def test_recorded_rewards_are_checked_and_cut():
    some = contexts(None, None)
    found = given.recorded(config("rest_em.rewards=r.json", "rest_em.edits=2"), Task(), some)
    assert [[text for text, _ in r.edits] for r in found] == [["r.json 0", "r.json 1"]] * 2
    few = {"train": contexts(None, recorded=3)}
    with pytest.raises(SealError, match=r"rest_em.rewards=r.json: 3 self-edits of c0; rest_em.edits=5 are asked for, set 3"):
        given.check(config("rest_em.rewards=r.json"), Task(), few)
    given.check(config("rest_em.rewards=r.json", "rest_em.rounds=0"), Task(), few)


def test_a_task_without_such_files_says_so():
    """ARC, say."""
    some = {"train": contexts(None)}
    with pytest.raises(SealError, match=r"rest_em.rewards=r.json: the task 'arc' has no files of recorded rewards; leave it out"):
        given.check(config("rest_em.rewards=r.json", task="arc"), object(), some)
    with pytest.raises(SealError, match=r"evaluate.beside=e.json: the task 'arc' has no files of recorded results; leave it out"):
        given.check(config("evaluate.beside=[e.json]", task="arc"), object(), some)
    given.check(config(task="arc"), object(), some)


def test_a_run_on_recorded_rewards(tiny_run, tmp_path, quick_compile, units):
    """Round 1 is read and the self-edits of the validation passages are given; the M-step and the evaluation go on as ever."""
    base = config_lib.to_dict(config_lib.load(tiny_run / "config.yaml"))

    def questions(passage, right):
        asked = [(rep, q) for rep in range(2) for q in passage["questions"]]
        answers = {"baseline_answer": "?", "adapter_answer": "!", "baseline_correct": False}
        return [{"rep": rep, **q, **answers, "adapter_correct": right} for rep, q in asked]

    def article(passage):
        title = passage["title"]
        return {**passage, "completions": [{"text": f"{title} {k}.", "questions": questions(passage, k == 1)} for k in range(3)]}

    for split in ("train", "validation"):
        passages = json.loads((tiny_run.parent / f"{split}.json").read_text())
        (tmp_path / f"{split}.json").write_text(json.dumps({"exp_name": split, "articles": [article(p) for p in passages]}))
    train, validation = (str(tmp_path / f"{split}.json") for split in ("train", "validation"))
    overrides = [f"run_dir={tmp_path / 'run'}", "rest_em.rounds=1", f"rest_em.rewards={train}", f"evaluate.beside=[{validation}]"]
    overrides += [f"task.validation={validation}", "task.validation_edits=given", "evaluate.seeds=1"]
    settings = config_lib.build(base, overrides)
    with quick_compile():
        table = loop.train(settings)
    assert [row["policy"] for row in table["rows"]][-2:] == ["original: validation"] * 2
    assert [row["mean"] for row in table["rows"]][-2:] == [0.0, pytest.approx(1 / 3)]
    assert "original: validation" in format_table(table) and (tmp_path / "run/report.html").is_file()
    found = units(tmp_path / "run")
    kept = found["rounds/1/selection"]["kept"]
    assert [(k["context"], k["candidate"], k["reward"]) for k in kept] == [("00000-orsk", 1, 1.0), ("00001-vell", 1, 1.0)]
    assert found["rounds/1/m_step"]["pairs"] == 2 and loop.rounds_done(RunStore(tmp_path / "run")) == 1
    for when in ("before", "after"):
        texts = [e["text"] for unit in ("000", "001") for c in found[f"evaluate/{when}/{unit}"]["contexts"] for e in c["edits"]]
        assert texts == ["Quor 0.", "Quor 1.", "Brast 0.", "Brast 1."]
