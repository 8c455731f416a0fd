"""Adapters on disk, through orbax-checkpoint: a tree of arrays and a JSON object, there and whole or not there.

A checkpoint is a folder that any orbax `PyTreeCheckpointer` restores, with one file more, `manifest.json`: the metadata, and the size and
digest of each other file. Orbax reports a damaged file in many ways, some of them from its own threads; the manifest tells first.

In an object store, where nothing can be renamed, orbax's files are in a folder of their own beside the manifest, which names it under
"data": so the one object that is written last changes the old checkpoint into the new one. They travel by way of a folder of this machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from seal_jax.errors import SealError
from seal_jax.runs import files, places
from seal_jax.runs.places import ObjectPath, Place

MANIFEST = "manifest.json"


def save_adapters(folder: str | os.PathLike[str] | ObjectPath, tree: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Writes `tree` (nested dicts with text keys; JAX or numpy arrays, any shapes; dtypes kept) and `metadata` (JSON data) at `folder`.

    What was at `folder` is replaced. All is written to a folder beside it, which is renamed when the whole is on the disk. Raises
    `SealError` if it cannot be written; `folder` is then as before.
    """
    folder = places.place(folder)
    arrays = jax.tree.map(np.asarray, jax.device_get(dict(tree)))
    if isinstance(folder, ObjectPath):
        with places.scratch() as here:
            _save(here / folder.name, arrays, metadata)
            _upload(here / folder.name, folder)
    else:
        _save(pathlib.Path(os.path.abspath(folder)), arrays, metadata)  # orbax wants absolute paths


def _save(folder: pathlib.Path, arrays: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    staging = folder.with_name(f".{folder.name}.new")
    _remove(staging)
    try:
        with _quiet(), _checkpointer() as checkpointer:
            checkpointer.save(staging, arrays)
    except Exception as error:  # a full disk comes as OSError, ValueError or RuntimeError, by the layer that meets it
        _remove(staging)
        raise SealError(
            f"{folder}: cannot write the checkpoint: {_reason(error)}; "
            "nothing finished is lost: free space or fix the folder, then run the same command again to go on"
        ) from None
    try:
        with files.faults(folder):
            digests = {}
            for path in sorted(path for path in staging.rglob("*") if path.is_file()):
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
                    digests[path.relative_to(staging).as_posix()] = [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
            files.write_atomic(staging / MANIFEST, files.dump({"metadata": dict(metadata), "files": digests}))
            for parent, _, _ in os.walk(staging):
                files.sync_folder(pathlib.Path(parent))
            _put(staging, folder)
    except SealError:
        _remove(staging)
        raise


def _put(staging: pathlib.Path, folder: pathlib.Path) -> None:
    """A checkpoint that is whole in the place of an earlier one. Between the two there is none: see `recover`."""
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(staging, folder)
    files.sync_folder(folder.parent)


def recover(folder: Place) -> None:
    """Puts a checkpoint in its place that is whole beside it, as a process leaves it that is killed while it replaces an earlier one.

    For the process that works on the run alone: another's may be in the making.
    """
    if isinstance(folder, ObjectPath) or is_complete(folder):
        return
    folder = pathlib.Path(os.path.abspath(folder))
    if is_complete(staging := folder.with_name(f".{folder.name}.new")):
        with files.faults(folder):
            _put(staging, folder)


def _upload(source: pathlib.Path, target: ObjectPath) -> None:
    manifest = json.loads((source / MANIFEST).read_bytes())
    data = f"data-{hashlib.sha256(files.dump(manifest['files'])).hexdigest()[:16]}"
    with files.faults(target):
        for name in manifest["files"]:
            places.upload(source / name, target / data / name)
        files.write_atomic(target / MANIFEST, files.dump({**manifest, "data": data}))
        places.remove_tree(target, keep=(MANIFEST, f"{data}/"))


def _checkpointer() -> ocp.Checkpointer:
    """One that asks for no other process: in a run of several, the first alone saves and restores."""
    alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}, barrier_sync_key_prefix="seal_jax")
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the tracebacks that orbax's threads log off the screen; it raises the same errors, which are told in one line."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _reason(error: Exception) -> str:
    """The error of the operating system, where orbax's long message carries one; else the message's beginning, on one line."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])).lower() if code else " ".join(str(error).split())[:300]


def _remove(staging: pathlib.Path) -> None:
    """Removes what a killed or failed save left, orbax's own temporary folder included."""
    for left in staging.parent.glob(f"{staging.name}*"):
        shutil.rmtree(left, ignore_errors=True)


def is_complete(folder: str | os.PathLike[str] | ObjectPath) -> bool:
    """Whether a checkpoint of `save_adapters` is at `folder`, with all of its files at their sizes."""
    return _manifest(places.place(folder)) is not None


def _manifest(folder: Place) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        data = folder / manifest.get("data", "")
        found = data.sizes() if isinstance(data, ObjectPath) else {name: (data / name).stat().st_size for name in manifest["files"]}
        whole = all(found.get(name) == size for name, (size, _) in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(folder, ObjectPath) and isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise SealError(f"{folder}: cannot read the checkpoint: {files.reason(error)}") from None  # a store out of reach has it yet
        return None
    return manifest if whole and isinstance(manifest.get("metadata"), dict) else None


def load_adapters(folder: str | os.PathLike[str] | ObjectPath) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tree (numpy arrays) and the metadata that `save_adapters` wrote at `folder`. Raises `SealError` if they are not there whole."""
    folder = places.place(folder)
    if (manifest := _manifest(folder)) is None:
        raise SealError(f"{folder}: no finished checkpoint here; continue the run to have it computed")
    try:
        with _here(folder / manifest.get("data", ""), manifest["files"]) as data:
            for name, (_, digest) in manifest["files"].items():
                with open(data / name, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                        raise SealError(f"{folder}: damaged checkpoint ({name} has changed); delete this folder and continue the run")
            # Saved as numpy arrays, they are restored as such: no device is asked for, and any machine can read any other's.
            with _quiet(), _checkpointer() as checkpointer:
                return checkpointer.restore(data), manifest["metadata"]
    except (OSError, ValueError, RuntimeError) as error:
        raise SealError(f"{folder}: cannot read the checkpoint: {_reason(error)}") from None


@contextlib.contextmanager
def _here(data: Place, names: Iterable[str]) -> Iterator[pathlib.Path]:
    """The files, in a folder of this machine."""
    if isinstance(data, pathlib.Path):
        yield pathlib.Path(os.path.abspath(data))
        return
    with places.scratch() as folder:
        for name in names:
            places.download(data / name, folder / name)
        yield folder
