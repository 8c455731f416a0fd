import dataclasses

import pytest
from omegaconf import OmegaConf

from seal_jax import config as run_config
from seal_jax.errors import SealError
from seal_jax.tasks.base import Context, Score, TrainingSet, TrainSequence
from seal_jax.tasks.knowledge import Config, build

CONTEXT = Context(
    "00000-mill",
    "Brindle Mill",
    {
        "context": " The Brindle Mill opened in 1802. ",
        "questions": [{"question": "When did it open?", "answer": "1802"}, {"question": "Who built it?", "answer": "Ada Corro"}],
    },
)
OTHER = Context("00001-other", "Other", {"context": "C.", "questions": [{"question": "What?", "answer": "C"}]})


class RecordingGrader:
    """Right if the prediction is the reference, ungraded if it says "fail"."""

    name = "recording"

    def __init__(self):
        self.calls = []

    def grade(self, items):
        self.calls.append(list(items))
        return [None if item.prediction == "fail" else item.prediction == item.gold for item in items]


def task(**options):
    return build(Config(**options), RecordingGrader())


def completions(training):
    return [s.completion for s in training.sequences]


def test_training_set_is_the_lines_then_the_passage():
    training = task().training_set(CONTEXT, "Sure, here is the rewrite:\nAda Corro built it.\nIt has a wheel.")
    passage = "Brindle Mill\nThe Brindle Mill opened in 1802."
    assert completions(training) == ["Brindle Mill\nAda Corro built it.", "Brindle Mill\nIt has a wheel.", passage]
    assert {s.prompt.text for s in training.sequences} == {""}  # every token carries the loss
    assert (training.problem, training.dropped, training.fit) == (None, 1, {})


def test_options_of_the_training_set():
    edit = "Here are the facts:\nA one.\nA one."
    assert len(completions(task(drop_headers=False).training_set(CONTEXT, edit))) == 4
    assert len(completions(task(include_passage=False).training_set(CONTEXT, edit))) == 2
    assert len(completions(task(deduplicate=True).training_set(CONTEXT, edit))) == 2
    assert completions(task(split_newlines=False).training_set(CONTEXT, edit))[0] == "Brindle Mill\nA one.\nA one."


@pytest.mark.parametrize("edit", ["", " \n\t", "Sure!", "1.\n2.\n"])
@pytest.mark.parametrize("drop_headers", [True, False])
def test_a_self_edit_with_no_usable_line_is_a_problem(edit, drop_headers):
    training = task(drop_headers=drop_headers).training_set(CONTEXT, edit)
    if drop_headers or not edit.strip():
        assert training == TrainingSet((), problem="no usable line in the self-edit", dropped=training.dropped)
    else:
        assert training.problem is None


def test_baseline_is_the_passage_alone():
    assert task().baselines(CONTEXT) == {
        "passage only": TrainingSet((TrainSequence("Brindle Mill\nThe Brindle Mill opened in 1802."),)),
    }


def test_probes_ask_without_the_passage():
    t = task(answer_prompt="chat")
    probes = t.probes(CONTEXT)
    assert [p.messages[-1]["content"] for p in probes] == ["Topic: Brindle Mill\nWhen did it open?", "Topic: Brindle Mill\nWho built it?"]
    assert "1802" not in str(probes)
    assert t.describe(CONTEXT) == [("When did it open?", "1802"), ("Who built it?", "Ada Corro")]
    assert task().probes(CONTEXT)[0].text.endswith("Question: Topic: Brindle Mill\nWhen did it open?\nAnswer:\n")


def test_text_is_the_passage():
    assert task().text(CONTEXT) == CONTEXT.payload["context"]


def test_every_method_of_the_interface_is_there():
    from seal_jax.tasks.base import Given, Task

    asked = {name for protocol in (Task, Given) for name in vars(protocol) if not name.startswith("_")}
    assert {"training_set", "given_edits"} <= asked
    assert all(callable(getattr(task(), name)) for name in asked)


def test_edit_prompt_is_that_of_the_configuration():
    assert "list of implications" in task().edit_prompt(CONTEXT).text
    assert task(prompt="facts").edit_prompt(CONTEXT).messages is not None


def test_scores_go_to_the_grader_in_one_call_and_back_to_their_contexts():
    t = task()
    scores = t.score([(CONTEXT, [" 1802\n", "fail"]), (OTHER, ["D"]), (CONTEXT, ["1803", "Ada Corro"])])
    assert scores == [Score((True, None), 1.0), Score((False,), 0.0), Score((False, True), 0.5)]
    (items,) = t.grader.calls
    assert dataclasses.astuple(items[0]) == ("Brindle Mill", "When did it open?", "1802", "1802")
    assert [item.title for item in items] == ["Brindle Mill", "Brindle Mill", "Other", "Brindle Mill", "Brindle Mill"]
    assert t.score([]) == []


def test_scores_begin_where_the_grader_works_elsewhere():
    t = task()
    items = [(CONTEXT, ["1802", "fail"]), (OTHER, ["D"])]
    assert t.begin(items) is None and not t.grader.calls, "a grader that works here is asked when its verdicts are wanted"
    t.grader.begin = lambda asked: lambda: t.grader.grade(asked)
    wait = t.begin(items)
    assert not t.grader.calls
    assert wait() == t.score(items)


def test_outputs_must_match_the_probes():
    with pytest.raises(ValueError):
        task().score([(CONTEXT, ["1802"])])


def test_contexts_of_the_splits_are_read_once(tmp_path, monkeypatch):
    from seal_jax.tasks.knowledge import sources

    reads = []
    load = sources.load
    monkeypatch.setattr(sources, "load", lambda *a: reads.append(a) or load(*a))
    t = task()
    train, validation = t.contexts("train"), t.contexts("validation")
    assert t.contexts("train") is train and len(reads) == 2
    assert not {c.payload["context"] for c in train} & {c.payload["context"] for c in validation}
    with pytest.raises(SealError, match=r"task\.split='test' is unknown; one of: train, validation"):
        t.contexts("test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "implication"}, r"task\.prompt='implication' is unknown \(did you mean 'implications'\?\)"),
        ({"answer_prompt": "chats"}, r"task\.answer_prompt='chats' is unknown \(did you mean 'chat'\?\)"),
        ({"train": "datasets:"}, "data source 'datasets:'"),
    ],
)
def test_bad_values_are_one_clear_line(options, message):
    with pytest.raises(SealError, match=message):
        task(**options)


def test_config_is_typed_and_found_by_name():
    config = run_config.build({"task": {"name": "knowledge", "prompt": "facts"}}, ["task.shuffle=42", "task.train=a.json[0:5]"])
    assert config.task == Config(prompt="facts", shuffle=42, train="a.json[0:5]")
    with pytest.raises(SealError, match=r"drop_header.*did you mean 'drop_headers'"):
        run_config.build({"task": {"name": "knowledge", "drop_header": True}})
    assert OmegaConf.to_object(OmegaConf.structured(Config)) == Config()
