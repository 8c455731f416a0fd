"""How long steps show that they go on: a bar with the time left on a terminal, plain lines elsewhere, always on standard error."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Protocol

from tqdm import tqdm

from seal_jax.parallel import processes

SECONDS = 10.0  # between plain lines, over all steps of the process


class Progress(Protocol):
    """A step of so many units of work."""

    def update(self, n: int = 1) -> object:
        """`n` more units are done."""
        ...


class _Lines:
    """Progress as plain lines: where standard error is a file or a pipe, what a bar writes over itself is one line without end."""

    said = time.monotonic()  # when the last line was written, by whichever step

    def __init__(self, what: str, total: int, unit: str):
        self.what, self.total, self.unit = what, total, unit
        self.done, self.start = 0, time.monotonic()
        self.update(0)

    def update(self, n: int = 1) -> None:
        self.done += n
        now = time.monotonic()
        if now - _Lines.said >= SECONDS:
            _Lines.said = now
            meter = tqdm.format_meter(
                self.done, self.total, now - self.start, prefix=self.what, unit=self.unit, unit_scale=self.total > 9999,
                bar_format="{desc}: {n_fmt}/{total_fmt} {unit}, {elapsed} gone, {remaining} left",
            )  # fmt: skip
            print(meter, file=sys.stderr, flush=True)


class _Silent:
    def update(self, n: int = 1) -> None:
        pass


@contextlib.contextmanager
def bar(what: str, total: int, unit: str) -> Iterator[Progress]:
    """The progress of one step: `what` it does, in `total` units. In a run of several processes the first one tells."""
    if not processes.first():
        yield _Silent()
    elif sys.stderr.isatty():
        size = os.get_terminal_size(sys.stderr.fileno())  # of 0 by 0, where it does not say
        shape = {"ncols": min(size.columns or 80, 96), "nrows": size.lines or 24}
        with tqdm(total=total, desc=what, unit=unit, unit_scale=total > 9999, mininterval=0.2, **shape) as shown:
            yield shown
    else:
        yield _Lines(what, total, unit)
