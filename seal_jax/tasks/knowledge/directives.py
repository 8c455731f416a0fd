"""Directives: hyperparameters that a self-edit chooses, in a line of JSON before its text.

    {"learning_rate": 0.002, "epochs": 6, "loss": "all"}
    The first fact ...

The paper has this for ARC alone (section 3.2); here it is for knowledge too, off by default.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from seal_jax.errors import SealError
from seal_jax.tasks.json_text import object_schema, short

LOSSES = ("all", "part")  # on every token of a training sequence, or on all but its title


@dataclasses.dataclass
class Config:
    """Between what a self-edit may choose, both ends included."""

    learning_rates: list[float] = dataclasses.field(default_factory=lambda: [1e-4, 5e-3])  # as fit.learning_rate
    epochs: list[int] = dataclasses.field(default_factory=lambda: [1, 20])  # as fit.epochs


@dataclasses.dataclass(frozen=True)
class Directives:
    """What a self-edit chose; None where it did not."""

    learning_rate: float | None = None
    epochs: int | None = None
    loss: str | None = None  # one of LOSSES

    @property
    def fit(self) -> dict[str, Any]:
        """The inner loop's settings among them."""
        return {key: value for key in ("learning_rate", "epochs") if (value := getattr(self, key)) is not None}


def check(config: Config) -> None:
    """Raises `SealError` for bounds that are none."""
    for key in ("learning_rates", "epochs"):
        bounds = getattr(config, key)
        if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] < math.inf:
            raise SealError(f"task.directives.{key}={bounds}: expected the least and the most, both above 0")


def split(edit: str, config: Config) -> tuple[Directives, str] | str:
    """A self-edit's directives and the text after them, or one line that says why it is unusable. Any text may come.

    An edit that does not begin with "{" (white space aside) has no directives, and is all text. After the JSON its line must end.
    """
    opened = edit.lstrip()
    if not opened.startswith("{"):
        return Directives(), edit
    try:
        data, end = json.JSONDecoder().raw_decode(opened)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or a number of too many digits
        return f"directives are not JSON: {' '.join(str(error).split())}"
    line, _, text = opened[end:].partition("\n")
    if line.strip():
        return "directives are not followed by a line break"
    for key, value in data.items():
        if problem := _problem(key, value, config):
            return f"directives: {problem}"
    kinds = {"learning_rate": float, "epochs": int, "loss": str}
    return Directives(**{key: kinds[key](value) for key, value in data.items()}), text


def _problem(key: str, value: Any, config: Config) -> str | None:
    if key == "loss":
        return None if value in LOSSES else f"loss={short(value)}: expected {' or '.join(LOSSES)}"
    if key not in ("learning_rate", "epochs"):
        return f"unknown key {short(key)}; expected learning_rate, epochs, loss"
    low, high = config.learning_rates if key == "learning_rate" else config.epochs
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:  # NaN is outside
        return f"{key}={short(value)}: expected a number from {low:g} to {high:g}"
    if key == "epochs" and value % 1:
        return f"epochs={short(value)}: expected a whole number"
    return None


def schema(config: Config) -> dict[str, Any]:
    """The JSON schema of the directives, all of which are then written, as `seal_jax.sample.schema` reads it."""
    (low, high), (fewest, most) = config.learning_rates, config.epochs
    properties = {
        "learning_rate": {"type": "number", "minimum": low, "maximum": high},
        "epochs": {"type": "integer", "minimum": fewest, "maximum": most},
        "loss": {"enum": list(LOSSES)},
    }
    return object_schema(**properties)
