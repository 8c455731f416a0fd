"""Fills in a template: `python launch/render.py TEMPLATE KEY=VALUE...` prints the YAML with each SEAL_KEY replaced by its value.

A template is YAML as it stands. Where SEAL_KEY is a whole value, digits become a number, yes and no a boolean, and an empty VALUE removes
the entry (and what holds nothing else); inside a longer text it is replaced as text. Quoting is the YAML writer's business, so no value can
break the file.
"""

from __future__ import annotations

import pathlib
import re
import sys
from typing import Any

import yaml

PLACEHOLDER = re.compile(r"SEAL_[A-Z_]+")


class Writer(yaml.SafeDumper):
    """Writes texts of several lines as blocks, as a person would."""


def text(writer: Writer, value: str) -> yaml.ScalarNode:
    return writer.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


Writer.add_representer(str, text)


def fill(node: Any, values: dict[str, str]) -> Any:
    """`node` (parsed YAML) with its placeholders replaced; None where nothing is left of it. Raises `KeyError` for one without a value."""
    if not node:
        return node
    if isinstance(node, dict):
        filled = {fill(key, values): fill(value, values) for key, value in node.items()}
        return {key: value for key, value in filled.items() if value is not None} or None
    if isinstance(node, list):
        return [value for value in (fill(item, values) for item in node) if value is not None] or None
    if not isinstance(node, str):
        return node
    if PLACEHOLDER.fullmatch(node):
        value = values[node]
        return int(value) if value.isdigit() else {"yes": True, "no": False, "": None}.get(value, value)
    return PLACEHOLDER.sub(lambda found: values[found[0]], node)


def main(arguments: list[str]) -> int:
    template, *pairs = arguments
    values = {f"SEAL_{key}": value for key, value in (pair.split("=", 1) for pair in pairs)}
    try:
        documents = [fill(document, values) for document in yaml.safe_load_all(pathlib.Path(template).read_text(encoding="utf-8"))]
    except KeyError as error:
        print(f"render.py: {template}: no value for {error.args[0]}", file=sys.stderr)
        return 2
    print(yaml.dump_all(documents, Dumper=Writer, sort_keys=False, width=1000, allow_unicode=True).rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
