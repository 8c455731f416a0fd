"""The held general text: what side effects of edits are measured on, since no passage is about it. Host code."""

from __future__ import annotations

import importlib.resources
import json
import pathlib

from seal_jax.errors import SealError

OWN = "general"


def texts(source: str) -> list[str]:
    """The texts of `source`: "general" (the package's own 16 paragraphs), or the path of a file.

    A .txt file holds paragraphs with blank lines between them, a .json file a list of strings. Raises `SealError` if the file is
    missing, malformed, or holds no text.
    """
    if source == OWN:
        return json.loads((importlib.resources.files("seal_jax.rest_em") / "data" / "general.json").read_text(encoding="utf-8"))
    path = pathlib.Path(source)
    if path.suffix not in (".txt", ".json"):
        raise SealError(f"general text {source!r}: expected {OWN!r}, or a .txt or .json file")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SealError(f"general text {source}: cannot read: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError:
        raise SealError(f"general text {source}: not UTF-8 text; save it as UTF-8") from None
    found = _paragraphs(content) if path.suffix == ".txt" else _listed(content, source)
    if not found:
        raise SealError(f"general text {source}: no text in it; expected one paragraph at least")
    return found


def _paragraphs(content: str) -> list[str]:
    paragraphs: list[list[str]] = [[]]
    for line in content.splitlines():
        if line.strip():
            paragraphs[-1].append(line)
        else:
            paragraphs.append([])
    return ["\n".join(lines).strip() for lines in paragraphs if lines]


def _listed(content: str, source: str) -> list[str]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SealError(f"general text {source}: not readable as JSON: {error}") from None
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise SealError(f"general text {source}: expected a JSON list of strings")
    # Half a surrogate pair, which JSON can spell, is no character, and no tokenizer takes it.
    return [text.strip().encode("utf-8", "replace").decode() for text in found if text.strip()]
