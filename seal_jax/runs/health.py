"""The health of a run: what each long step does and takes, told while the run goes on. Host code; nothing here waits for a device.

A step is told as an event "step": at its end, and about twice a minute within. Fields: `kind` ("sample", "answer", "fit", "sft"), `what`;
`ended`; `done` of `total` in `unit`; `seconds` so far; `tokens` trained or written, and `tokens_per_s`; `utilisation`, model FLOP a second
as a share of the devices' published bf16 peak, null where that or the FLOP are not known; `compiled`, programs that JAX asked its compiler
for, those of them that came from its `cache`, and `compile_seconds`, of each though several be compiled at once; `memory` and
`memory_peak` in bytes, of the fullest device, or, where the backend does not tell, of the process (`memory_of`); `waiting`, edits or
requests without a slot.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from seal_jax.progress import Progress, bar

SECONDS = 30.0  # between events of one step
KINDS = {"sample": "writing self-edits", "answer": "answering", "fit": "fitting adapters", "sft": "training the policy"}

Listener = Callable[..., None]  # called as `listener(event, **fields)`
_listeners: list[Listener] = []


@contextlib.contextmanager
def told_to(*listeners: Listener) -> Iterator[None]:
    """While the block runs, the health of all steps is told to `listeners`."""
    _listeners.extend(listeners)
    try:
        yield
    finally:
        for listener in listeners:
            _listeners.remove(listener)


def tell(event: str, /, **fields: Any) -> None:
    """Tells those that listen of anything that is worth a curve."""
    for listener in _listeners:
        listener(event, **fields)


class Step:
    """A step under way. `flops`: of the model, so far."""

    def __init__(self, kind: str, what: str, total: int, unit: str, shown: Progress, peak: float | None, flops_per_token: float | None):
        self.flops = 0.0
        self._fields = {"kind": kind, "what": what, "total": total, "unit": unit}
        self._shown, self._peak, self._flops_per_token = shown, peak, flops_per_token
        self._done = self._tokens = 0
        self._waiting: int | None = None
        self._start = self._said = time.monotonic()
        self._compiled = _compiles().counts

    def update(self, n: int, waiting: int | None = None, tokens: int | None = None) -> None:
        """`n` more units are done, with so many tokens (default: a unit is one), and so many edits or requests wait for a slot."""
        tokens = n if tokens is None else tokens
        self._done, self._tokens, self._waiting = self._done + n, self._tokens + tokens, waiting
        if self._flops_per_token is not None:
            self.flops += self._flops_per_token * tokens
        self._shown.update(n)
        if _listeners and time.monotonic() - self._said >= SECONDS:
            self.tell(False)

    def tell(self, ended: bool) -> None:
        self._said = time.monotonic()
        seconds = max(self._said - self._start, 1e-6)
        known = self.flops > 0 and self._peak is not None
        compiled, cached, spent = (now - before for now, before in zip(_compiles().counts, self._compiled, strict=True))
        tell(
            "step",
            **{**self._fields, "ended": ended, "done": self._done, "seconds": round(seconds, 3)},
            **{"tokens": self._tokens, "tokens_per_s": _short(self._tokens / seconds)},
            utilisation=_short(self.flops / seconds / self._peak) if known else None,
            **{"compiled": compiled, "cache": cached, "compile_seconds": round(spent, 3)},
            **memory(),
            waiting=self._waiting,
        )


def _short(value: float) -> float:
    return float(f"{value:.4g}")


@contextlib.contextmanager
def step(kind: str, what: str, total: int, unit: str, peak: float | None = None, flops_per_token: float | None = None) -> Iterator[Step]:
    """A long step of `total` units: its progress is shown, and its health told. `peak`: FLOP a second of its devices, if known.

    `flops_per_token`: of the model; where it is not known beforehand, the block sets `flops` in the end.
    """
    with bar(what, total, unit) as shown:
        made = Step(kind, what, total, unit, shown, peak, flops_per_token)
        yield made
        if _listeners:
            made.tell(True)


class _Compiles:
    """Counts what JAX compiles in this process."""

    def __init__(self) -> None:
        import jax.monitoring

        self.counts = (0, 0, 0.0)  # programs, those of them from the cache on the disk, seconds
        self._lock = threading.Lock()
        jax.monitoring.register_event_duration_secs_listener(self._duration)
        jax.monitoring.register_event_listener(self._event)

    def _duration(self, name: str, seconds: float, **_: Any) -> None:
        if name == "/jax/core/compile/backend_compile_duration":  # asking the cache included
            with self._lock:
                programs, cached, spent = self.counts
                self.counts = (programs + 1, cached, spent + seconds)

    def _event(self, name: str, **_: Any) -> None:
        if name == "/jax/compilation_cache/cache_hits":
            with self._lock:
                programs, cached, spent = self.counts
                self.counts = (programs, cached + 1, spent)


_compiles = functools.cache(_Compiles)  # once: JAX has no way to take a listener back


def memory() -> dict[str, Any]:
    """Bytes in use and at their highest so far, of the fullest device here, or of this process; see above."""
    import jax

    found = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    if found:
        used, peak = (max(s.get(key, 0) for s in found) for key in ("bytes_in_use", "peak_bytes_in_use"))
        return {"memory": used, "memory_peak": peak, "memory_of": "device"}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    try:
        used = int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        used = None
    return {"memory": used, "memory_peak": peak, "memory_of": "process"}


def summary(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each kind of step among a log's events: totals and medians over its finished steps; for the report."""
    by_kind: dict[str, list[Mapping[str, Any]]] = {}
    for event in events:
        if event["event"] == "step" and event.get("ended"):
            by_kind.setdefault(event["kind"], []).append(event)
    return [_summary(KINDS.get(kind, kind), steps) for kind, steps in by_kind.items()]


def _summary(name: str, steps: list[Mapping[str, Any]]) -> dict[str, Any]:
    def known(key: str) -> list[Any]:
        return [s[key] for s in steps if s.get(key) is not None]

    return {
        "kind": name,
        "steps": len(steps),
        **{key: sum(known(key)) for key in ("seconds", "tokens", "compiled", "cache", "compile_seconds")},
        **{key: statistics.median(known(key)) if known(key) else None for key in ("tokens_per_s", "utilisation")},
        "memory_peak": max(known("memory_peak"), default=None),
        "memory_of": steps[-1].get("memory_of"),
        "waiting": max(known("waiting"), default=None),
    }
