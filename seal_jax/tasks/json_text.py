"""What the tasks whose self-edits hold JSON have in common."""

from __future__ import annotations

import json
from typing import Any


def object_schema(**properties: Any) -> dict[str, Any]:
    """The JSON schema of an object with these properties, all of them and no others."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def short(value: Any) -> str:
    """A value as a message shows it."""
    if isinstance(value, (list, dict)):  # of any depth
        return "a list" if isinstance(value, list) else "an object"
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
