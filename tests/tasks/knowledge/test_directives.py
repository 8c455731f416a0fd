import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_jax import config as run_config
from seal_jax.errors import SealError
from seal_jax.sample.schema import regex
from seal_jax.tasks.base import Context, Prompt, TrainSequence
from seal_jax.tasks.knowledge import Config, build, directives, prompts
from seal_jax.tasks.knowledge.directives import Directives, schema, split

BOUNDS = directives.Config([0.0001, 0.005], [1, 20])
CONTEXT = Context("0", "Brindle Mill", {"context": "It opened in 1802.", "questions": [{"question": "When?", "answer": "1802"}]})


def test_directives_are_taken_off():
    edit = '{"learning_rate": 0.002, "epochs": 6, "loss": "part"}\nA one.\n{"a": 1}'
    assert split(edit, BOUNDS) == (Directives(0.002, 6, "part"), 'A one.\n{"a": 1}')
    assert split('\n {\n"epochs": 6.0} \r\nA.', BOUNDS) == (Directives(epochs=6), "A.")
    assert split("{}\nA.", BOUNDS) == (Directives(), "A.")
    assert split("A.\n{}", BOUNDS) == (Directives(), "A.\n{}"), "not at the start, it is text"
    assert Directives(0.002, 6, "part").fit == {"learning_rate": 0.002, "epochs": 6} and Directives(loss="all").fit == {}


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        ("{", "directives are not JSON: "),
        ("{The mill} opened.", "directives are not JSON: "),
        ("{" * 100_000, "directives are not JSON"),
        ('{"a":' * 100_000, "directives are not JSON"),
        ('{"epochs": 3} A.', "directives are not followed by a line break"),
        ('{"epoch": 3}\nA.', 'directives: unknown key "epoch"; expected learning_rate, epochs, loss'),
        ('{"epochs": 21}\nA.', "directives: epochs=21: expected a number from 1 to 20"),
        ('{"epochs": 1.5}\nA.', "directives: epochs=1.5: expected a whole number"),
        ('{"epochs": true}\nA.', "directives: epochs=true: expected a number"),
        ('{"learning_rate": NaN}\nA.', "directives: learning_rate=NaN: expected a number from 0.0001 to 0.005"),
        ('{"learning_rate": "0.001"}\nA.', 'directives: learning_rate="0.001": expected a number'),
        ('{"loss": ["all"]}\nA.', "directives: loss=a list: expected all or part"),
    ],
)
def test_what_is_unusable_says_why(edit, problem):
    found = split(edit, BOUNDS)
    assert isinstance(found, str) and found.startswith(problem) and "\n" not in found and len(found) < 200
    training = build(Config(directives=BOUNDS), None).training_set(CONTEXT, edit)
    assert training.problem == found and training.sequences == ()


@given(st.text() | st.text(alphabet='{}[]":,\n 1aepochs').map(lambda text: "{" + text))
def test_any_text_is_split_or_a_reason(edit):
    found = split(edit, BOUNDS)
    assert isinstance(found, str) or isinstance(found[0], Directives)


@given(st.data())
def test_what_the_schema_allows_is_taken(data):
    line = data.draw(st.from_regex(regex(schema(BOUNDS)), fullmatch=True))
    found, text = split(f"{line}\nA one.", BOUNDS)
    assert found == Directives(**json.loads(line)) and None not in (found.learning_rate, found.epochs, found.loss) and text == "A one."


def test_a_self_edit_chooses_how_it_is_trained_on():
    task = build(Config(directives=BOUNDS), None)
    training = task.training_set(CONTEXT, '{"learning_rate": 0.002, "epochs": 6, "loss": "part"}\nIt has a wheel.')
    assert training.fit == {"learning_rate": 0.002, "epochs": 6}
    title = Prompt(text="Brindle Mill\n")
    assert training.sequences == (TrainSequence("It has a wheel.", title), TrainSequence("It opened in 1802.", title))
    whole = task.training_set(CONTEXT, '{"loss": "all"}\nIt has a wheel.')
    assert whole == task.training_set(CONTEXT, "It has a wheel.") and whole.fit == {}
    assert [s.shown for s in whole.sequences] == [s.shown for s in training.sequences]
    assert task.training_set(CONTEXT, '{"epochs": 6}').problem == "no usable line in the self-edit"
    off = build(Config(), None).training_set(CONTEXT, '{"epochs": 6}\nIt has a wheel.')
    assert off.fit == {} and off.sequences[0].completion == 'Brindle Mill\n{"epochs": 6}', "off, it is text like any other"


@pytest.mark.parametrize("style", prompts.EDIT_STYLES)
def test_every_prompt_asks_for_them(style):
    task, plain = build(Config(prompt=style, directives=BOUNDS), None), prompts.edit_prompt(style, "Mill", "A {x}.\n\nPassage:\nB.")
    asked = task.edit_prompt(Context("0", "Mill", {"context": "A {x}.\n\nPassage:\nB."}))
    assert asked.then_text and asked.schema == schema(BOUNDS)
    texts = [p.text if p.messages is None else "".join(m["content"] for m in p.messages) for p in (plain, asked)]
    (sentence,) = re.findall(r" Before that, write one line of JSON .*?}\.", texts[1])
    for part in ('"learning_rate": a number from 0.0001 to 0.005', '"epochs": a whole number from 1 to 20', '"loss": "all" or "part"'):
        assert part in sentence
    without = texts[1].replace(sentence, "")
    assert without == texts[0].removesuffix("Question 1: ").replace(". <|im_end|>", ".<|im_end|>")
    assert texts[1].index(sentence) < texts[1].index("A {x}.") or style == "facts", "before the passage"


def test_bounds_are_checked():
    data = {"task": {"name": "knowledge"}}
    assert run_config.build(data).task.directives is None
    config = run_config.build(data, ["task.directives.epochs=[2,4]"])
    assert config.task.directives == directives.Config([0.0001, 0.005], [2, 4])
    assert build(config.task, None).edit_prompt(CONTEXT).schema["properties"]["epochs"]["maximum"] == 4
    assert run_config.build(run_config.to_dict(config)) == config
    with pytest.raises(SealError, match=r"unknown key 'task.directives.epoch' \(did you mean 'epochs'\?\)"):
        run_config.build(data, ["task.directives.epoch=[2,4]"])
    with pytest.raises(SealError, match=r"task.directives='yes please': expected a mapping of learning_rates, epochs"):
        run_config.build(data, ["task.directives=yes please"])
    for bad in ([3], [4, 2], [0, 2]):
        with pytest.raises(SealError, match=r"task.directives.epochs=.*: expected the least and the most, both above 0"):
            build(Config(directives=directives.Config([0.0001, 0.005], bad)), None)
