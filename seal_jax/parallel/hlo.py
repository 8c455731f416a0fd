"""Reading XLA's text of a compiled program."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

_ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+)\w*\[([\d,]*)\]")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLS = re.compile(r"(?:calls|to_apply|(?:true|false)_computation)=%?([\w.-]+)")
_LISTED = re.compile(r"(?:branch|called)_computations=\{([^}]*)\}")
_WHILE = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The instructions of each computation of a program, from `compiled.as_text()`, a line each, and the name of the one it begins with."""
    found: dict[str, list[str]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if not line.startswith(" ") and (begun := _COMPUTATION.match(line)):
            current = found.setdefault(begun[2], [])
            entry = begun[2] if begun[1] else entry
        elif line.startswith(" "):
            current.append(line)
    return found, entry


def loop(line: str) -> tuple[str, str] | None:
    """The condition and the body of a loop; None for another instruction."""
    found = _WHILE.search(line)
    return (found[1], found[2]) if found else None


def trips(line: str, condition: Sequence[str], unknown: float) -> float:
    """How often a loop runs: what XLA notes beside it, or the one number that its counter is compared with."""
    if found := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(found[1])
    bounds = [int(n) for text in condition for n in re.findall(r" s32\[\]\S* constant\((\d+)\)", text)]
    plain = any(" compare(" in text and "direction=LT" in text and text.lstrip().startswith("ROOT") for text in condition)
    return bounds[0] if plain and len(bounds) == 1 else unknown


def called(line: str) -> list[str]:
    """The computations that an instruction names, but for a loop's."""
    return [*_CALLS.findall(line), *(name for listed in _LISTED.findall(line) for name in re.findall(r"[\w.-]+", listed))]


def arrays(types: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Element type and shape of the arrays that `types` lists."""
    for kind, shape in _ARRAY.findall(types):
        yield kind, tuple(int(n) for n in shape.split(",") if n)


def size(types: str) -> float:
    """The bytes of the arrays that `types` lists."""
    return float(sum(math.prod(shape) * _bits(kind) / 8 for kind, shape in arrays(types)))


def _bits(kind: str) -> int:
    return 8 if kind == "pred" else int(re.sub(r"\D", "", kind.replace("bf", "")))
