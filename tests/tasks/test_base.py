import json

from seal_jax import tasks
from seal_jax.tasks.base import Context, Prompt, Score, TrainSequence, View, to_json


def test_records_survive_json():
    messages = ({"role": "user", "content": "Which?"},)
    records = [
        Prompt("Say it:"),
        Prompt(messages=messages, schema={"type": "boolean"}),
        Prompt("Say it:", schema={"type": "boolean"}, then_text=True),
        Context("a-0", "A", {"train": [1, 2]}),
        Score.of([True, None, False]),
        Score.of([True], ["one of many"]),
    ]
    for record in records:
        assert type(record).from_json(json.loads(json.dumps(to_json(record)))) == record


def test_a_score_is_the_share_of_what_could_be_graded():
    assert Score.of([True, None, False]).reward == 0.5
    assert Score.of([None]).reward is None


def test_a_sequence_is_shown_whole_or_by_its_label():
    messages = ({"role": "system", "content": "Be brief. "}, {"role": "user", "content": "Which? "})
    assert TrainSequence("That.").shown == "That."
    assert TrainSequence("That.", Prompt("Which? ")).shown == "Which? That."
    assert TrainSequence("That.", Prompt(messages=messages)).shown == "Be brief. Which? That."
    assert TrainSequence("That.", Prompt(messages=messages), label="a choice").shown == "a choice"


def test_a_task_may_say_how_it_is_shown_and_need_not():
    assert tasks.view("knowledge").context == "Passage"
    for unknown in ("nobody-knows-it", "", "a.b"):
        assert tasks.view(unknown) == View()
    assert View().html("answer", "<b>") is None
