import dataclasses
import json
import shutil

import jax
import pytest

from seal_jax import config as config_lib
from seal_jax.errors import SealError
from seal_jax.grade.base import GradeItem
from seal_jax.rest_em import loop
from seal_jax.rest_em import stage as stage_lib


@pytest.fixture(scope="module")
def base(tiny_run):
    return config_lib.load(tiny_run / "config.yaml")


def test_contexts_with_prompts_too_long_are_skipped_and_counted(base, caplog):
    stage = stage_lib.build(base, ("train",))
    first, second = stage.contexts["train"][:2]
    long = dataclasses.replace(first, id="long", payload={**first.payload, "context": "salt " * 300})
    asked = dataclasses.replace(second, payload={**second.payload, "questions": [{"question": "who " * 300, "answer": "x"}]})
    contexts = [long, *stage.contexts["train"], asked]
    assert stage_lib.usable(stage.policy, stage.task, contexts, "train") == stage.contexts["train"]
    (message,) = caplog.messages
    assert (
        message
        == "task.train: 2 of 6 contexts skipped: each has a prompt that leaves no room for an answer within 192 tokens: long, 00001-vell"
    )
    assert caplog.records[0].skipped[0]["count"] == 2
    with pytest.raises(
        SealError, match=r"task.train: no usable context: all 2 have a prompt that leaves no room .* raise model.max_length"
    ):
        stage_lib.usable(stage.policy, stage.task, [long, asked], "train")
    assert len(caplog.messages) == 1


def judged(base, model):
    return dataclasses.replace(base, grade=dataclasses.replace(base.grade, name="judge", model=str(model)))


def test_a_judge_that_is_not_there_is_named(base, tmp_path):
    config = judged(base, tmp_path / "nothing")
    for work in (lambda g: g.check(), lambda g: g.grade([GradeItem("t", "q", "gold", "answer")])):
        with pytest.raises(SealError, match=r"^grade.model='.*nothing': no such folder or file"):
            work(stage_lib.grader(config))


@pytest.mark.parametrize("lost", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_judge_that_cannot_be_loaded_is_found_before_a_policy_is(base, tiny_model, tmp_path, monkeypatch, lost):
    def never(*_):
        raise AssertionError("loaded")

    monkeypatch.setattr(stage_lib.load, "load_model", never)
    folder = shutil.copytree(tiny_model, tmp_path / "judge")
    stage_lib.grader(judged(base, folder)).check()
    (folder / lost).unlink()
    with pytest.raises(SealError, match=rf"^grade.model, the judge: {folder}"):
        stage_lib.build(judged(base, folder), ("train",))


def test_a_judge_without_a_chat_template_is_found_before_a_policy_is(base, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "judge")
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        if name.endswith("jinja"):
            (folder / name).unlink(missing_ok=True)
        else:
            told = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps({key: value for key, value in told.items() if key != "chat_template"}))
    with pytest.raises(SealError, match=rf"^grade.model, the judge: {folder}: the model has no chat template"):
        stage_lib.build(judged(base, folder), ("train",))


def test_fits_leave_room_for_a_judge(base, tiny_model, tmp_path):
    """It is loaded after the first fits, when it has been settled how much memory they take."""
    other = shutil.copytree(tiny_model, tmp_path / "judge")
    stage = stage_lib.build(judged(base, other), ("train",))
    assert stage.policy.beside == sum(x.nbytes for x in jax.tree.leaves(stage.policy.params)), "a model like the policy"
    assert stage_lib.build(judged(base, other), ("train",), grades=False).policy.beside == 0
    assert stage_lib.build(base, ("train",)).policy.beside == 0


def test_a_grader_is_checked_where_there_is_something_to_grade(base, tmp_path):
    judge = judged(base, tmp_path / "nothing")
    with pytest.raises(SealError, match=r"^grade.model="):
        loop.evaluate_only(dataclasses.replace(judge, run_dir=str(tmp_path / "run")))
    assert list(loop.generate(judge, "train", 1)), "writing self-edits grades nothing"


def test_a_finished_run_is_read_without_its_grader(tiny_run, tmp_path, monkeypatch):
    def never(task):
        raise LookupError("asked")

    monkeypatch.setattr(stage_lib, "check_grader", never)
    folder = shutil.copytree(tiny_run, tmp_path / "copy")
    config = dataclasses.replace(config_lib.load(folder / "config.yaml"), run_dir=str(folder))
    assert loop.train(config)["rows"]
    (folder / "table.json").unlink()
    with pytest.raises(LookupError):
        loop.train(config)
