"""The lock of a run folder: one process at a time works on it."""

from __future__ import annotations

import errno
import fcntl
import os
import pathlib
import socket
import time

from seal_jax.errors import SealError
from seal_jax.runs import files, lease, places
from seal_jax.runs.lease import Lease
from seal_jax.runs.places import ObjectPath, Place

LOCK = "lock"  # the file, or object


class FolderLock:
    """A lock of the kernel, which unlocks the folder when the process ends, however it ends. Raises `SealError` if another has it."""

    lost = ""  # never: see `Lease`

    def __init__(self, folder: pathlib.Path):
        self.works = True  # False: the file system knows no locks
        with files.faults(folder / LOCK):
            self._file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            for tries in range(10, -1, -1):  # half a second: `in_use` takes the lock for a moment, and a killed process is slow to die
                try:
                    fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not tries:
                        raise
                    time.sleep(0.05)
        except BlockingIOError:
            owner = os.pread(self._file, 200, 0).decode(errors="replace").strip()
            self.close()
            raise SealError(
                f"{folder}: in use by another process{f' ({owner})' if owner else ''}; wait for its end or stop it, then try again"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                self.close()
                raise SealError(f"{folder / LOCK}: cannot lock: {error.strerror}") from None
            self.works = False
            return
        with files.faults(folder / LOCK):
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def check(self) -> None:
        """Nothing: it cannot be lost."""

    def close(self) -> None:
        os.close(self._file)


def acquire(folder: Place) -> FolderLock | Lease:
    """The lock of the run in `folder`, until `close`. Raises `SealError` if another process has it, or it cannot be written."""
    if not isinstance(folder, ObjectPath):
        return FolderLock(folder)
    try:
        return Lease(folder / LOCK)
    except lease.Held as error:
        raise SealError(
            f"{folder}: in use by another process ({error}); wait for its end or stop it, then try again "
            f"(if it was killed: {error.left:.0f} s from now)"
        ) from None


def in_use(folder: str | os.PathLike[str] | ObjectPath) -> bool:
    """Whether some process, this one included, works on the run in `folder`."""
    path = places.place(folder) / LOCK
    if isinstance(path, ObjectPath):
        return lease.in_use(path)
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
