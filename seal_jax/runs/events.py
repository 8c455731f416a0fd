"""The event log of a run: append-only JSON lines, one event a line, each with its time.

Every event is one `write` to a file opened for appending, so a killed process can tear the last line at most. A torn line is closed with
a newline when the log is opened again, and is left out when the log is read.

An object store cannot append. There the log is kept in a file of this machine, and the store has a copy, made anew every few seconds and at
the end: a killed process loses what it told in the last of them, and nothing before.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import pathlib
import tempfile
import threading
from collections.abc import Callable
from typing import Any

from seal_jax.runs import files
from seal_jax.runs.places import ObjectPath, place

EVERY = 10.0  # seconds between copies to a store, while there is something new


class EventLog:
    """Appends events to the JSON lines file `path`. May be used by several threads; one process at a time.

    Raises `SealError` if the file cannot be opened or written (a full disk, say).
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        self._lock = threading.Lock()
        with files.faults(self.path):
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            size = os.fstat(self._file).st_size
            if size and os.pread(self._file, 1, size - 1) != b"\n":
                os.write(self._file, b"\n")

    def append(self, event: str, /, **fields: Any) -> None:
        """One line: `time` (ISO 8601, UTC, milliseconds), `event`, then `fields` (JSON data; numpy values are converted)."""
        assert not {"time", "event"} & fields.keys(), "taken by the log itself"
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = files.dump({"time": now, "event": event, **fields}, indent=None) + b"\n"
        with self._lock, files.faults(self.path):
            size = os.fstat(self._file).st_size
            try:
                files.write_all(self._file, line)
            except OSError:
                os.ftruncate(self._file, size)  # takes back a part of a line, so that a later event is not glued to it
                raise

    def close(self) -> None:
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1


class UploadedEventLog(EventLog):
    """An `EventLog` whose file is an object of a store.

    What cannot be copied is tried again; `close` raises `SealError` if it still cannot.
    `mine` says whether the run is still this process's: once it is not, nothing more is copied.
    """

    def __init__(self, path: ObjectPath, mine: Callable[[], bool] = lambda: True):
        self.target, self._mine = path, mine
        self._folder = tempfile.TemporaryDirectory(prefix="seal_jax-")
        local = pathlib.Path(self._folder.name) / path.name
        with files.faults(path), contextlib.suppress(FileNotFoundError):
            local.write_bytes(path.read_bytes())
        super().__init__(local)
        self._sent = local.stat().st_size
        self._sending = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._send_now_and_then, name="seal_jax events", daemon=True)
        self._thread.start()

    def _send_now_and_then(self) -> None:
        while not self._ended.wait(EVERY):
            with contextlib.suppress(OSError):
                self._send()

    def _send(self) -> None:
        with self._sending:
            data = self.path.read_bytes()
            if len(data) > self._sent and self._mine():
                self.target.write_bytes(data)
                self._sent = len(data)

    def append(self, event: str, /, **fields: Any) -> None:
        super().append(event, **fields)
        if event == "stopped":  # perhaps the last that this process does (`seal_jax.preemption`)
            with contextlib.suppress(OSError):  # `close` tells
                self._send()

    def close(self) -> None:
        super().close()
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        with self._folder, files.faults(self.target):
            self._send()


class WarningEvents(logging.Handler):
    """Writes what the package warns of into a run's log too, as an event "warning" with `message`.

    A warning of left-out items carries `extra={"skipped": [{"reason": ..., "count": ..., ...}]}` and becomes an event "skipped" for each.
    """

    def __init__(self, events: EventLog):
        super().__init__(logging.WARNING)
        self._events = events

    def emit(self, record: logging.LogRecord) -> None:
        if skipped := getattr(record, "skipped", None):
            for fields in skipped:
                self._events.append("skipped", **fields)
        else:
            self._events.append("warning", message=record.getMessage())


def read_events(path: str | os.PathLike[str] | ObjectPath) -> list[dict[str, Any]]:
    """The events in the file `path`, oldest first; torn lines are left out, and a missing file has none."""
    try:
        data = place(path).read_bytes()
    except FileNotFoundError:
        return []
    events = []
    for line in data.split(b"\n"):
        try:
            event = json.loads(line)
        except ValueError:  # JSONDecodeError and UnicodeDecodeError
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str) and isinstance(event.get("time"), str):
            events.append(event)
    return events
