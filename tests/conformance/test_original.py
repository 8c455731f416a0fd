"""The files that the original published, read as ours: what it chose and what it reported come out."""

import gzip
import json

import numpy as np
import pytest

from seal_jax import config as config_lib
from seal_jax.rest_em import given, loop
from seal_jax.rest_em.measure import from_recorded
from seal_jax.rest_em.table import table
from seal_jax.tasks import knowledge

TRAIN = "data__synthetic_data__train__iter0_train.json.gz"
RANK = "results__query_server__train__rank_iter0.json.gz"
SFT = "data__synthetic_data__EM_SFT__sft_best1of5_iter0.jsonl.gz"
EVALUATION = "results__query_server__eval__base.json.gz"
PRETRAINING = "results__cpt__cpt_base.json.gz"


def test_rewards_of_a_round_choose_the_published_pairs(original):
    config = config_lib.build({"task": {"name": "knowledge", "train": original(TRAIN), "prompt": "implications"}})
    config.rest_em.rewards = original(RANK)
    task = knowledge.build(config.task, None)
    contexts = loop.take(task.contexts("train"), config.rest_em.contexts, 0)
    records = [from_recorded(task, c, r) for c, r in zip(contexts, given.recorded(config, task, contexts), strict=True)]
    assert config.rest_em.select == "best" and {len(t["trials"]) for r in records for t in r["edits"]} == {3}
    edits = {(r["id"], e["candidate"]): e["text"] for r in records for e in r["edits"]}
    prompts = {c.id: task.edit_prompt(c).text for c in contexts}
    kept = [(k["context"], k["candidate"]) for k in loop.choose(config, records)["kept"]]
    with gzip.open(original(SFT), "rt", encoding="utf-8") as file:
        published = [json.loads(line) for line in file]
    assert len(published) == 50
    assert [{"prompt": prompts[context], "completion": edits[context, k].strip()} for context, k in kept] == published


def test_the_sampled_self_edits_are_candidates(original):
    """Of both forms; those of the passage file are what the reward file measured, and more."""
    task = knowledge.build(
        knowledge.Config(train=original(TRAIN), validation=original(EVALUATION), train_edits="given", validation_edits="given"), None
    )
    train, validation = task.contexts("train"), task.contexts("validation")
    assert [len(task.given_edits(c)) for c in train] == [10] * 100 and [len(task.given_edits(c)) for c in validation] == [1] * 200
    assert sum(len(c.payload["questions"]) for c in validation) == 974
    for context, found in zip(train[:50], task.recorded(original(RANK), train[:50]), strict=True):
        assert [text for text, _ in found.edits] == task.given_edits(context)[:5]


@pytest.mark.parametrize("name", [EVALUATION, RANK])
def test_an_evaluation_gives_its_own_numbers(original, name):
    with gzip.open(original(name), "rt", encoding="utf-8") as file:
        overall = json.load(file)["overall"]
    none, edit = knowledge.original.figures(original(name))
    assert round(float(np.mean(none.values)), 4) == overall["baseline_mean_accuracy"]
    assert round(float(np.mean(edit.values)), 4) == overall["adapter_mean_accuracy"]


def test_published_numbers_stand_in_the_table(original):
    task = knowledge.build(knowledge.Config(), None)
    lines = [original(EVALUATION), original(PRETRAINING), f"{original(PRETRAINING)}@{original(EVALUATION)}"]
    beside = [figure for line in lines for figure in task.figures(line)]
    trial = {"reward": 0.5, "verdicts": [True, False]}
    ours = [{"methods": {"no adaptation": [trial]}, "edits": [], "questions": [["q", "a"]] * 2}]
    own, *rows = table({"base": ours}, seeds=1, edits=0, resamples=100, seed=0, beside=beside)["rows"]
    assert own["policy"] == "base"
    assert [round(row["mean"], 4) for row in rows] == [0.3267, 0.3968, 0.3255, 0.4097, 0.3299, 0.4131]
    assert {row["policy"] for row in rows} == {"original: base", "original: results__cpt__cpt_base"}
    assert {(row["contexts"], row["questions"], row["ungraded"], row["gain"]) for row in rows} == {(200, 974, 0, None)}
    with_interval = [row["low"] is not None and row["low"] < row["mean"] < row["high"] for row in rows]
    assert with_interval == [True, True, False, False, True, True], "over passages, where single ones are known"
