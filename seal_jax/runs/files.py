"""Writing JSON files so that a reader sees the old content or the new, whole, whatever happens to the writer."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from seal_jax.errors import SealError
from seal_jax.runs import places
from seal_jax.runs.places import ObjectPath, Place

TEMPORARY = ".tmp"  # the suffix of a file that is not finished; never read, removed when its run is opened again


@contextlib.contextmanager
def faults(path: str | os.PathLike[str] | ObjectPath) -> Iterator[None]:
    """Turns an `OSError` of the block, which writes `path`, into a `SealError` that says what to do."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename and str(path) not in os.fsdecode(error.filename) else ""
        advice = "see to the bucket" if isinstance(path, ObjectPath) else "free space or fix the folder"
        raise SealError(
            f"{path}: cannot write: {reason(error)}{where}; nothing finished is lost: {advice}, then run the same command again to go on"
        ) from None


def reason(error: OSError) -> str:
    """What went wrong, to stand within a sentence."""
    text = error.strerror or str(error)
    return text[:1].lower() + text[1:]


def dump(data: Any, indent: int | None = 1) -> bytes:
    """`data` as strict JSON in ASCII. Numpy and JAX values become plain ones; NaN and infinity, which JSON lacks, become null."""
    return json.dumps(_plain(data), indent=indent, allow_nan=False).encode("ascii")


def _plain(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, (pathlib.PurePath, ObjectPath)):
        return str(data)
    if hasattr(data, "tolist"):
        return _plain(data.tolist())
    return data


def write_all(file: int, data: bytes) -> None:
    """`os.write`, which may write a part only, until all is written."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def write_atomic(path: Place, data: bytes) -> None:
    """Puts `data` at `path` by way of a temporary file and a rename; on the disk, both, when this returns. Makes the folder if need be.

    An object of a store is there whole or not there anyway. Raises `SealError` if the disk is full or the folder, or the bucket, cannot be
    written; `path` is then as before.
    """
    if isinstance(path, ObjectPath):
        with faults(path):
            return path.write_bytes(data)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    with faults(path):
        _make_folder(path.parent)
        try:
            file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                write_all(file, data)
                os.fsync(file)
            finally:
                os.close(file)
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary)  # a full disk should not stay full of it
            raise
        sync_folder(path.parent)


def _make_folder(folder: pathlib.Path) -> None:
    """`mkdir -p`, with the new entries on the disk."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: pathlib.Path) -> None:
    """Makes renames and new files in `folder` survive a power failure."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextlib.contextmanager
def staged(folder: Place) -> Iterator[pathlib.Path]:
    """A folder of this machine to write files into, which are at `folder` after the block."""
    if isinstance(folder, pathlib.Path):
        yield folder
        return
    with places.scratch() as here:
        yield here / folder.name
        with faults(folder):
            for path in sorted((here / folder.name).rglob("*")):
                if path.is_file():
                    places.upload(path, folder / path.relative_to(here / folder.name).as_posix())


def remove_tree(folder: Place) -> None:
    """Removes the folder with all that is in it, if it is there."""
    with faults(folder):
        if isinstance(folder, ObjectPath):
            places.remove_tree(folder)
        elif folder.exists():
            shutil.rmtree(folder)
