"""Rewards that count what an edit does to passages learnt before and to texts about no passage."""

import dataclasses
import shutil

import numpy as np
import pytest

from seal_jax import config
from seal_jax.config import RetentionConfig
from seal_jax.errors import SealError
from seal_jax.rest_em import loop, retention
from seal_jax.rest_em.policy import Policy
from seal_jax.runs.store import RunStore


@pytest.fixture(scope="module")
def settings(tmp_path_factory, write_config):
    texts = tmp_path_factory.mktemp("texts") / "texts.txt"
    texts.write_text("Jumpy zebras quiz 17 vexed foxes? No!\n\nA quick judge waxes; he hums.\n")
    rest_em = {"rounds": 1, "contexts": 2, "edits": 2, "seeds": 1, "group": 2}
    rest_em["retention"] = {"contexts": 1, "weight": 0.5, "bits": 0.25, "texts": str(texts)}
    path = write_config(tmp_path_factory.mktemp("retention"), rest_em=rest_em)
    return config.load(path, ["evaluate.during_training=false"])


@pytest.fixture(scope="module")
def finished(settings, quick_compile, units):
    with quick_compile():
        loop.train(settings)
    return units(settings.run_dir)


def test_the_score_is_the_reward_less_what_got_worse(finished, settings):
    memory = finished["rounds/1/memory"]
    assert 0.0 <= memory["accuracy"] <= 1.0 and memory["bits"] > 0
    records = finished["rounds/1/e_step/000"]["contexts"]
    taught = {c["id"] for c in finished["rounds/1/memory_edits"]["contexts"]}
    assert len(taught) == 1 and not taught & {r["id"] for r in records}
    harmed = 0
    for record in records:
        for edit in record["edits"]:
            cost = 0.0
            for trial in edit["trials"]:
                kept = trial["retention"]
                assert len(trial["outputs"]) == len(record["questions"])  # those of its own alone
                cost += 0.5 * max(0.0, memory["accuracy"] - kept["accuracy"]) + 0.25 * max(0.0, kept["bits"] - memory["bits"])
            harmed += cost > 0
            if edit["trials"]:
                assert edit["score"] == pytest.approx(edit["reward"] - cost / len(edit["trials"]))
    assert harmed  # or nothing was tested
    page = (RunStore(settings.run_dir).folder / "report.html").read_text()
    assert "What self-edits are fitted on top of, and what they harm" in page and f"{memory['bits']:.3f}" in page and "(score " in page


def test_selection_goes_by_the_score():
    edits = [
        {"candidate": 0, "text": "a", "reward": 0.9, "score": 0.1},
        {"candidate": 1, "text": "b", "reward": 0.5, "score": 0.4},
    ]
    record = {"id": "c", "edits": edits, "methods": {"no adaptation": [{"reward": 0.0}]}}
    kept = loop.choose(config.build({"task": {"name": "knowledge"}}), [record])["kept"]
    assert [k["candidate"] for k in kept] == [1]


def test_an_unusable_edit_is_not_better_for_harming_nothing():
    edits = [
        {"candidate": 0, "text": "bad", "reward": 0.0, "problem": "not JSON", "score": None},
        {"candidate": 1, "text": "b", "reward": 0.2, "problem": None, "score": -0.1},
    ]
    record = {"id": "c", "edits": edits, "methods": {"no adaptation": [{"reward": 0.0}]}}
    kept = loop.choose(config.build({"task": {"name": "knowledge"}}), [record])["kept"]
    assert kept == [{"context": "c", "candidate": 1, "reward": 0.2, "score": -0.1, "unadapted": 0.0}]


def test_all_questions_right_is_by_the_reward():
    """Though the edit harmed something."""
    record = {"id": "c", "methods": {"no adaptation": [{"reward": 0.0}]}}
    record["edits"] = [{"candidate": 0, "text": "a", "reward": 1.0, "problem": None, "score": 0.7}]
    settings = config.build({"task": {"name": "knowledge"}, "rest_em": {"select": "right"}})
    assert [k["candidate"] for k in loop.choose(settings, [record])["kept"]] == [0]


def test_nothing_usable_to_remember_leaves_the_memory_empty(settings, tmp_path, units, quick_compile, monkeypatch, caplog):
    real = Policy.write
    blank = lambda self, prompts, keys, *rest: [["\n"] for _ in keys] if "memory" in keys[0][0] else real(self, prompts, keys, *rest)  # noqa: E731
    monkeypatch.setattr(Policy, "write", blank)
    with quick_compile():
        loop.train(dataclasses.replace(settings, run_dir=str(tmp_path / "run")))
    assert "none of the 1 self-edits to remember is usable" in caplog.text
    assert units(tmp_path / "run")["rounds/1/memory"]["bits"] > 0


def test_a_memory_that_diverged_is_told_in_a_line(settings, tmp_path, quick_compile, monkeypatch):
    monkeypatch.setattr(Policy, "bits", lambda self, texts, adapters: np.asarray([np.nan]))
    again = dataclasses.replace(settings, run_dir=str(tmp_path / "run"))
    for _ in range(2):  # the second time it is read back
        with quick_compile(), pytest.raises(SealError, match=r"rounds/1/memory: the bits a token of .* are not finite"):
            loop.train(again)


def test_going_on_equals_not_stopping(finished, settings, units, quick_compile):
    """Stopped after the memory was taught and before the E-step was written; and with the memory's adapter lost."""
    store = RunStore(settings.run_dir)
    for gone in ("rounds/1/e_step/000", "rounds/1/selection", "rounds/1/m_step"):
        store._path(gone).unlink()
    shutil.rmtree(store.folder / "policy")
    with quick_compile():
        loop.train(settings)
        assert units(settings.run_dir) == finished
        shutil.rmtree(store.folder / "memory")
        store._path("rounds/1/e_step/000").unlink()
        loop.train(settings)
    assert units(settings.run_dir) == finished


def test_too_few_passages_to_remember_is_said(finished, settings, tmp_path):
    with pytest.raises(SealError, match=r"rest_em.retention.contexts=3: beside the 2 contexts of a round, task.train has only 2"):
        changed = config.load(f"{settings.run_dir}/config.yaml", ["rest_em.retention.contexts=3", f"run_dir={tmp_path / 'run'}"])
        loop.train(changed)


def test_nothing_is_counted_by_default():
    assert not retention.wanted(RetentionConfig())
    assert retention.wanted(RetentionConfig(contexts=1)) and retention.wanted(RetentionConfig(bits=0.1))


def test_an_edit_that_diverged_is_worth_nothing():
    memory = retention.Memory(None, (), None, (), 1.0)
    told = lambda bits: [{"retention": {"verdicts": [], "bits": bits}}]  # noqa: E731
    counted, uncounted = RetentionConfig(bits=1.0), RetentionConfig(bits=0.0)
    assert retention.cost(counted, memory, told(3.0)) == 2.0 and retention.cost(counted, memory, told(0.5)) == 0.0
    assert retention.cost(counted, memory, told(float("nan"))) == retention.cost(counted, memory, told(float("inf"))) == float("inf")
    assert retention.cost(uncounted, memory, told(float("nan"))) == 0.0


def test_what_could_not_be_graded_is_no_proof_of_harmlessness():
    memory, config = retention.Memory(None, (), None, (True, True, False, None), 1.0), RetentionConfig(contexts=1, weight=1.0)
    trial = lambda *verdicts: {"retention": {"verdicts": list(verdicts), "bits": 1.0}}  # noqa: E731
    assert retention.cost(config, memory, [trial(True, False, False, True)]) == pytest.approx(1 / 3)
    assert retention.cost(config, memory, [trial(None, False, False, True)]) == 0.5, "over what was graded both times"
    lost, nothing = trial(False, False, False, False), trial(None, None, None, True)
    assert retention.cost(config, memory, [lost, nothing]) == retention.cost(config, memory, [lost]) == pytest.approx(2 / 3)
    assert retention.cost(config, memory, [nothing]) is None
    assert retention.cost(RetentionConfig(weight=0.0), memory, [nothing]) == 0.0
