"""The folder of a run: results by unit of work, so that a killed run goes on by computing what has no file yet.

    config.yaml       the resolved configuration
    versions.json     packages, platform and devices of the run's first process, or first worker
    data.json         digests of the contexts and held texts that were read
    events.jsonl      what happened when (`seal_jax.runs.events`)
    <unit>.json       the result of a unit, say rounds/1/e_step/000.json; there and whole, or not there
    policy/1/         the policy's adapter after round 1 (`seal_jax.runs.checkpoint`)
    memory/1/         what it was taught before round 1, if rewards count that (`seal_jax.rest_em.retention`)
    adapters/000/     what the lanes of a continual run learnt at step 0 (`seal_jax.experiments.continual`)
    states/, models/  models in continued pretraining, and trained ones (`seal_jax.experiments.pretraining`)

It may be in an object store (`seal_jax.runs.places`), with a lease in place of a lock and all else alike.

A run is a pure function of its configuration, and a unit is computed from that and from earlier units alone. So a run that was stopped
at any moment, by SIGKILL too, and went on has the files of one that was never stopped.

In a run of several processes the first one has the folder; the others learn from it what it holds, and write nothing.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import importlib.metadata
import itertools
import json
import logging
import os
import pathlib
import platform
import re
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType, TracebackType
from typing import Any

from seal_jax import __version__, cpu, preemption
from seal_jax import config as config_lib
from seal_jax.errors import SealError
from seal_jax.parallel import processes
from seal_jax.runs import files, places
from seal_jax.runs.events import EventLog, UploadedEventLog, WarningEvents
from seal_jax.runs.lease import Lease
from seal_jax.runs.lock import LOCK, FolderLock, acquire
from seal_jax.runs.places import ObjectPath, Place

CONFIG, VERSIONS, DATA, EVENTS = "config.yaml", "versions.json", "data.json", "events.jsonl"
CHECKPOINTS = ("policy/", "memory/", "adapters/", "states/", "models/")  # folders of `seal_jax.runs.checkpoint`, with orbax's own files
_OWN = (LOCK, VERSIONS, EVENTS, f".*{files.TEMPORARY}")  # what a run killed while its folder was made may have left

Result = dict[str, Any] | Callable[[], dict[str, Any]]  # of a unit, or what waits for it (`RunStore.each`)

# Keys that a run may be continued with other values of. They name things, or say how a remote grader is called, or trade memory for
# speed: by the rule that no result depends on its neighbours, slots or devices, the latter move results by rounding only.
FREE_KEYS = (
    *("name", "run_dir", "track.*"),
    *("grade.concurrency", "grade.retries", "grade.timeout", "grade.patience", "grade.cache"),
    *("model.remat", "mesh.*", "fit.slots", "fit.tokens_per_step", "sample.rows", "answer.rows"),
    "executor.*",
    *("m_step.microbatch", "m_step.row_length"),
    *("pretraining.sft.microbatch", "pretraining.sft.row_length", "pretraining.checkpoint_every"),
)


class RunStore:
    """The results in a run folder. Made directly it only reads; `create_or_open` gives one that computes and writes as well.

    As a context manager it logs "finished", or "stopped" with the error, at the end of the block, and unlocks the folder.
    """

    def __init__(self, folder: str | os.PathLike[str] | ObjectPath):
        self.folder = places.place(folder)
        self._shared = False  # whether all processes of the run read through the first
        self._events: EventLog | None = None  # None: reads only
        self._warnings: WarningEvents | None = None
        self._lock: FolderLock | Lease | None = None

    @classmethod
    def create_or_open(cls, folder: str | os.PathLike[str] | ObjectPath, config: config_lib.RunConfig) -> RunStore:
        """Makes the run folder, or opens it to go on with the same configuration, and locks it until `close` or the process's end.

        Raises `SealError` if the folder is another thing than a run, holds results of another configuration (the first key that
        differs is named; `FREE_KEYS` may), is in use by another process, or cannot be written.
        """
        self, problem = cls(folder), None
        if processes.first():
            try:
                self._open(config)
            except SealError as error:
                problem = str(error)
            except OSError as error:
                problem = f"{self.folder}: cannot be used: {files.reason(error)}"
        if problem := processes.share(problem):  # on all processes, or the others would wait for the first
            raise SealError(problem)
        self._shared = True
        return self

    def _open(self, config: config_lib.RunConfig) -> None:
        _is_run(self.folder)  # before the lock file is made: a folder that is no run stays as it is
        with files.faults(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock = acquire(self.folder)
        try:
            existed = _is_run(self.folder)
            # A run without results, stopped by a wrong path in its config say, may go on with whatever config is right.
            free = FREE_KEYS if self._names() else ("*",)
            changed = compare(config_lib.load(self.folder / CONFIG), config, self.folder, free) if existed else {}
            with files.faults(self.folder):
                for left in self.folder.rglob(f".*{files.TEMPORARY}"):
                    left.unlink(missing_ok=True)
            elsewhere = config.executor.name == "ray"  # by workers, who tell theirs
            try:
                read_unit(self.folder / VERSIONS)
            except (Missing, Damaged):
                files.write_atomic(self.folder / VERSIONS, files.dump({} if elsewhere else versions()))
            if changed or not existed:  # last: with it the folder is a run
                files.write_atomic(self.folder / CONFIG, config_lib.to_yaml(config).encode())
            path = self.folder / EVENTS
            self._events = UploadedEventLog(path, lambda: not lock.lost) if isinstance(path, ObjectPath) else EventLog(path)
            self._warnings = WarningEvents(self._events)
            logging.getLogger("seal_jax").addHandler(self._warnings)
            self.log("opened" if existed else "created", seal_jax=__version__, pid=os.getpid(), host=socket.gethostname())
            if isinstance(lock, FolderLock) and not lock.works:
                self.log("unlocked", reason="the file system has no locks; see that one process works on this run at a time")
            if changed:
                self.log("config_changed", changes=changed)
            if not elsewhere:
                self.ran_on(versions())
        except BaseException:
            self.close()
            raise

    def ran_on(self, now: dict[str, Any]) -> None:
        """Notes the `versions` of the process that computes, or logs what has changed in them since the run began."""
        before = read_unit(self.folder / VERSIONS)
        if not before:
            files.write_atomic(self.folder / VERSIONS, files.dump(now))
        # What `before` does not tell of, an earlier version of this program did not write down.
        elif differs := {key: [value, now.get(key)] for key, value in before.items() if value != now.get(key)}:
            self.log("versions_changed", changes=differs)

    def same_data(self, now: Mapping[str, Sequence[Sequence[str]]]) -> None:
        """Notes what data is read: by the config key that names it, [id, digest] of each item.

        Raises `SealError` if results here are of other data.
        """
        if problem := self.other_data(now):
            raise SealError(problem)

    def other_data(self, now: Mapping[str, Sequence[Sequence[str]]]) -> str | None:
        """`same_data`, with what is wrong returned."""
        return self._ask(lambda: self._other_data(now))

    def _other_data(self, now: Mapping[str, Sequence[Sequence[str]]]) -> str | None:
        try:
            before = read_unit(self.folder / DATA)
        except (Missing, Damaged):
            before = {}
        for source, items in now.items() if self._names() else ():
            pairs = itertools.zip_longest(before.get(source, items), items)
            if (other := next(((a or b)[0] for a, b in pairs if a is None or b is None or list(a) != list(b)), None)) is not None:
                return (
                    f"{self.folder}: holds results of other data than {source} now has, at {other!r}; "
                    "bring the data back, or choose another run_dir"
                )
        if (found := {**before, **{source: [list(item) for item in items] for source, items in now.items()}}) != before:
            self._check()
            files.write_atomic(self.folder / DATA, files.dump(found))
        return None

    def log(self, event: str, /, **fields: Any) -> None:
        """Appends to the event log. The report counts events "skipped", with `reason`, and `count` if more than one item was."""
        if self._shared and not processes.first():
            return
        assert self._events is not None, "writing needs a store from create_or_open()"
        self._events.append(event, **fields)

    def once(self, name: str, compute: Callable[[], dict[str, Any]], beside: str | None = None) -> dict[str, Any]:
        """The result of the unit `name` ("rounds/1/e_step/000"): read if there, else computed and written.

        The result is JSON data and comes back as read from the file in both cases, so that going on equals not stopping; NaN comes back
        as None. A damaged file is set aside as `<name>.json.damaged` and the unit computed anew. `beside` names the checkpoint that
        `compute` saves as well, if it does: a unit is there with its checkpoint only. Raises `SealError` if it cannot be written; what
        `compute` raises passes through.
        """
        if (found := self.find(name, beside)) is not None:
            self.log("unit_reused", unit=name)
            return found
        start = time.monotonic()
        result = compute()
        return self.keep(name, result, time.monotonic() - start)

    def each(self, names: Sequence[str], compute: Callable[[str], Result]) -> list[dict[str, Any]]:
        """The results of the units `names`, which do not need each other: `once` for all, in whatever order suits.

        `compute` may give, instead of a result, a function that waits for it: that is called when the next unit has been computed.
        """
        found: dict[str, dict[str, Any]] = {}
        late: tuple[str, Callable[[], dict[str, Any]], float] | None = None
        for name in names:
            if (there := self.find(name)) is not None:
                self.log("unit_reused", unit=name)
                found[name] = there
                continue
            start = time.monotonic()
            try:
                result = compute(name)
            except Exception:
                if late is not None and preemption.alone():  # other processes, which it might wait for, wait elsewhere
                    self._waited(*late)
                raise
            seconds = time.monotonic() - start
            if late is not None:
                found[late[0]] = self._waited(*late)
            late = (name, result, seconds) if callable(result) else None
            if late is None:
                found[name] = self.keep(name, result, seconds)
        if late is not None:
            found[late[0]] = self._waited(*late)
        return [found[name] for name in names]

    def _waited(self, name: str, result: Callable[[], dict[str, Any]], seconds: float) -> dict[str, Any]:
        start = time.monotonic()
        return self.keep(name, result(), seconds + time.monotonic() - start)

    def find(self, name: str, beside: str | None = None) -> dict[str, Any] | None:
        """The result of the unit, if it is there whole, with its checkpoint."""
        if beside is not None and not self.saved(beside):
            return None
        return self._ask(lambda: self._find(self._path(name)))

    def keep(self, name: str, result: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Writes the result of the unit, in place of an earlier one, and returns it as it is read back. `seconds`: what it took."""
        if not isinstance(result, dict):
            raise TypeError(f"unit {name}: expected a dict, computed {type(result).__name__}")
        data = files.dump(result)
        if not self._shared or processes.first():
            self._check()
            files.write_atomic(self._path(name), data)
        self.log("unit_done", unit=name, seconds=round(seconds, 3), bytes=len(data))
        return json.loads(data)

    def _check(self) -> None:
        """Raises `SealError` if the run is no more this process's to write. A lock cannot be lost, a lease can."""
        if self._lock is not None:
            self._lock.check()

    def _find(self, path: Place) -> dict[str, Any] | None:
        try:
            return read_unit(path)
        except Missing:
            return None
        except Damaged as error:
            aside = path.with_name(path.name + ".damaged")
            with files.faults(path):
                path.replace(aside)
            self.log("unit_damaged", unit=self._name(path), moved_to=aside.name, problem=str(error))
            return None

    def _ask(self, question: Callable[[], Any]) -> Any:
        """The answer (JSON data) of the process that has the folder."""
        if not self._shared:
            return question()
        return processes.share(question() if processes.first() else None)

    def read(self, name: str) -> dict[str, Any]:
        """The result of the unit `name`. Raises `SealError` if there is none, or it is damaged."""
        return self._ask(lambda: read_unit(self._path(name)))

    def has(self, name: str) -> bool:
        return self._ask(lambda: self._path(name).is_file())

    def names(self, prefix: str = "") -> list[str]:
        """The units there are under `prefix` ("rounds/1/e_step/"), numbers in names in order of size."""
        return self._ask(lambda: self._names(prefix))

    def _names(self, prefix: str = "") -> list[str]:
        root = self.folder / prefix.rpartition("/")[0]
        if isinstance(root, ObjectPath):
            paths = list(root.rglob("*.json"))
        else:  # `rglob` of a folder fails where checkpoints come and go meanwhile
            paths = [pathlib.Path(parent, name) for parent, _, names in os.walk(root) for name in names if name.endswith(".json")]
        found = (self._name(path) for path in paths if path.name not in (VERSIONS, DATA) and not path.name.startswith("."))
        units = [name for name in found if name.startswith(prefix) and not name.startswith(CHECKPOINTS)]
        return sorted(units, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])

    def _path(self, name: str) -> Place:
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", name, re.ASCII) or f"{name}.json" in (VERSIONS, DATA):
            raise ValueError(f"{name!r}: not the name of a unit")
        return self.folder / f"{name}.json"

    def _name(self, path: Place) -> str:
        return path.relative_to(self.folder).as_posix().removesuffix(".json")

    def save(self, folder: str, tree: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        """Writes `tree` (nested dicts of arrays) and `metadata` (JSON data) as the checkpoint `folder` ("policy/1") of the run.

        The first process does. Raises `SealError` if it cannot be written.
        """
        if not self._shared or processes.first():
            self._check()
            _checkpoint().save_adapters(self.folder / folder, tree, metadata)

    def saved(self, folder: str) -> bool:
        """Whether the checkpoint `folder` is there whole."""
        return self._ask(lambda: self._saved(folder))

    def _saved(self, folder: str) -> bool:
        if self._events is not None:  # this process works on the run
            _checkpoint().recover(self.folder / folder)
        return _checkpoint().is_complete(self.folder / folder)

    def load(self, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """The tree (numpy arrays) and the metadata of the checkpoint `folder`, on every process. Raises `SealError` without one."""
        if not self._shared:
            return _checkpoint().load_adapters(self.folder / folder)
        tree, metadata = _checkpoint().load_adapters(self.folder / folder) if processes.first() else (None, None)
        return processes.share_tree(tree), processes.share(metadata)

    def report(self) -> None:
        """Writes the report of what there is: the first process does."""
        from seal_jax.runs.report import write_report  # which reads stores

        if not self._shared or processes.first():
            write_report(self.folder)

    def close(self) -> None:
        """Closes the log and unlocks the folder."""
        if self._warnings is not None:
            logging.getLogger("seal_jax").removeHandler(self._warnings)
            self._warnings = None
        events, self._events = self._events, None
        try:
            if events is not None:
                events.close()
        finally:
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    def __enter__(self) -> RunStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if self._events is None:
                pass  # closed within the block
            elif kind is None:
                self.log("finished")
            else:
                text = " ".join(str(error).split())
                reason = text if kind is SealError else f"{kind.__name__}: {text}" if text else kind.__name__
                if processes.lost(error):  # the other process may have said why, which comes as a signal, or has come
                    try:
                        told = preemption.notice(wait=3.0)
                        reason = reason if told is None else f"Preempted: {told.text}"
                    except preemption.Preempted as told:
                        reason = f"Preempted: {told}"
                self.log("stopped", error=reason)
        except SealError:
            if kind is None:
                raise  # otherwise the first error is the one to read
        finally:
            with contextlib.suppress(*(() if kind is None else (SealError,))):
                self.close()


class Missing(SealError):
    """A unit without a file."""


class Damaged(SealError):
    """A unit whose file is not what was written."""


def read_unit(path: Place) -> dict[str, Any]:
    """The JSON object in the file `path`. Raises `Missing`, `Damaged`, or `SealError` if it cannot be read."""
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise Missing(f"{path}: no such file; the run has not come so far, or this is not its folder") from None
    except OSError as error:
        raise SealError(f"{path}: cannot read: {files.reason(error)}") from None
    except ValueError as error:
        raise Damaged(f"{path}: damaged, not JSON ({error}); continue the run to have it computed anew") from None
    if not isinstance(data, dict):
        raise Damaged(f"{path}: damaged, not a JSON object; continue the run to have it computed anew")
    return data


def _checkpoint() -> ModuleType:
    """The module of checkpoints: imported where it is used, since a command's first line must not wait for orbax."""
    from seal_jax.runs import checkpoint

    return checkpoint


def existing(folder: str | os.PathLike[str] | ObjectPath) -> RunStore:
    """The run in `folder`, to read. Raises `SealError` if there is none."""
    found = RunStore(folder)
    for name in (CONFIG, VERSIONS):  # a config alone may be anyone's
        try:
            there = (found.folder / name).is_file()
        except OSError as error:
            raise SealError(f"{found.folder / name}: cannot read: {files.reason(error)}") from None
        if not there:
            raise SealError(f"{found.folder}: not a run folder (no {name} in it); give the folder that `seal-jax train` made")
    return found


def _is_run(folder: Place) -> bool:
    """True: a run. False: a folder to make one in (not there, empty, or left by a run killed while it was made)."""
    try:
        names = [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return False
    except OSError as error:
        raise SealError(f"{folder}: cannot be a run folder: {files.reason(error)}; choose another run_dir") from None
    if CONFIG in names and VERSIONS in names:
        return True
    if foreign := sorted(name for name in names if not any(fnmatch.fnmatch(name, own) for own in _OWN)):
        raise SealError(f"{folder}: not empty and not a run (it holds {foreign[0]!r}); choose another run_dir or empty it")
    return False


def compare(old: config_lib.RunConfig, new: config_lib.RunConfig, folder: Place, free: Sequence[str]) -> dict[str, list[Any]]:
    """The keys of the patterns `free` that differ, as {key: [old, new]}. Raises `SealError` at the first other key that does."""
    before, after = _flatten(config_lib.to_dict(old)), _flatten(config_lib.to_dict(new))
    changed = {}
    for key in {**after, **before}:
        values = [before.get(key), after.get(key)]
        if values[0] == values[1]:
            continue
        if not any(fnmatch.fnmatch(key, pattern) for pattern in free):
            raise SealError(
                f"{folder}: holds a run with {key}={values[0]!r}, the config has {key}={values[1]!r}; "
                "continue with the run's own config, or choose another run_dir"
            )
        changed[key] = values
    return changed


def _flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in data.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


@functools.cache
def versions() -> dict[str, Any]:
    """What the results may depend on besides the configuration: packages, platform, devices, the commit of a checkout.

    "auto_dtype" is what `model.dtype: auto` means on these devices; "cpu" is the CPU's name where that computes.
    """
    import jax  # here, because it starts the accelerator

    from seal_jax.models.dtypes import resolve_dtype

    found: dict[str, Any] = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "optax", "transformers", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    devices = jax.devices()
    return {
        **found,
        "seal_jax": __version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "backend": devices[0].platform,
        "device": devices[0].device_kind,
        "devices": len(devices),
        **({"cpu": cpu.name()} if devices[0].platform == "cpu" else {}),
        "auto_dtype": str(resolve_dtype("auto")),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The git commit of the checkout that this package runs from, "-dirty" if files differ from it; None if there is no checkout."""
    root = pathlib.Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        out = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip() or None
