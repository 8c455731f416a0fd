"""A self-edit of the ARC task: the JSON in which the policy chooses its training data and hyperparameters."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from seal_jax.tasks.arc.augmenters import Augmenter, chosen
from seal_jax.tasks.json_text import object_schema, short

SWITCHES = ("use_basic_augmentations", "use_size_augmentations", "use_chain_augmentations", "use_repeat_augmentations")
ALL_TOKENS, OUTPUT_TOKENS = "train_using_all_tokens", "train_using_output_tokens"
STRATEGIES = (ALL_TOKENS, OUTPUT_TOKENS)

MAX_STEPS = 375  # of an edit that is trained at all


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Between what a self-edit may choose, both ends included."""

    learning_rate: tuple[float, float]
    num_train_epochs: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Edit:
    """What a self-edit chose. The names are the JSON's."""

    use_basic_augmentations: bool
    use_size_augmentations: bool
    use_chain_augmentations: bool
    use_repeat_augmentations: bool
    strategy: str  # one of STRATEGIES
    learning_rate: float
    num_train_epochs: int

    @property
    def augmenters(self) -> tuple[Augmenter, ...]:
        """What makes the training puzzles."""
        return chosen(*(getattr(self, switch) for switch in SWITCHES))

    def to_json(self) -> dict[str, Any]:
        """The edit in the form that the policy writes."""
        return {
            "data_generation": {switch: getattr(self, switch) for switch in SWITCHES},
            "training": {
                "strategy": self.strategy,
                "learning_rate": self.learning_rate,
                "num_train_epochs": self.num_train_epochs,
            },
        }


def parse(text: str, bounds: Bounds) -> Edit | str:
    """The self-edit of a text, or one line that says why there is none. Any text may come.

    As in the original the whole text must be JSON (white space around it aside), and what is asked for must be there; more may be.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or a number of too many digits
        return f"not JSON: {' '.join(str(error).split())}"
    values = {}
    for section, keys in (("data_generation", SWITCHES), ("training", ("strategy", "learning_rate", "num_train_epochs"))):
        part = data.get(section) if isinstance(data, Mapping) else None
        if not isinstance(part, Mapping):
            return f"no object {section!r}"
        for key in keys:
            if key not in part:
                return f"no {section}.{key}"
            values[key] = part[key]
    for switch in SWITCHES:
        if not isinstance(values[switch], bool):
            return f"{switch}={short(values[switch])}: expected true or false"
    if values["strategy"] not in STRATEGIES:
        return f"strategy={short(values['strategy'])}: expected one of {', '.join(STRATEGIES)}"
    for key, kind in (("learning_rate", "a number"), ("num_train_epochs", "a whole number")):
        low, high = getattr(bounds, key)
        value = values[key]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:  # NaN is outside
            return f"{key}={short(value)}: expected {kind} from {low:g} to {high:g}"
    if values["num_train_epochs"] % 1:
        return f"num_train_epochs={short(values['num_train_epochs'])}: expected a whole number"
    return Edit(**values | {"learning_rate": float(values["learning_rate"]), "num_train_epochs": int(values["num_train_epochs"])})


def schema(bounds: Bounds) -> dict[str, Any]:
    """The JSON schema of the self-edits that `parse` takes, as `seal_jax.sample.schema` reads it.

    A learning rate is then written without exponent, with up to two digits after the point more than its bounds have.
    """
    (low, high), (fewest, most) = bounds.learning_rate, bounds.num_train_epochs
    return object_schema(
        data_generation=object_schema(**{switch: {"type": "boolean"} for switch in SWITCHES}),
        training=object_schema(
            strategy={"enum": list(STRATEGIES)},
            learning_rate={"type": "number", "minimum": low, "maximum": high},
            num_train_epochs={"type": "integer", "minimum": fewest, "maximum": most},
        ),
    )


def steps(epochs: int, sequences: int, batch_size: int = 2) -> int:
    """The training steps by which the original judges an edit; it does not train one of more than `MAX_STEPS`.

    A last batch that is not full counts by its share, rounded down over all epochs.
    """
    return epochs * sequences // batch_size
