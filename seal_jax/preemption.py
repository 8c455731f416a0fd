"""Notices to end: SIGTERM, which clouds and schedulers send before they take a machine away, and ends of the run's other processes.

The main thread is told by an exception, so that it ends as after Ctrl-C; where it trains a model that can be saved, it is left to come to
the end of a step. It may not answer: Python runs no handler while C code works or waits, for a device or another process, or, in some
versions, for XLA's compiler. So a thread of ours, which the kernel's signals reach through a pipe, ends the process if the main thread has
not ended in time. Results are safe at any moment (see `seal_jax.runs.store`), so that this costs no more than the work in hand.
"""

from __future__ import annotations

import _thread
import contextlib
import functools
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from seal_jax.parallel import peers, processes
from seal_jax.parallel.peers import Notice, Peers

LIMIT = 20.0  # seconds from the notice to the end of a process whose main thread does not answer
WAITING = 5.0  # the same where another process has ended: the main thread most likely waits for it, in vain
SAVING = 600.0  # the same once it has begun to save; whoever takes the machine away may be faster
LOOK = 0.5  # seconds between looks at the clock and the other processes
TOGETHER = 1.0  # seconds in which a second SIGTERM is the first one once more: `timeout` and some schedulers send it to the group as well
GOES_ON = "nothing finished is lost, the same command goes on"


class Preempted(BaseException):
    """The run was told to end. No `Exception`: nothing that deals with errors should hold it up."""


class _Watch:
    """The thread that sees signals and notices, and what it shares with the main thread."""

    def __init__(self) -> None:
        self.notice: Notice | None = None
        self.peers: Peers | None = None
        self.log: Callable[..., None] | None = None  # of the run's store, while one is open
        self.stepping = False  # the main thread trains something that `due` may stop
        self.saving = False  # `due` has stopped it
        self.answered = False  # it has come to its end, and tells how
        self._lock = threading.Lock()
        self._steps, self._stop_at = 0, None
        self._since: float | None = None  # when the notice came
        self._raised = False
        self._signals = self._echoes = 0
        self._first: float | None = None  # when the first signal came
        self._read, self._write = socket.socketpair()
        for end in (self._read, self._write):
            end.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="seal_jax watch", daemon=True)
        self._handler, self._wakeup = signal.signal(signal.SIGTERM, self._told), signal.set_wakeup_fd(self._write.fileno())
        _children_are_not_watched()
        self._closed = False
        self._thread.start()

    def close(self) -> None:
        signal.set_wakeup_fd(self._wakeup)
        signal.signal(signal.SIGTERM, self._handler)
        self._closed = True
        with contextlib.suppress(OSError):
            self._write.send(b"\0")
        self._thread.join(1.0)
        self._read.close()
        self._write.close()

    # --- The main thread --------------------------------------------------------------------------------------------

    def _told(self, number: int, frame: Any) -> None:
        """The handler of SIGTERM."""
        if self.notice is None:
            self.notice = _of_signal(number)
        if not (self._raised or (self.stepping and self.notice.saves)):
            self._raised = True  # what cleans up after the exception is not interrupted by another
            raise Preempted(self.notice.text)

    def step(self) -> bool:
        with self._lock:  # held while the processes agree on a step
            self._steps += 1
            self.saving = self._stop_at is not None and self._steps >= self._stop_at
            return self.saving

    # --- The thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closed:
            if select.select([self._read], [], [], LOOK)[0]:
                for number in self._read.recv(64):
                    self._signalled(number)
            if self.notice is None and self.peers is not None and (found := self.peers.notice()) is not None:
                self.notice = found
                self._echoes += 1
                _thread.interrupt_main(signal.SIGTERM)
            if self.notice is not None:
                self._ending(self.notice)

    def _signalled(self, number: int) -> None:
        if number == signal.SIGTERM and self._echoes:
            self._echoes -= 1
        elif number == signal.SIGTERM and self._first is not None and time.monotonic() - self._first < TOGETHER:
            return
        elif number in (signal.SIGTERM, signal.SIGINT):
            self._first = self._first or time.monotonic()
            self._signals += 1
            if self._signals > 1:
                _say(f"seal-jax: told twice, ended at once; {GOES_ON}")
                os._exit(128 + number)
            self.notice = self.notice or _of_signal(number)

    def _ending(self, notice: Notice) -> None:
        now = time.monotonic()
        if self._since is None:
            self._since = now
            # In a thread of its own: the next signal must be seen.
            threading.Thread(target=self._tell, args=(notice,), name="seal_jax notice", daemon=True).start()
        limit = SAVING if self.saving else LIMIT if self._signals or self.stepping else WAITING
        if now - self._since > limit and not self.answered:
            self.end(notice, f"the main thread did not answer within {now - self._since:.0f} s")

    def _tell(self, notice: Notice) -> None:
        """Tells the other processes, and agrees with them on a step to stop after."""
        with self._lock:
            if self.peers is None:
                self._stop_at = self._steps + 1
                return
            self.peers.post(notice)
            if not notice.saves:
                return
            # Those that are behind catch up with the one that is ahead: none can pass a step meanwhile.
            found = self.peers.steps(self._steps + 1 if self.stepping else 0, LIMIT / 2)
            if found and min(found) > 0:
                self._stop_at = max(found)
            elif self.stepping:
                self.end(notice, "not all processes were training, nothing was saved")

    def end(self, notice: Notice, why: str) -> None:
        """Ends the process, whatever the main thread does."""
        if self.log is not None:
            kept = threading.Thread(target=self._log, args=(f"Preempted: {notice.text}; {why}",), daemon=True)
            kept.start()
            kept.join(3.0)  # a file system that hangs should not keep us
        _say(f"seal-jax: {notice.text}; {why}; {GOES_ON}")
        if self.peers is not None:
            self.peers.leave(notice)
        os._exit(notice.code)

    def _log(self, text: str) -> None:
        with contextlib.suppress(Exception):
            self.log("stopped", error=text)


_watch: _Watch | None = None


def _of_signal(number: int) -> Notice:
    told = number == signal.SIGTERM
    return Notice(128 + number, "told to end (SIGTERM)" if told else "interrupted", told)


def _say(line: str) -> None:
    os.write(2, f"{line}\n".encode())  # past Python's buffers, which the main thread may hold


@functools.cache
def _children_are_not_watched() -> None:
    """A forked child inherits the pipe: a signal that it gets would count as ours."""

    def reset() -> None:
        if _watch is not None:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    os.register_at_fork(after_in_child=reset)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """SIGTERM raises `Preempted` in the block, or ends the process; see above. Only a process's main thread can be watched."""
    global _watch
    if threading.current_thread() is not threading.main_thread() or _watch is not None:
        yield
        return
    _watch = _Watch()
    try:
        yield
    finally:
        _watch.close()
        _watch = None


def watch_peers() -> None:
    """From now on, the run's other processes are watched as well, and told how this one ends."""
    if _watch is not None:
        _watch.peers = peers.connect()


def notice(wait: float = 0.0) -> Notice | None:
    """Why the run is to end, if it is; asked again for so many seconds, while it is not."""
    end = time.monotonic() + wait
    while _watch is not None and _watch.notice is None and time.monotonic() < end:
        time.sleep(0.05)
    return None if _watch is None else _watch.notice


def alone() -> bool:
    """Whether there is no other process to tell."""
    return _watch is None or _watch.peers is None


def leave(code: int, text: str | None) -> None:
    """The end of a command, code 0 for a good one, and a line about it for standard error.

    In a run of several processes the others are told of a bad one, and the process ends here: at a usual exit JAX waits for the others,
    which wait for this one. So it does after SIGTERM, because a usual exit may wait for XLA.
    """
    if _watch is not None:
        _watch.answered = True
    if text is not None:
        print(text, file=sys.stderr, flush=True)
    if _watch is None or (_watch.peers is None and (_watch.notice is None or not _watch.notice.saves)):
        return
    if code == 0:
        if _watch.peers is not None:
            _watch.peers.done()
        return
    sys.stdout.flush()
    if _watch.peers is not None:
        _watch.peers.leave(_watch.notice or Notice(code, (text or "ended with an error").strip().removeprefix("seal-jax: ")))
    os._exit(code)


@contextlib.contextmanager
def logged(log: Callable[..., None]) -> Iterator[None]:
    """While the block runs, `log("stopped", error=...)` is called before the process is ended without an exception."""
    if _watch is not None:
        _watch.log = log
    try:
        yield
    finally:
        if _watch is not None:
            _watch.log = None


@contextlib.contextmanager
def at_steps() -> Iterator[None]:
    """In the block, which calls `due` after every step, a notice does not interrupt: it makes `due` say so. Raises `Preempted` at the
    block's end, if one came and was not seen."""
    watch = _watch
    if watch is None:
        yield
        return
    watch.stepping = True
    try:
        yield
    finally:
        watch.stepping = False
    if watch.notice is not None:
        raise Preempted(watch.notice.text)


def due() -> bool:
    """Whether to save and stop after this step. In a run of several processes all call it after the same steps, and all get the same."""
    return _watch is not None and _watch.step()


def stop_if_due() -> None:
    """Raises `Preempted` if `due` has said so. To be called by all processes of the run, after the first has saved."""
    if _watch is not None and _watch.notice is not None and _watch.saving:
        if _watch.peers is not None:
            processes.share(None)  # the others stay until it is written: JAX ends a run whose processes are missing
        raise Preempted(_watch.notice.text)
