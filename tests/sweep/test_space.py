import math

import numpy as np
import pytest

from seal_jax.errors import SealError
from seal_jax.sweep import space
from seal_jax.sweep.space import Choices, Range


def test_sections_and_dotted_keys_are_the_same():
    nested = {"fit": {"epochs": [1, 2], "stop": {"loss": {"low": 0.1, "high": 1}}}, "fit.epochs": [3], "task": {}}
    assert space.flatten(nested, ("low", "high")) == {"fit.epochs": [3], "fit.stop.loss": {"low": 0.1, "high": 1}, "task": {}}


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ([1, "a", None], Choices((1, "a", None))),
        ({"low": 1, "high": 3}, Range(1, 3)),
        ({"low": "1e-4", "high": 0.1, "log": True}, Range(1e-4, 0.1, True)),
        ({"low": 3, "high": 1}, "low=3, high=1: expected two numbers, the lower one first"),
        ({"low": 0, "high": 1, "log": True}, "low=0: with log, expected a number above 0"),
        ({"low": "a", "high": 1}, "low='a', high=1: expected two numbers"),
        ({"low": 1, "hihg": 3}, "expected a list of values, or {low: 1, high: 10}"),
        ([], "expected a list of values"),
        ("abc", "expected a list of values"),
        (3, "expected a list of values"),
    ],
)
def test_what_a_key_may_say(said, found):
    if isinstance(found, str):
        with pytest.raises(SealError) as refused:
            space.parse("fit.epochs", said, "f.yaml")
        assert str(refused.value).startswith("f.yaml: space.fit.epochs") and found in str(refused.value)
    else:
        assert space.parse("fit.epochs", said, "f.yaml") == found


def test_a_grid_is_every_combination_once():
    found = space.grid({"a": Choices((1, 2, 1)), "b": Choices(("x", [1]))})
    assert found == [{"a": 1, "b": "x"}, {"a": 1, "b": [1]}, {"a": 2, "b": "x"}, {"a": 2, "b": [1]}]


def test_draws_are_within_the_space_and_spread_over_it():
    dims = {"whole": Range(1, 4), "log": Range(1e-4, 1.0, True), "plain": Range(-1.0, 1.0), "one": Choices(("a", "b"))}
    found = space.random(dims, 400, 0)
    assert len(found) == 400 and all(d.has(s[key]) for s in found for key, d in dims.items())
    assert np.allclose(np.bincount([s["whole"] for s in found])[1:], 100, atol=35)
    assert abs(np.mean([math.log10(s["log"]) for s in found]) + 2) < 0.2 and abs(np.mean([s["plain"] for s in found])) < 0.1
    assert 150 < sum(s["one"] == "a" for s in found) < 250
    assert {space.Range(1, 8, True).draw(u) for u in np.linspace(0, 0.999, 50)} == set(range(1, 9))


def test_draws_depend_on_seed_key_and_number_alone():
    dims = {"a": Range(0.0, 1.0), "b": Range(0.0, 1.0)}
    few, many = space.random(dims, 3, 0), space.random(dims, 6, 0)
    assert many[:3] == few and space.random(dims, 3, 1) != few and few[0]["a"] != few[0]["b"]
    assert [s["a"] for s in space.random({"a": dims["a"]}, 3, 0)] == [s["a"] for s in few], "not on the other keys"
    assert sorted(s["a"] for s in space.random({"a": Choices((1, 2, 3))}, 10, 0)) == [1, 2, 3], "no setting comes twice"


def test_names():
    settings = {"fit.learning_rate": 0.001, "task.directives": None, "fit.lora.targets": ["q_proj"], "task.prompt": "facts"}
    assert (
        space.digest(settings) == space.digest(dict(reversed(settings.items()))) != space.digest({**settings, "fit.learning_rate": 0.002})
    )
    assert space.line({"a": 0.00123456, "b": "x", "c": [1]}) == "a=0.001235 b=x c=[1]"
