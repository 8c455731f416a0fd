"""`measure` with a scripted policy and task: who is fitted, what is asked, and how the results find their places."""

import itertools
import json

import numpy as np
import pytest

from seal_jax.errors import SealError
from seal_jax.rest_em import policy
from seal_jax.rest_em.measure import edit_record, from_recorded, measure
from seal_jax.rest_em.policy import Adapted
from seal_jax.tasks.base import Context, Prompt, Recorded, Score, TrainingSet, TrainSequence, Trial


class Task:
    """Self-edits that start with "bad" are unusable. An answer "yes ..." is right, "?" is ungraded."""

    def edit_prompt(self, context):
        return Prompt(text=f"edit {context.id}")

    def training_set(self, context, edit):
        if edit.startswith("bad"):
            return TrainingSet((), problem="bad", dropped=1)
        return TrainingSet((TrainSequence(edit),))

    def baselines(self, context):
        return {"passage only": TrainingSet((TrainSequence(context.payload["passage"]),))}

    def probes(self, context):
        return [Prompt(text=f"{context.id} {q}") for q in context.payload["questions"]]

    def score(self, items):
        self.scored = [(context.id, list(outputs)) for context, outputs in items]
        return [Score.of([None if o == "?" else o.startswith("yes") for o in outputs]) for _, outputs in items]

    def text(self, context):
        return context.payload["passage"]

    def describe(self, context):
        return [(q, "gold") for q in context.payload["questions"]]


class Policy:
    """Writes what `script` says under (context, candidate); an adapted model answers with its key, and "yes" if `right` says so."""

    def __init__(self, script, right=lambda key, i: True):
        self.script, self.right, self.fitted = script, right, []

    checked = policy.Policy.checked

    def write(self, prompts, keys, what, lora=None, places=None):
        self.keys = keys
        return [[self.script[key[-2], key[-1]] for key in each] for each in keys]

    def tokenise(self, training):
        return tuple(s for s in training.sequences if len(s.completion.split()) > 1)

    def adapt(self, edits, what, held=None, texts=None):
        self.fitted += [(e.key, e.training.sequences[0].completion) for e in edits]
        answers = [["yes" if self.right(e.key, i) else "no" for i in range(len(e.probes))] for e in edits]
        return [Adapted(tuple(a), np.asarray([2.0, 1.0])) for a in answers]

    def answer(self, probes, lora=None, places=None, what=""):
        return [["?" if "hard" in p.text else "no" for p in each] for each in probes]


CONTEXTS = [
    Context("a", "A", {"passage": "a passage", "questions": ["1", "2"]}),
    Context("b", "B", {"passage": "single", "questions": ["hard"]}),
]


def run(policy, task, **options):
    record = measure(policy, task, CONTEXTS, **{"key": ("round", 1), "edits": 2, "seeds": 2, "baselines": True, **options})
    return json.loads(json.dumps(record))


def test_what_is_graded_elsewhere_is_waited_for_by_the_caller():
    """The record is the same as of a task that grades at once; nothing is waited for before it is asked for."""

    class Elsewhere(Task):
        waited = False

        def begin(self, items):
            def wait():
                self.waited = True
                return super(Elsewhere, self).score(items)

            return wait

        def score(self, items):
            raise AssertionError("it has begun already")

    script = {(c, k): f"text {k}" for c in "ab" for k in range(2)}
    options = {"key": ("round", 1), "edits": 2, "seeds": 2, "baselines": True}
    task = Elsewhere()
    later = measure(Policy(script), task, CONTEXTS, **options)
    assert not task.waited
    assert later()["contexts"] == measure(Policy(script), Task(), CONTEXTS, **options)["contexts"]
    assert task.waited


def test_everything_finds_its_place():
    policy = Policy(
        {("a", 0): "some text", ("a", 1): "bad", ("b", 0): "word", ("b", 1): "two words"},
        right=lambda key, i: (key[-2], key[-1], i) in {(0, 1, 0), (0, 1, 1), ("passage only", 0, 1), (1, 0, 0)},
    )
    task = Task()
    a, b = run(policy, task)["contexts"]
    assert policy.keys == [[("round", 1, "a", 0), ("round", 1, "a", 1)], [("round", 1, "b", 0), ("round", 1, "b", 1)]]
    # Fitted are usable training sets alone, once a seed, each under a key that tells them apart.
    assert policy.fitted == [
        (("round", 1, "a", "passage only", 0), "a passage"),
        (("round", 1, "a", "passage only", 1), "a passage"),
        (("round", 1, "a", 0, 0), "some text"),
        (("round", 1, "a", 0, 1), "some text"),
        (("round", 1, "b", 1, 0), "two words"),
        (("round", 1, "b", 1, 1), "two words"),
    ]
    assert len(task.scored) == len(policy.fitted) + 2, "all answers are graded in one call, each context's bare answers once"
    assert [t["reward"] for t in a["methods"]["no adaptation"]] == [0.0]
    assert [(t["seed"], t["reward"]) for t in a["methods"]["passage only"]] == [(0, 0.5), (1, 0.0)]
    first, second = a["edits"]
    assert [t["reward"] for t in first["trials"]] == [0.0, 1.0] and first["reward"] == 0.5
    assert first["trials"][0] == {
        **{"seed": 0, "outputs": ["no", "no"], "verdicts": [False, False], "reward": 0.0},
        **{"loss_first": 2.0, "loss_last": 1.0, "steps": 2},
    }
    assert (second["problem"], second["reward"], second["trials"], second["dropped"]) == ("bad", 0.0, [], 1)
    assert (a["passage"], a["questions"]) == ("a passage", [["1", "gold"], ["2", "gold"]])
    # What the tokeniser leaves nothing of is a problem too, of a self-edit as of a baseline, and stops nobody.
    assert b["edits"][0]["problem"] == "no token to predict in the training sequences" and b["edits"][0]["reward"] == 0.0
    assert b["methods"]["passage only"] == []
    assert [t["reward"] for t in b["edits"][1]["trials"]] == [1.0, 0.0]


def test_ungraded_is_no_reward():
    policy = Policy({(c, k): "some text" for c in "ab" for k in range(2)})
    _, b = run(policy, Task())["contexts"]
    bare = b["methods"]["no adaptation"][0]
    assert bare["verdicts"] == [None] and bare["reward"] is None


def test_without_baselines_and_with_nothing_to_fit():
    policy = Policy({(c, k): "bad" for c in "ab" for k in range(2)})
    a, b = run(policy, Task(), baselines=False)["contexts"]
    assert policy.fitted == []
    for record in (a, b):
        assert list(record["methods"]) == ["no adaptation"]
        assert [e["reward"] for e in record["edits"]] == [0.0, 0.0]


def test_given_self_edits_are_taken_instead_of_the_policys():
    class Given(Task):
        def given_edits(self, context):
            return {"a": ["some text", "bad", "never used"]}.get(context.id)

    policy = Policy({("b", k): "two words" for k in range(2)})
    a, b = run(policy, Given(), baselines=False)["contexts"]
    assert policy.keys == [[("round", 1, "b", 0), ("round", 1, "b", 1)]], (
        "the others are the policy's, under the keys that they always have"
    )
    assert [e["text"] for e in a["edits"]] == ["some text", "bad"] and [e["text"] for e in b["edits"]] == ["two words"] * 2
    assert a["edits"][0]["reward"] == 1.0 and a["edits"][1]["problem"] == "bad"
    with pytest.raises(SealError, match="context a: 3 given self-edits, of 4 that are asked for"):
        run(policy, Given(), edits=4)


def test_what_was_recorded_has_the_form_of_what_is_measured():
    wrong, right, unknown = (Trial(("x", "y"), Score.of(v)) for v in ([False, False], [True, True], [None, None]))
    low = Trial(("x", "y"), Score.of([True, False]))
    edits = (("one", (wrong, right, low)), ("two", (low, low, low)), ("three", (unknown,)), ("four", ()))
    record = json.loads(json.dumps(from_recorded(Task(), CONTEXTS[0], Recorded(wrong, edits))))
    measured = run(Policy({(c, k): "some text" for c in "ab" for k in range(2)}), Task(), baselines=False)["contexts"][0]
    assert record.keys() == measured.keys() and record["edits"][0].keys() == measured["edits"][0].keys()
    assert record["edits"][0]["trials"][0].keys() == measured["edits"][0]["trials"][0].keys()
    assert {k: record[k] for k in ("id", "title", "passage", "questions")} == {
        k: measured[k] for k in ("id", "title", "passage", "questions")
    }
    assert [t["reward"] for t in record["methods"]["no adaptation"]] == [0.0]
    assert [(e["text"], e["reward"]) for e in record["edits"]] == [("one", 0.5), ("two", 0.5), ("three", None), ("four", None)]
    assert [(t["seed"], t["outputs"], t["verdicts"]) for t in record["edits"][0]["trials"][:2]] == [
        (0, ["x", "y"], [False, False]),
        (1, ["x", "y"], [True, True]),
    ]


def test_equal_rewards_are_equal_in_whatever_order_their_trials_came():
    def reward(*rewards):
        trials = tuple(Trial(("x",), Score((True,), r)) for r in rewards)
        return from_recorded(Task(), CONTEXTS[1], Recorded(trials[0], (("", trials),)))["edits"][0]["reward"]

    assert reward(0.2, 0.4, 0.6) == reward(0.6, 0.4, 0.2) == reward(0.4, 0.4, 0.4)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_rewards_of_equal_sums_tie_however_they_are_shared_out(seeds):
    for questions in range(2, 9):
        found = {}
        for right in itertools.product(range(questions + 1), repeat=seeds):
            trials = [{"reward": n / questions, "verdicts": [None] * questions} for n in right]
            found.setdefault(sum(right), set()).add(edit_record(0, "", TrainingSet(()), trials)["reward"])
            if len(set(right)) == 1:
                assert found[sum(right)] == {right[0] / questions}, "nor does a mean of the unadapted reward differ from it"
        assert all(len(rewards) == 1 for rewards in found.values())


def test_seconds_are_told_by_stage():
    record = run(Policy({(c, k): "some text" for c in "ab" for k in range(2)}), Task())
    assert set(record["seconds"]) == {"sample", "adapt", "bare", "grade"}
    assert all(seconds >= 0 for seconds in record["seconds"].values())
