"""From a JSON schema to the regular expression of the texts that satisfy it: host code, pure.

A text is written as `json.dumps` writes it: one space after a colon and a comma, no other white space, and the properties of an object
all there, in the schema's order. Every language made here is finite: a sample cannot go on for ever, only be cut by its limit.

A number has digits and a point, no exponent. How many digits after the point: `multipleOf` says (0.001: three), or else two more than its
bounds have. Within that, the numbers between the bounds are exactly those that can be written.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

from seal_jax.errors import SealError

ANNOTATIONS = {"$schema", "$id", "$comment", "title", "description", "default", "examples"}
# A bound to the outermost whole number within it.
LOW = {"minimum": math.ceil, "exclusiveMinimum": lambda x: math.floor(x) + 1}
HIGH = {"maximum": math.floor, "exclusiveMaximum": lambda x: math.ceil(x) - 1}
BOUNDS = {*LOW, *HIGH, "multipleOf"}
# What may stand beside `type`. A keyword that is not known is refused: to ignore it would be to sample texts that break it.
KEYWORDS = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "minItems", "maxItems"},
    "string": {"minLength", "maxLength"},
    "number": BOUNDS,
    "integer": BOUNDS,
    "boolean": set(),
    "null": set(),
}
CHARACTER = r'(?:[^"\\\x00-\x1F]|\\["\\/bfnrt])'  # of a string


def regex(schema: Mapping[str, Any]) -> str:
    """The regular expression (Rust's syntax, which is also Python's here) of the JSON texts that satisfy `schema`, written as said above.

    Supported: object, array with `maxItems`, string with `maxLength`, number and integer with bounds, boolean, null, enum, const.
    Raises `SealError` for anything else, and where nothing satisfies the schema.
    """
    return _value(schema, "schema")


def _value(schema: Any, where: str) -> str:
    _expect(schema, "object", where)
    keys = set(schema) - ANNOTATIONS
    kind = schema.get("type")
    for word in {"enum", "const"} & keys:
        _refuse(keys - {word, "type"}, where)
        values = schema[word] if word == "enum" else [schema[word]]
        _expect(values, "array", f"{where}.enum")
        for value in values if kind is not None else ():
            _expect(value, kind, f"{where}.{word}")
        return _either([_literal(v) for v in values], f"{where}.{word}")
    if not isinstance(kind, str) or kind not in KEYWORDS:
        raise SealError(f"{where}.type={kind!r}: expected one of {', '.join(KEYWORDS)}, or enum or const")
    _refuse(keys - KEYWORDS[kind] - {"type"}, where)
    return {"object": _object, "array": _array, "string": _string, "number": _number, "integer": _number}.get(kind, _named)(schema, where)


def _refuse(keys: set[str], where: str) -> None:
    if keys:
        raise SealError(f"{where}: {min(keys)!r} is not supported here")


def _expect(value: Any, kind: str, where: str) -> None:
    if not _is(value, kind):
        raise SealError(f"{where}: expected {kind}, found {value!r}")


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    types = {"object": Mapping, "array": list, "string": str, "number": (int, float), "integer": int, "null": type(None)}
    return isinstance(value, types.get(kind, ()))


def _literal(value: Any) -> str:
    return re.sub(r"([\\.+*?()|\[\]{}^$#&~-])", r"\\\1", json.dumps(value, ensure_ascii=False))


def _either(alternatives: list[str], where: str) -> str:
    if not alternatives:
        raise SealError(f"{where}: nothing to choose from")
    return f"(?:{'|'.join(alternatives)})"


def _named(schema: Mapping[str, Any], where: str) -> str:
    return "(?:true|false)" if schema["type"] == "boolean" else "null"


def _object(schema: Mapping[str, Any], where: str) -> str:
    properties, required = schema.get("properties", {}), schema.get("required", [])
    _expect(properties, "object", f"{where}.properties")
    _expect(required, "array", f"{where}.required")
    for name in required:
        if name not in properties:
            raise SealError(f"{where}.required: {name!r} is not among the properties")
    return r"\{" + ", ".join(f"{_literal(name)}: {_value(s, f'{where}.{name}')}" for name, s in properties.items()) + r"\}"


def _sizes(schema: Mapping[str, Any], least: str, most: str, where: str) -> tuple[int, int]:
    low, high = schema.get(least, 0), schema.get(most)
    if not (_is(low, "integer") and _is(high, "integer") and 0 <= low <= high):
        raise SealError(f"{where}: {least}={low!r}, {most}={high!r}: expected {most}, at least {least}, so that a sample ends")
    return low, high


def _array(schema: Mapping[str, Any], where: str) -> str:
    low, high = _sizes(schema, "minItems", "maxItems", where)
    if high == 0:
        return r"\[\]"
    item = _value(schema.get("items"), f"{where}.items")
    some = rf"{item}(?:, {item}){{{max(low - 1, 0)},{high - 1}}}"
    return rf"\[{some}\]" if low else rf"\[(?:{some})?\]"


def _string(schema: Mapping[str, Any], where: str) -> str:
    low, high = _sizes(schema, "minLength", "maxLength", where)
    return f'"{CHARACTER}{{{low},{high}}}"'


# --- Numbers --------------------------------------------------------------------------------------------------------


def _number(schema: Mapping[str, Any], where: str) -> str:
    given = {}
    for key in sorted(BOUNDS & set(schema)):
        _expect(schema[key], "number", f"{where}.{key}")
        if isinstance(schema[key], float) and not math.isfinite(schema[key]):
            raise SealError(f"{where}.{key}={schema[key]}: expected a finite number")
        given[key] = Decimal(str(schema[key]))
    if not (LOW.keys() & given and HIGH.keys() & given):
        raise SealError(f"{where}: expected minimum and maximum, so that a sample ends")
    step = given.get("multipleOf")
    if step is not None and (step <= 0 or step > 1 or step.normalize().as_tuple().digits != (1,)):
        raise SealError(f"{where}.multipleOf={schema['multipleOf']!r}: expected a power of ten, at most 1")
    if schema["type"] == "integer":
        if step not in (None, Decimal(1)):
            raise SealError(f"{where}.multipleOf={schema['multipleOf']!r}: expected 1 for an integer")
        decimals = 0
    else:
        decimals = max(map(_decimals, given.values())) + 2 if step is None else _decimals(step)
    # From here on in whole units of the last digit.
    low = max(inward(Fraction(given[k]) * 10**decimals) for k, inward in LOW.items() if k in given)
    high = min(inward(Fraction(given[k]) * 10**decimals) for k, inward in HIGH.items() if k in given)
    if low > high:
        raise SealError(f"{where}: no number with {decimals} digits after the point satisfies {dict(sorted(schema.items()))}")
    return between(low, high, decimals)


def _decimals(number: Decimal) -> int:
    return max(0, -int(number.normalize().as_tuple().exponent))


def between(low: int, high: int, decimals: int) -> str:
    """Matches the numbers n / 10^`decimals` for `low` <= n <= `high`: no more than `decimals` digits after the point, and no "-0"."""
    signs = []
    if low < 0:
        signs.append("-" + _unsigned(max(1, -high), -low, decimals))
    if high >= 0:
        signs.append(_unsigned(max(0, low), high, decimals))
    return _either(signs, "")


def _unsigned(low: int, high: int, decimals: int) -> str:
    size = 10**decimals
    (first, after_first), (last, after_last) = divmod(low, size), divmod(high, size)
    if first == last:
        return _integers(first, last) + _fraction(after_first, after_last, decimals)
    parts = [_integers(first, first) + _fraction(after_first, size - 1, decimals)]
    if first + 1 < last:
        parts.append(_integers(first + 1, last - 1) + _fraction(0, size - 1, decimals))
    parts.append(_integers(last, last) + _fraction(0, after_last, decimals))
    return _either(parts, "")


def _integers(low: int, high: int) -> str:
    """0 <= `low` <= n <= `high`, without leading zeros: for every number of digits, what of the range has that many."""
    lengths = range(len(str(low)), len(str(high)) + 1)
    parts = [_digits(str(max(low, 10 ** (n - 1) if n > 1 else 0)), str(min(high, 10**n - 1)), False) for n in lengths]
    return _either(parts, "")


def _fraction(low: int, high: int, decimals: int) -> str:
    """The point and what follows it, where that stands for `low` to `high` of 10^`decimals`; also nothing, where that is enough."""
    if decimals == 0:
        return ""
    some = r"\." + _digits(f"{low:0{decimals}}", f"{high:0{decimals}}", True)
    return f"(?:{some})?" if low == 0 else some


def _digits(low: str, high: str, shorter: bool) -> str:
    """Digits from `low` to `high`, which are equally long; if `shorter`, also without some of the zeros that they end with."""
    rest = len(low) - 1
    zeros, nines = "0" * rest, "9" * rest

    def remaining(digit: int) -> tuple[str, str]:
        return low[1:] if digit == int(low[0]) else zeros, high[1:] if digit == int(high[0]) else nines

    parts = []
    for (least, most), group in itertools.groupby(range(int(low[0]), int(high[0]) + 1), remaining):
        digits = list(group)
        tail = ""
        if rest and (least, most) == (zeros, nines):
            tail = f"[0-9]{{0,{rest}}}" if shorter else f"[0-9]{{{rest}}}"
        elif rest:
            tail = _digits(least, most, shorter)
            tail = f"(?:{tail})?" if shorter and least == zeros else tail
        parts.append(f"[{digits[0]}-{digits[-1]}]{tail}" if len(digits) > 1 else f"{digits[0]}{tail}")
    return _either(parts, "")
