"""The run folder as a worker sees it: through the ledger, which is somewhere else."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

import jax

from seal_jax.errors import SealError
from seal_jax.parallel import processes
from seal_jax.runs import health
from seal_jax.runs.events import WarningEvents
from seal_jax.runs.store import Result

WAIT = 0.5  # seconds between questions for a unit that another worker has


class Office(Protocol):
    """What a worker asks: a `Ledger` with the store behind it, by name of the method."""

    def __call__(self, method: str, *arguments: Any) -> Any: ...


class Lost(Exception):
    """Another worker has the unit now: this one was taken for lost. What it computed counts for nothing."""


class WorkerStore:
    """`runs.store.RunStore` for the worker `name`, all of whose processes call it alike; the first one asks.

    Results are equal to a run's of one process, since a unit is a function of the configuration and of earlier units.
    """

    def __init__(self, name: str, folder: str, ask: Office, pause: Callable[[float], None] = time.sleep):
        self.name, self.folder = name, folder
        self._ask, self._pause = ask, pause
        self._unit: str | None = None  # being computed
        self._told = contextlib.ExitStack()
        self._warnings = WarningEvents(self)  # type: ignore[arg-type]  # has append, as a log has

    def _asked(self, method: str, *arguments: Any) -> Any:
        """The ledger's answer (JSON data), on all processes of the worker."""
        return processes.share(self._ask(method, *arguments) if processes.first() else None)

    def once(self, name: str, compute: Callable[[], dict[str, Any]], beside: str | None = None) -> dict[str, Any]:
        """As `RunStore.once`; if another worker computes the unit, its result is waited for."""
        return self._all([name], lambda _: compute(), beside)[0]

    def each(self, names: Sequence[str], compute: Callable[[str], Result]) -> list[dict[str, Any]]:
        """As `RunStore.each`, of which this worker computes what no other has."""
        return self._all(names, compute, None)

    def _all(self, names: Sequence[str], compute: Callable[[str], Result], beside: str | None) -> list[dict[str, Any]]:
        late: tuple[str, Result, float] | None = None  # a unit whose result is still to be waited for
        while not (told := self._asked("claim", self.name, list(names), beside)).get("whole"):
            if "lost" in told:
                raise Lost(self.name)
            if "compute" not in told and late is None:
                self._pause(WAIT)
                continue
            before, late = late, None
            if "compute" in told:
                self._unit, start = told["compute"], time.monotonic()
                try:
                    result = compute(self._unit)
                except Exception:
                    if before is not None and jax.process_count() == 1:  # other processes, which it might wait for, wait elsewhere
                        self._hand_in(*before)
                    raise
                late = (self._unit, result, time.monotonic() - start)
                self._unit = None
            if before is not None:
                self._hand_in(*before)
            if late is not None and not callable(late[1]):
                self._hand_in(*late)
                late = None
        return [self.read(name) for name in names]

    def _hand_in(self, name: str, result: Result, seconds: float) -> None:
        """The result of a unit that this worker has claimed, when it is there. `seconds`: what it has taken so far."""
        start = time.monotonic()
        whole = result() if callable(result) else result
        if not self._asked("keep", self.name, name, whole if processes.first() else None, seconds + time.monotonic() - start):
            raise Lost(name)

    def keep(self, name: str, result: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Writes a unit in place of an earlier one: the worker that comes first does, all have the same."""
        self._asked("replace", name, result if processes.first() else None, seconds)
        return self.read(name)

    def same_data(self, now: Mapping[str, Sequence[Sequence[str]]]) -> None:
        """As `RunStore.same_data`: all workers read the same."""
        if problem := self._asked("other_data", now):
            raise SealError(problem)

    def read(self, name: str) -> dict[str, Any]:
        return self._asked("read", name)

    def has(self, name: str) -> bool:
        return self._asked("has", name)

    def names(self, prefix: str = "") -> list[str]:
        return self._asked("names", prefix)

    def save(self, folder: str, tree: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        """As `RunStore.save`, for the unit that is being computed."""
        if not processes.share(self._ask("save", self.name, self._unit, folder, dict(tree), dict(metadata)) if processes.first() else None):
            raise Lost(self._unit)

    def saved(self, folder: str) -> bool:
        return self._asked("saved", folder)

    def load(self, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """As `RunStore.load`."""
        tree, metadata = self._ask("load", folder) if processes.first() else (None, None)
        return processes.share_tree(tree), processes.share(metadata)

    def log(self, event: str, /, **fields: Any) -> None:
        if processes.first():
            self._ask("log", event, {"worker": self.name, **fields})

    append = log

    def report(self) -> None:
        if processes.first():
            self._ask("report")

    def __enter__(self) -> WorkerStore:
        logging.getLogger("seal_jax").addHandler(self._warnings)
        self._told.enter_context(health.told_to(self.log))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._told.close()
        logging.getLogger("seal_jax").removeHandler(self._warnings)
