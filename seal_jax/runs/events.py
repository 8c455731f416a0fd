"""The event log of a run: append-only JSON lines, one event a line, each with its time.

Every event is one `write` to a file opened for appending, so a killed process can tear the last line at most. A torn line is closed with
a newline when the log is opened again, and is left out when the log is read.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import pathlib
import threading
from typing import Any

from seal_jax.runs import files


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


def read_events(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The events in the file `path`, oldest first; torn lines are left out, and a missing file has none."""
    try:
        data = pathlib.Path(path).read_bytes()
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
