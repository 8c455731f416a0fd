"""The space of a sweep: which values which config keys may take, and the settings that are tried of them. Host code, plain Python."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from seal_jax import rng
from seal_jax.errors import SealError

Settings = dict[str, Any]  # config key -> the value that a trial sets it to, JSON data
TRIES = 100  # draws for each setting that is to be new, before a small space counts as exhausted


@dataclasses.dataclass(frozen=True)
class Choices:
    """Some values, in the order of the sweep file. JSON data, as the config holds them."""

    values: tuple[Any, ...]

    def draw(self, share: float) -> Any:
        """The value at `share` in [0, 1) of the way."""
        return self.values[int(share * len(self.values))]

    def has(self, value: Any) -> bool:
        return value in self.values


@dataclasses.dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`, both included; whole ones, where both are. `log`: equal ratios are equally likely."""

    low: float
    high: float
    log: bool = False

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def draw(self, share: float) -> float:
        """The number at `share` in [0, 1) of the way; those that are not whole have four digits."""
        low, high = self.low, self.high + 1 if self.whole else self.high
        found = low * (high / low) ** share if self.log else low + (high - low) * share
        return min(math.floor(found), self.high) if self.whole else min(max(float(f"{found:.4g}"), self.low), self.high)

    def has(self, value: Any) -> bool:
        return isinstance(value, int if self.whole else int | float) and self.low <= value <= self.high


Space = dict[str, Choices | Range]


def flatten(data: Mapping[Any, Any], whole: Sequence[str] = (), prefix: str = "") -> Settings:
    """Nested sections as dotted keys; a mapping with one of the keys `whole` is a value. Of equal keys the later one counts."""
    found: Settings = {}
    for key, value in data.items():
        if isinstance(value, Mapping) and value and not any(name in value for name in whole):
            found.update(flatten(value, whole, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def parse(key: str, said: Any, where: str) -> Choices | Range:
    """What the sweep file says of `key`: a list of values, or {low, high, log}. Raises `SealError`, which begins with `where`."""
    if isinstance(said, Mapping) and {"low", "high"} <= said.keys() <= {"low", "high", "log"} and isinstance(said.get("log", False), bool):
        low, high = (_number(said[end]) for end in ("low", "high"))
        if low is None or high is None or not low < high:
            raise SealError(f"{where}: space.{key}: low={said['low']!r}, high={said['high']!r}: expected two numbers, the lower one first")
        if said.get("log") and low <= 0:
            raise SealError(f"{where}: space.{key}: low={low}: with log, expected a number above 0")
        return Range(low, high, said.get("log", False))
    if isinstance(said, Sequence) and not isinstance(said, str) and said:
        return Choices(tuple(said))
    raise SealError(f"{where}: space.{key}={said!r}: expected a list of values, or {{low: 1, high: 10}} with log: true or without")


def _number(value: Any) -> float | None:
    """A finite number; also where YAML reads a text, as it does of 1e-3."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def grid(space: Mapping[str, Choices]) -> list[Settings]:
    """Every combination, the last key changing fastest; equal ones once."""
    made = [dict(zip(space, values, strict=True)) for values in itertools.product(*(c.values for c in space.values()))]
    return list({digest(settings): settings for settings in made}.values())


def random(space: Space, count: int, seed: int) -> list[Settings]:
    """`count` different settings, or as many as there are; each is a function of the seed and its number."""
    found: dict[str, Settings] = {}
    for number in range(count * TRIES):
        drawn = {key: d.draw(float(rng.generator(seed, "sweep", number, key).random())) for key, d in space.items()}
        found.setdefault(digest(drawn), drawn)
        if len(found) == count:
            break
    return list(found.values())


def digest(settings: Settings) -> str:
    """A short name of the settings, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def shown(value: Any) -> str:
    """A value for a reader, numbers in four digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def line(settings: Settings) -> str:
    """The settings in one line."""
    return " ".join(f"{key}={shown(value)}" for key, value in settings.items())
