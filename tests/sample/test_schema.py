import json
import re
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seal_jax.errors import SealError
from seal_jax.sample import schema
from seal_jax.sample.constraint import for_regex

BYTES = tuple(bytes([b]) for b in range(256))


def is_between(text, low, high, decimals):
    """By decimal arithmetic: what `schema.between` says of its expression."""
    places = rf"(\.[0-9]{{1,{decimals}}})?" if decimals else ""
    if not re.fullmatch(rf"-?(0|[1-9][0-9]*){places}", text, re.ASCII):
        return False
    value = Decimal(text).scaleb(decimals)
    return low <= value <= high and not (text.startswith("-") and value == 0)


def test_numbers_of_few_digits_one_and_all():
    texts = [f"{sign}{whole}{rest}" for sign in ("", "-") for whole in ("0", "1", "2", "9", "10", "12", "00", "01", "")
             for rest in ("", ".", ".0", ".1", ".9", ".00", ".05", ".10", ".99", ".000")]  # fmt: skip
    for decimals in range(3):
        bounds = [-1300, -1001, -205, -110, -100, -99, -1, 0, 1, 5, 10, 99, 100, 110, 209, 1000, 1299]
        for low in bounds:
            for high in (b for b in bounds if b >= low):
                expression = re.compile(schema.between(low, high, decimals))
                for text in texts:
                    assert bool(expression.fullmatch(text)) == is_between(text, low, high, decimals), (text, low, high, decimals)


@given(st.data(), st.integers(0, 9))
@settings(max_examples=300, deadline=None)
def test_numbers_of_many_digits(data, decimals):
    number = st.one_of(st.integers(-(10**12), 10**12), st.integers(-1000, 1000))
    low, high = sorted([data.draw(number), data.draw(number)])
    expression = schema.between(low, high, decimals)
    near = st.sampled_from([low, high]).flatmap(lambda n: st.integers(n - 11, n + 11))
    for n in data.draw(st.lists(st.one_of(near, number, st.integers(low, high)), max_size=20)):
        text = f"{Decimal(n).scaleb(-decimals):f}"
        for cut in range(decimals + 1):
            short = text[: len(text) - cut].rstrip(".")
            assert bool(re.fullmatch(expression, short)) == is_between(short, low, high, decimals), (short, low, high, decimals)


# --- Schemas --------------------------------------------------------------------------------------------------------


def satisfies(value, schema):
    """Whether a parsed text satisfies a schema, by the keywords that these tests use. Numbers are `Decimal` or int."""
    if "enum" in schema or "const" in schema:
        choices = schema.get("enum", [schema.get("const")])
        return any(json.dumps(value, default=float) == json.dumps(c) for c in choices)
    kind = schema["type"]
    if kind == "object":
        inner = schema["properties"]
        return isinstance(value, dict) and {*value} == {*inner} and all(satisfies(value[k], s) for k, s in inner.items())
    if kind == "array":
        sized = isinstance(value, list) and schema.get("minItems", 0) <= len(value) <= schema["maxItems"]
        return sized and all(satisfies(v, schema["items"]) for v in value)
    if kind == "string":
        return isinstance(value, str) and schema.get("minLength", 0) <= len(value) <= schema["maxLength"]
    if kind in ("number", "integer"):
        exact = isinstance(value, int | Decimal if kind == "number" else int) and not isinstance(value, bool)
        value = Decimal(value) if exact else None
        over = "exclusiveMinimum" in schema and not value > Decimal(str(schema["exclusiveMinimum"]))
        return exact and not over and Decimal(str(schema.get("minimum", "-inf"))) <= value <= Decimal(str(schema["maximum"]))
    return value is None if kind == "null" else isinstance(value, bool)


text = st.text(st.characters(codec="utf-8"), max_size=8)
constant = st.one_of(text, st.integers(-100, 100), st.booleans(), st.none(), st.sampled_from([1e-5, 0.25, [1, "a"], {"b": None}, []]))
number = st.one_of(st.integers(-300, 300), st.sampled_from([1e-6, 0.001, 0.25, -3.5, 1e20, -2e-4]))


def bounded(kind, bounds):
    low, high = sorted(bounds)
    return {"type": kind, "minimum": low, "maximum": high}


leaf = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null", "title": "none"}]),
    st.lists(constant, min_size=1, max_size=4).map(lambda values: {"enum": values}),
    constant.map(lambda value: {"const": value}),
    st.tuples(number, number).map(lambda b: bounded("number", b)),
    st.tuples(st.integers(-300, 300), st.integers(-300, 300)).map(lambda b: bounded("integer", b)),
    st.tuples(st.integers(-9, 9), st.integers(10, 20)).map(lambda b: {"type": "number", "exclusiveMinimum": b[0], "maximum": b[1]}),
    st.tuples(st.integers(0, 2), st.integers(2, 4)).map(lambda n: {"type": "string", "minLength": n[0], "maxLength": n[1]}),
)
schemas = st.recursive(
    leaf,
    lambda inner: st.one_of(
        st.dictionaries(text, inner, max_size=3).map(lambda p: {"type": "object", "properties": p, "required": [*p]}),
        st.tuples(inner, st.integers(0, 1), st.integers(1, 3)).map(
            lambda t: {"type": "array", "items": t[0], "minItems": t[1], "maxItems": t[2]}
        ),
    ),
    max_leaves=5,
)


@given(schemas, st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_whatever_the_automaton_spells_satisfies_the_schema(wanted, random):
    constraint = for_regex(schema.regex(wanted), BYTES)
    for _ in range(5):
        spelt, state = b"", 0
        while True:
            going = [b for b in range(256) if constraint.following[state, constraint.class_of[b]] >= 0]
            assert going or constraint.final[state]
            if not going or (constraint.final[state] and random.random() < 0.3):
                break
            byte = random.choice(going)
            spelt, state = spelt + bytes([byte]), constraint.following[state, constraint.class_of[byte]]
        value = json.loads(spelt.decode(), parse_float=Decimal)
        assert satisfies(value, wanted), (spelt, wanted)


def test_a_schema_as_an_expression():
    wanted = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "on": {"type": "boolean", "description": "whether"},
            "rate": {"type": "number", "minimum": 1e-5, "maximum": 0.01},
            "mode": {"type": "string", "enum": ["a.b", "c"]},
            "more": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 12}, "maxItems": 2},
        },
        "required": ["on"],
        "additionalProperties": False,
    }
    expression = schema.regex(wanted)
    good = '{"on": true, "rate": 0.0025, "mode": "a.b", "more": [1, 12]}'
    assert re.fullmatch(expression, good) and json.dumps(json.loads(good)) == good
    for old, new in [("0.0025", "0.01"), ("0.0025", "0.0000100"), ("0.0025", "0.0012345"), ("[1, 12]", "[]"), ("[1, 12]", "[7]")]:
        assert re.fullmatch(expression, good.replace(old, new)), new
    wrong = [("0.0025", "0.010001"), ("0.0025", "0.000009"), ("0.0025", "0.00123456"), ("0.0025", "2.5e-3"), ("0.0025", ".0025")]
    wrong += [("a.b", "aXb"), ("[1, 12]", "[1,12]"), ("[1, 12]", "[1, 2, 3]"), ("[1, 12]", "[13]"), ("[1, 12]", "[0]"), ("[1, 12]", "[01]")]
    wrong += [("true", "1"), ("true, ", "true,  "), ("{", "{ "), ('"on": true, ', "")]
    for old, new in wrong:
        assert old in good and not re.fullmatch(expression, good.replace(old, new, 1)), new


def test_how_many_digits_a_number_has():
    bounds = {"type": "number", "minimum": 0, "maximum": 1}
    for more, longest in [({}, "0.12"), ({"multipleOf": 0.0001}, "0.1234"), ({"multipleOf": 1}, "0"), ({"minimum": 0.5}, "0.512")]:
        expression = schema.regex(bounds | more)
        assert re.fullmatch(expression, longest) and not re.fullmatch(expression, longest + ("1" if "." in longest else ".1")), more


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ([], "schema: expected object, found []"),
        ({}, "schema.type=None: expected one of"),
        ({"type": "date"}, "schema.type='date': expected one of"),
        ({"type": ["string", "null"]}, "expected one of"),
        ({"type": "integer", "minimum": 1}, "schema: expected minimum and maximum"),
        ({"type": "number", "minimum": 2, "maximum": 1}, "schema: no number with 2 digits after the point"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.001, "multipleOf": 0.01}, "no number with 2 digits"),
        ({"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.5}, "multipleOf=0.5: expected a power of ten"),
        ({"type": "number", "minimum": 0, "maximum": float("inf")}, "schema.maximum=inf: expected a finite number"),
        ({"type": "number", "minimum": True, "maximum": 1}, "schema.minimum: expected number, found True"),
        ({"type": "integer", "minimum": 0, "maximum": 1, "multipleOf": 0.1}, "expected 1 for an integer"),
        ({"type": "string"}, "schema: minLength=0, maxLength=None: expected maxLength"),
        ({"type": "string", "maxLength": 3, "pattern": "a"}, "schema: 'pattern' is not supported here"),
        ({"type": "array", "items": {"type": "null"}, "minItems": 3, "maxItems": 2}, "expected maxItems, at least minItems"),
        ({"type": "array", "maxItems": 2}, "schema.items: expected object, found None"),
        ({"enum": []}, "schema.enum: nothing to choose from"),
        ({"type": "string", "enum": ["a", 1]}, "schema.enum: expected string, found 1"),
        ({"enum": 3}, "schema.enum: expected array, found 3"),
        ({"anyOf": [{"type": "null"}]}, "schema.type=None: expected one of"),
        ({"type": "object", "properties": {"a": {"type": "string"}}}, "schema.a: minLength=0"),
        ({"type": "object", "required": ["a"]}, "schema.required: 'a' is not among the properties"),
        ({"type": "object", "properties": []}, "schema.properties: expected object, found []"),
    ],
)
def test_what_is_refused(wanted, told):
    with pytest.raises(SealError) as caught:
        schema.regex(wanted)
    assert told in str(caught.value) and "\n" not in str(caught.value)
