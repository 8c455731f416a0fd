"""A sweep, from its file to its table: trials of Ray Tune or lanes of one program, and what came of them, in one folder.

    config.yaml       the config of all trials, as far as it is the same
    records/*.json    what became of each trial, by the digest of its settings (`seal_jax.sweep.table`)
    trials/*/         the run folder of each trial, with its log beside it
    lanes/            the run folder of the lanes
    sweep.json        the table
    sweep.svg         the same as a plot

The same command goes on with it: what is finished is read. The space, the search and how trials are run may change from one call to the
next; the config of all trials may not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Iterator
from typing import Any

from seal_jax import config as config_lib
from seal_jax import grade, tasks
from seal_jax.errors import SealError
from seal_jax.parallel import processes
from seal_jax.runs import files
from seal_jax.runs.lock import LOCK
from seal_jax.runs.places import ObjectPath, place
from seal_jax.runs.store import CONFIG, DATA, FREE_KEYS, Damaged, Missing, compare, read_unit
from seal_jax.sweep import plot
from seal_jax.sweep import space as space_lib
from seal_jax.sweep import table as table_lib
from seal_jax.sweep.config import Sweep
from seal_jax.sweep.table import Record

TABLE, PLOT = "sweep.json", "sweep.svg"


def run(sweep: Sweep) -> dict[str, Any]:
    """Runs what is missing of the sweep; returns its table. Goes on with a folder of the same config.

    Raises `SealError` for a sweep that cannot be, before anything of it is run. A trial that fails is a row of the table.
    """
    refuse_settings_that_edits_choose(sweep)
    if sweep.config.search == "lanes":
        return _lanes(sweep)
    if isinstance(sweep.folder, ObjectPath):
        raise SealError(f"run_dir={sweep.folder}: only a sweep of lanes can be in a bucket (search=lanes); give a folder")
    try:
        from seal_jax.sweep import trials

        if sweep.config.search == "optuna":
            import seal_jax.sweep.optuna_search  # noqa: F401 (found missing here, before anything is made)
    except ImportError as error:
        raise SealError(f'search={sweep.config.search} needs Ray Tune ({error.name} is missing): pip install "seal_jax[ray]"') from None
    if (os.environ.get(processes.COUNT) or "1") != "1":
        raise SealError(f"{processes.COUNT}={os.environ[processes.COUNT]}: Ray starts the trials' processes itself; start the sweep once")
    _check_grader(sweep)
    with _folder(sweep):
        records = read_records(sweep)

        def keep(record: Record) -> None:
            records[record["trial"]] = record
            files.write_atomic(sweep.folder / "records" / f"{record['trial']}.json", files.dump(record))
            if record["status"] != "running":
                write_table(sweep, _build(sweep, records))

        trials.run(sweep, list(records.values()), keep)
        table = _build(sweep, records)
        table["notes"] += of_other_data(table)
        write_table(sweep, table, True)
    return table


def _lanes(sweep: Sweep) -> dict[str, Any]:
    from seal_jax.sweep import lanes

    records, notes = lanes.run(sweep)
    table = table_lib.build(records, notes, "results")
    if speaks(sweep):
        write_table(sweep, table, True)
    return table


def speaks(sweep: Sweep) -> bool:
    """Whether this process writes and prints. Trials have processes of their own, and this one must not start their accelerator to ask."""
    return sweep.config.search != "lanes" or processes.first()


def _build(sweep: Sweep, records: dict[str, Record]) -> dict[str, Any]:
    """The table of the sweep as it now is: a folder may hold trials of another space as well."""
    names = list(records) if sweep.config.search == "optuna" else [space_lib.digest(settings) for settings in sweep.settings()]
    return table_lib.build([records[name] for name in names if name in records and sweep.has(records[name]["settings"])])


def of_other_data(table: dict[str, Any]) -> list[str]:
    """A note for below the table if the files that trials read have changed from one to the next; where a config key says so, it shows."""
    found: dict[str, list[str]] = {}
    for row in table["rows"]:
        if any(key.startswith(("task.", "model.", "rest_em.retention.")) for key in row["settings"]):
            return []
        with contextlib.suppress(Missing, Damaged):
            found.setdefault(str(read_unit(place(row["run"]) / DATA)), []).append(row["trial"])
    others = [name for names in sorted(found.values(), key=len, reverse=True)[1:] for name in names]
    return [f"NOT COMPARABLE: the data files were others for {', '.join(others)} than for most trials"] if others else []


def failures(table: dict[str, Any]) -> int:
    """How many trials of the table failed."""
    return sum(row["status"] == "failed" for row in table["rows"])


def write_table(sweep: Sweep, table: dict[str, Any], drawn: bool = False) -> None:
    """Writes the table, and the plot as well if it is to be `drawn`."""
    files.write_atomic(sweep.folder / TABLE, files.dump(table))
    if drawn:
        files.write_atomic(sweep.folder / PLOT, plot.draw(sweep.config.name, table["rows"], sweep.space))


def read_records(sweep: Sweep) -> dict[str, Record]:
    """The records in the sweep's folder; damaged ones are left out, and their trials go on from their run folders.

    Raises `SealError` if they are about trials that did something else, or had another config: of those of the sweep's space the keys that
    they do not sweep are looked at, which a sweep of another space in the same folder may have had otherwise.
    """
    found = {}
    for path in sorted((sweep.folder / "records").glob("[!.]*.json")):
        with contextlib.suppress(Damaged):
            record = read_unit(path)
            if record["does"] != sweep.run:
                raise SealError(f"{sweep.folder}: holds trials that {record['does']}, run={sweep.run}; choose another run_dir")
            found[record["trial"]] = record
            run_dir = sweep.folder / "trials" / record["trial"]
            if sweep.has(record["settings"]) and (run_dir / CONFIG).is_file():
                compare(config_lib.load(run_dir / CONFIG), sweep.trial(record["settings"], str(run_dir)), run_dir, FREE_KEYS)
    return found


@contextlib.contextmanager
def _folder(sweep: Sweep) -> Iterator[None]:
    """Makes the sweep's folder, or opens it to go on with the same config, and locks it.

    Raises `SealError` if it holds a sweep of another config, or another process works on it. Lanes have a run folder, which does all this.
    """
    base = dataclasses.replace(sweep.base, run_dir=str(sweep.folder), name=sweep.config.name)
    with files.faults(sweep.folder):
        sweep.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(sweep.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SealError(f"{sweep.folder}: another process runs this sweep; wait for its end or stop it, then try again") from None
        except OSError:
            pass  # a file system without locks
        if (path := sweep.folder / CONFIG).is_file():
            swept = tuple(sweep.space)  # whatever the config has there, no trial does
            compare(config_lib.load(path), base, sweep.folder, (*FREE_KEYS, *swept, *(f"{key}.*" for key in swept)))
        files.write_atomic(path, config_lib.to_yaml(base).encode())
        yield
    finally:
        os.close(lock)


def refuse_settings_that_edits_choose(sweep: Sweep) -> None:
    """Raises `SealError` for keys of the space that self-edits of the task choose by themselves: all trials would be the same."""
    task = tasks.build(sweep.base.task, _NoGrader())
    ask = getattr(task, "chosen", None)
    if found := [key for name in (() if ask is None else ask()) if (key := f"fit.{name}") in sweep.space]:
        raise SealError(
            f"{sweep.where}: space.{found[0]}: self-edits of the task {sweep.base.task.name!r} choose it themselves, as it is configured, "
            "and keep what they chose in every trial; leave it out"
        )


def _check_grader(sweep: Sweep) -> None:
    """Raises `SealError` if a server is to grade, the same for all trials, and cannot: each trial would only find that for itself.

    A judging model is looked at by the trials: that takes JAX, which is not to start in this process.
    """
    config = sweep.base.grade
    if config.name == "endpoint" and not any(key.startswith("grade.") for key in sweep.space):
        task = tasks.build(sweep.base.task, grade.build(config))
        if (asked := getattr(task, "grader", None)) is not None:
            asked.check()


class _NoGrader:
    """Stands in where nothing is graded."""

    name = "none"

    def grade(self, items: Any) -> list[bool | None]:
        raise NotImplementedError
