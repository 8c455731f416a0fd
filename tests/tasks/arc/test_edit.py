import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_jax.sample.schema import regex
from seal_jax.tasks.arc import augmenters, messages
from seal_jax.tasks.arc.edit import SWITCHES, Bounds, Edit, parse, schema, steps

BOUNDS = Bounds(learning_rate=(0.00001, 0.001), num_train_epochs=(1, 5))
EDIT = Edit(True, False, False, True, "train_using_output_tokens", 1e-4, 2)


def changed(**values) -> str:
    data = EDIT.to_json()
    for part in data.values():
        part.update({key: value for key, value in values.items() if key in part})
    return json.dumps(data)


def test_an_edit_survives_its_text():
    assert parse(json.dumps(EDIT.to_json(), indent=2), BOUNDS) == EDIT
    assert EDIT.augmenters == (*augmenters.BASIC, *augmenters.REPEAT)


def test_keys_are_those_that_the_prompt_asks_for():
    example = messages.SELF_EDIT.split("Example output:\n")[1].replace("...", "0")
    assert {k: list(v) for k, v in json.loads(example).items()} == {k: list(v) for k, v in EDIT.to_json().items()}


def test_what_the_original_takes_is_taken():
    assert parse(f"\n {changed()}\n", BOUNDS) == EDIT
    more = EDIT.to_json() | {"comment": "x"}
    more["data_generation"] |= {"use_concat": True}
    assert parse(json.dumps(more), BOUNDS) == EDIT
    assert parse(changed(num_train_epochs=2.0), BOUNDS) == EDIT


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "not JSON"),
        ("Here it is: " + changed(), "not JSON"),
        (f"```json\n{changed()}\n```", "not JSON"),
        (changed()[:-1], "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("null", "no object 'data_generation'"),
        ('{"data_generation": 3}', "no object 'data_generation'"),
        ('{"data_generation": {}}', "no data_generation.use_basic_augmentations"),
        (json.dumps({"data_generation": dict.fromkeys(SWITCHES, True)}), "no object 'training'"),
        (json.dumps({"data_generation": dict.fromkeys(SWITCHES, True), "training": {}}), "no training.strategy"),
        (changed(use_size_augmentations="false"), 'use_size_augmentations="false": expected true or false'),
        (changed(use_size_augmentations=1), "use_size_augmentations=1: expected true or false"),
        (changed(strategy="train"), 'strategy="train": expected one of train_using_all_tokens, train_using_output_tokens'),
        (changed(strategy=[]), "strategy=a list: expected one of"),
        (changed(learning_rate="1e-4"), 'learning_rate="1e-4": expected a number from 1e-05 to 0.001'),
        (changed(learning_rate=True), "learning_rate=true: expected a number"),
        (changed(learning_rate=float("nan")), "learning_rate=NaN: expected a number"),
        (changed(learning_rate=1e-2), "learning_rate=0.01: expected a number"),
        (changed(num_train_epochs=0), "num_train_epochs=0: expected a whole number from 1 to 5"),
        (changed(num_train_epochs=2.5), "num_train_epochs=2.5: expected a whole number"),
        (changed(num_train_epochs=10**400), "num_train_epochs=1000"),
    ],
)
def test_reasons(text, reason):
    found = parse(text, BOUNDS)
    assert isinstance(found, str) and found.startswith(reason) and "\n" not in found and len(found) < 200


VALUES = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3), st.lists, max_leaves=3)


@given(st.one_of(st.text(), st.fixed_dictionaries({"use_basic_augmentations": VALUES, "learning_rate": VALUES, "strategy": VALUES})))
def test_any_text_is_an_edit_or_a_reason(given):
    found = parse(given if isinstance(given, str) else changed(**given), BOUNDS)
    assert isinstance(found, (Edit, str))


@given(st.data())
def test_what_the_schema_allows_is_an_edit(data):
    # Hypothesis draws texts of the very expression that samples are held to.
    text = data.draw(st.from_regex(regex(schema(BOUNDS)), fullmatch=True))
    assert isinstance(parse(text, BOUNDS), Edit)


@pytest.mark.parametrize(
    "learning_rate, allowed", [("0.0001", True), ("0.00001", True), ("0.001", True), ("0.0011", False), ("1e-4", False)]
)
def test_the_schema_holds_the_bounds(learning_rate, allowed):
    text = changed(learning_rate=123).replace("123", learning_rate)
    assert bool(re.fullmatch(regex(schema(BOUNDS)), text)) is allowed


def test_steps_are_counted_as_in_the_original():
    assert steps(3, 250) == 375 and steps(1, 5) == 2 and steps(3, 5) == 7
