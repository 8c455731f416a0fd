"""Reading and writing the files of model and adapter folders."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from seal_jax.errors import SealError


def one_line(error: BaseException, limit: int = 300) -> str:
    """An exception's message on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def read_json(path: Path, kind: str = "model") -> dict[str, Any]:
    """The mapping in a JSON file of a folder of that kind."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SealError(f"{path}: no such file; expected {path.parent} to be a {kind} folder") from None
    except (OSError, ValueError) as error:
        raise SealError(f"{path}: not readable as JSON ({one_line(error)})") from None
    if not isinstance(data, dict):
        raise SealError(f"{path}: expected a JSON mapping, found {type(data).__name__}")
    return data


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def open_safetensors(path: Path, hint: str) -> Iterator[Any]:
    """A safetensors file whose tensors are read as numpy arrays. `hint` says what to do if there is none."""
    if not path.is_file():
        raise SealError(f"{path}: no such file; {hint}")
    try:
        file = safe_open(path, framework="np")
    except (OSError, SafetensorError) as error:
        raise SealError(f"{path}: not a readable safetensors file ({one_line(error)}); fetch or write it again") from None
    with file:
        yield file


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write into that becomes `path` at the end: `path` is whole or not there, whatever happens to the writer.

    Raises `SealError` if `path` holds something already, or cannot be written.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise SealError(f"{path}: already there; remove it, or choose another folder")
    tmp: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        tmp.chmod(0o777 & ~_umask())  # mkdtemp's own mode would lock other users out
        yield tmp
        os.replace(tmp, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise SealError(f"{path}: cannot be written ({reason}); make room or choose another folder") from None
    finally:
        if tmp is not None:
            shutil.rmtree(tmp, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_safetensors(tensors: dict[str, Any], path: Path) -> None:
    """Writes numpy arrays as a file that transformers and peft read, which insist on the metadata. It has a new file's usual rights: the
    package would leave it to its owner alone."""
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o666 & ~_umask())
