"""What the processes of a run tell each other while they work: that they are there, and that one of them ends.

A computation over several processes waits for all of them, for ever. So each has a thread that writes a number, which it raises, into the
small table of texts that JAX's coordination service (in the first process) keeps, and reads those of the others.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from typing import Any, NamedTuple

from seal_jax.errors import SealError

TIMEOUT = "SEAL_JAX_PEER_TIMEOUT"  # the environment variable with the seconds of silence after which a process is taken for lost
DEFAULT_TIMEOUT = 100.0
LEAVING = 5.0  # seconds that the first process, which has the table, waits for the others to have read why it ends


class Notice(NamedTuple):
    """Why a run ends, and the exit code of its processes. `saves`: the work in hand is to be saved first, where it can be."""

    code: int
    text: str
    saves: bool = False


def timeout() -> float:
    """The seconds of silence that the environment allows. Raises `SealError` if that is no number above 0."""
    text = os.environ.get(TIMEOUT) or str(DEFAULT_TIMEOUT)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < 1e7:
        raise SealError(f"{TIMEOUT}={text!r}: expected a number of seconds above 0")
    return seconds


class Peers:
    """The other processes, as process `number` of `count` sees them through `client`, JAX's client of the coordination service."""

    def __init__(self, client: Any, number: int, count: int, seconds: float):
        self.number, self.count, self.seconds = number, count, seconds
        self._client, self._notice, self._closed = client, None, threading.Event()
        now = time.monotonic()
        self._seen = {i: ("", now) for i in range(count) if i != number}  # the last sign of each, and when it was new
        self._read = now  # when the table was last read
        self._thread = threading.Thread(target=self._beats, name="seal_jax peers", daemon=True)
        self._thread.start()

    def notice(self) -> Notice | None:
        """Why the run should end, if another process has said so or is lost."""
        now = time.monotonic()
        if self._notice is None and now - self._read > self.seconds and not self._closed.is_set():
            return self._lost(0, now - self._read)
        for number, (sign, at) in self._seen.items():
            if self._notice is None and sign not in ("done", "gone") and now - at > self.seconds:
                return self._lost(number, now - at)
        return self._notice

    def _lost(self, number: int, silence: float) -> Notice:
        return Notice(2, f"process {number} of {self.count} has not been heard of for {silence:.0f} s ({TIMEOUT})")

    def post(self, notice: Notice) -> None:
        """Tells the others why the run ends; who was first counts."""
        with contextlib.suppress(Exception):  # said already, or nobody is there to be told
            self._client.key_value_set("seal_jax/notice", json.dumps(notice))

    def steps(self, own: int, seconds: float) -> list[int]:
        """What every process has as `own`, once all have said so; empty if one has not within so many seconds."""
        end = time.monotonic() + seconds
        self._set("steps", str(own))
        while time.monotonic() < end:
            found = self._all("steps")
            if len(found) == self.count:
                return [int(value) for value in found.values()]
            time.sleep(0.05)
        return []

    def done(self) -> None:
        """This process has come to its end; its silence from now on means nothing."""
        self._close("done")

    def leave(self, notice: Notice) -> None:
        """Before this process ends in the middle of the run: the others are told why."""
        telling = threading.Thread(target=self._leave, args=(notice,), name="seal_jax leave", daemon=True)
        telling.start()
        telling.join(2 * LEAVING)  # the first process may have stalled, and then nothing can be told

    def _leave(self, notice: Notice) -> None:
        self.post(notice)
        self._close("gone")
        end = time.monotonic() + LEAVING
        while self.number == 0 and time.monotonic() < end:  # JAX ends the others with many lines when the table is gone
            if all(self._signs().get(i) == "gone" for i in self._seen):
                break
            time.sleep(0.05)

    def _close(self, sign: str) -> None:
        self._closed.set()
        self._thread.join(1.0)  # its last sign would be taken for life
        self._set("signs", sign)

    def _beats(self) -> None:
        count = 0
        while not self._closed.wait(min(1.0, self.seconds / 10)):
            count += 1
            with contextlib.suppress(Exception):  # jaxlib's, of several kinds: what counts is how long nothing is heard
                self._set("signs", str(count), check=True)
                signs, now = self._signs(check=True), time.monotonic()
                for number, sign in signs.items():
                    if number in self._seen and sign != self._seen[number][0]:
                        self._seen[number] = (sign, now)
                found = dict(self._client.key_value_dir_get("seal_jax/")).get("seal_jax/notice")
                if found is not None and self._notice is None:
                    self._notice = Notice(*json.loads(found))
                self._read = now

    def _signs(self, check: bool = False) -> dict[int, str]:
        return self._all("signs", check)

    def _all(self, table: str, check: bool = False) -> dict[int, str]:
        found: dict[int, str] = {}
        with contextlib.nullcontext() if check else contextlib.suppress(Exception):
            for key, value in self._client.key_value_dir_get(f"seal_jax/{table}/"):
                found[int(key.rsplit("/", 1)[1])] = value
        return found

    def _set(self, table: str, value: str, check: bool = False) -> None:
        with contextlib.nullcontext() if check else contextlib.suppress(Exception):
            self._client.key_value_set(f"seal_jax/{table}/{self.number}", value, allow_overwrite=True)


def connect() -> Peers | None:
    """The other processes, once `processes.start` has joined them; None if there are none."""
    from jax._src import distributed  # the table has no public name; orbax reads it in the same way

    state = distributed.global_state
    if state.client is None or state.num_processes < 2:
        return None
    return Peers(state.client, state.process_id, state.num_processes, timeout())
