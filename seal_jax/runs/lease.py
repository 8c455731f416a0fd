"""The lock of a run in an object store, which has none: an object that says who works on the run, renewed while that process lives.

A lease that was not renewed for a while is free to be taken, and so is one of this machine whose process has ended. Limits:

- Two processes that find the same old lease and take it within a few seconds of each other may both believe that they have it, until the
  next renewal, at which the one whose lease was written over stops. One that finds none is safe from that where the store can create an
  object exclusively, as GCS and S3 can.
- The clocks of the machines must agree, up to a minute or so.
- A process that was stopped for minutes (a machine put to sleep) may have lost its lease. It finds out before it writes its next result.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from typing import Any

from seal_jax.errors import SealError
from seal_jax.runs import files
from seal_jax.runs.places import ObjectPath

RENEW = 30.0  # seconds between renewals
STALE = 180.0  # seconds without a renewal after which a lease may be taken
SETTLE = 2.0  # seconds after which one who has written over a lease looks whether it is still its own


class Held(Exception):
    """Another process has the lease: the message says which. `left`: seconds until it runs out, if it is not renewed."""

    def __init__(self, found: dict[str, Any] | None):
        super().__init__(_owner(found or {}))
        self.left = max(0.0, STALE - (time.time() - found["time"])) if found else STALE


class Lease:
    """The lease of `path`, renewed by a thread until `close`. Raises `Held` if another process has it, `SealError` if the store fails."""

    def __init__(self, path: ObjectPath):
        self.path = path
        self._own = {"token": secrets.token_hex(8), "process": os.getpid(), "host": socket.gethostname()}
        self._own |= {"machine": _machine(), "born": _born(os.getpid())}
        self._guard = threading.Lock()
        self._renewed = 0.0
        self.lost = ""  # who took it
        with files.faults(path):
            self._take()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew_now_and_then, name="seal_jax lease", daemon=True)
        self._thread.start()

    def _take(self) -> None:
        found = _read(self.path)
        if found is not None and not _free(found):
            raise Held(found)
        if found is None:
            try:
                self._write(exclusive=True)
                return
            except FileExistsError:
                raise Held(_read(self.path)) from None
            except OSError:  # a store that cannot tell; a fault is met again
                pass
        self._write()
        time.sleep(SETTLE)
        now = _read(self.path)
        if now is None or now.get("token") != self._own["token"]:
            raise Held(now)

    def _write(self, exclusive: bool = False) -> None:
        now = time.time()
        self.path.write_bytes(files.dump({**self._own, "time": now}), exclusive=exclusive)
        self._renewed = now

    def _renew(self) -> None:
        with self._guard:
            found = _read(self.path)
            if found is not None and found.get("token") != self._own["token"]:
                self.lost = _owner(found)
            if not self.lost:
                self._write()

    def _renew_now_and_then(self) -> None:
        while not self._ended.wait(RENEW):
            with contextlib.suppress(OSError):  # tried again; and before a result is written, by `check`
                self._renew()

    def check(self) -> None:
        """Raises `SealError` if another process has taken the lease meanwhile, or it cannot be renewed. To be called before writing."""
        if time.time() - self._renewed > STALE / 2:
            with files.faults(self.path):
                self._renew()
        if self.lost:
            raise SealError(f"{self.path.parent}: taken over by another process ({self.lost}), since this one was not heard of for long")

    def close(self) -> None:
        """Gives the lease back."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # it runs out by itself
            found = _read(self.path)
            if found is not None and found.get("token") == self._own["token"]:
                self.path.unlink(missing_ok=True)


def in_use(path: ObjectPath) -> bool:
    """Whether some process, this one included, has the lease."""
    try:
        found = _read(path)
    except OSError:
        return False
    return found is not None and not _free(found)


def _read(path: ObjectPath) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        found = None
    return found if isinstance(found, dict) and isinstance(found.get("time"), (int, float)) else {"time": 0.0}


def _free(found: dict[str, Any]) -> bool:
    if abs(time.time() - found["time"]) > STALE:
        return True
    return bool(found.get("machine")) and found["machine"] == _machine() and _born(found["process"]) != found["born"]


def _owner(found: dict[str, Any]) -> str:
    if "process" not in found:
        return "one that started at the same time"
    return f"process {found['process']} on {found['host']}, last seen {max(0.0, time.time() - found['time']):.0f} s ago"


def _machine() -> str:
    """What tells this machine since its last start, and this container's numbering of processes, from all others; "" if it is not known."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _born(process: int) -> str | None:
    """When the process was started, in the kernel's count; None if there is none of that number, or it is only waited for."""
    try:
        state, *fields = pathlib.Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else fields[18]
