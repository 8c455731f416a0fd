"""Who computes which unit of a run. Host code; knows neither JAX nor Ray.

Every worker of a run does the same program (`rest_em.loop.train`, say) and asks here before it computes a unit. The first that asks gets
the unit to compute; the others are told to wait, or given another unit of the same group. A unit counts once: its result is taken from
the worker that holds the claim, and from nobody else. When a worker is lost, its claim is free again.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from seal_jax.runs import health
from seal_jax.runs.store import RunStore


@dataclasses.dataclass
class Claim:
    """A unit that a worker computes."""

    worker: str
    since: float  # of the clock


class Ledger:
    """The claims of a run whose results are in `store`. `clock`: seconds that only go up."""

    def __init__(self, store: RunStore, clock: Callable[[], float] = time.monotonic):
        self.store, self._clock = store, clock
        self._claims: dict[str, Claim] = {}
        self._whole: set[str] = set()  # units that were found or kept: not read again at each question
        self._said: set[str] = set()
        self._seen: dict[str, float] = {}  # by worker: when it last asked, or was started
        self._began: set[str] = set()  # workers that have asked
        self._gone: set[str] = set()  # workers that were given up; what they ask comes too late
        self._reported = -1  # units there were at the last report
        self.losses: collections.Counter[str] = collections.Counter()  # by unit: workers that were lost over it

    def claim(self, worker: str, names: Sequence[str], beside: str | None = None) -> dict[str, Any]:
        """One of the units for `worker` to compute, {"compute": name}; {} if it has to wait for others; {"whole": True} if all are there;
        {"lost": True} if the worker was given up.

        `beside`: the checkpoint that belongs to them, see `RunStore.once`.
        """
        if worker in self._gone:
            return {"lost": True}
        self._saw(worker)
        open_units = [name for name in names if name not in self._whole]
        for name in open_units:
            if name in self._claims:
                continue
            if self.store.find(name, beside) is not None:
                self._whole.add(name)
                self.store.log("unit_reused", unit=name)
                continue
            self._claims[name] = Claim(worker, self._clock())
            self.store.log("unit_claimed", unit=name, worker=worker)
            return {"compute": name}
        return {} if any(name not in self._whole for name in open_units) else {"whole": True}

    def keep(self, worker: str, name: str, result: dict[str, Any], seconds: float) -> bool:
        """Writes the result of a unit that `worker` claimed. False: the claim is another's by now, and this result counts for nothing."""
        claim = self._claims.get(name)
        if claim is None or claim.worker != worker:
            self.store.log("result_refused", unit=name, worker=worker)
            return False
        self.store.keep(name, result, seconds)
        del self._claims[name]
        self._whole.add(name)
        self._saw(worker)  # or a long unit would count as silence as soon as it is done
        return True

    def save(self, worker: str, name: str, folder: str, tree: Any, metadata: dict[str, Any]) -> bool:
        """Writes a checkpoint for the unit `name`, which `worker` claimed. False, as in `keep`."""
        claim = self._claims.get(name)
        if claim is None or claim.worker != worker:
            return False
        self.store.save(folder, tree, metadata)
        return True

    def expect(self, worker: str) -> None:
        """A worker was started."""
        self._seen[worker] = self._clock()

    def _saw(self, worker: str) -> None:
        self._began.add(worker)
        self._seen[worker] = self._clock()

    def release(self, worker: str, reason: str) -> dict[str, Any]:
        """Frees the claims of a lost worker. Its `units`, the most workers that one of them has cost (`losses`), and whether it `began`."""
        self._gone.add(worker)
        self._seen.pop(worker, None)
        lost = [name for name, claim in self._claims.items() if claim.worker == worker]
        for name in lost:
            del self._claims[name]
            self.losses[name] += 1
        self.store.log("worker_lost", worker=worker, units=lost, reason=reason)
        return {"units": lost, "losses": max((self.losses[name] for name in lost), default=0), "began": worker in self._began}

    def overdue(self, seconds: float) -> list[str]:
        """The workers that have had a unit for longer than that, or have none and have not asked for one."""
        now = self._clock()
        late = {claim.worker for claim in self._claims.values() if now - claim.since > seconds}
        busy = {claim.worker for claim in self._claims.values()}
        return sorted(late | {worker for worker, seen in self._seen.items() if worker not in busy and now - seen > seconds})

    def report(self) -> None:
        """Writes the report, if there is anything new: every worker asks for it after a round."""
        if self._reported != len(self._whole):
            self._reported = len(self._whole)
            self.store.report()

    def log(self, event: str, fields: dict[str, Any]) -> None:
        """An event of a worker. What all of them say alike (of the run, not of a worker) stands in the log once."""
        if fields.get("worker") in self._gone:
            return
        if event == "worker_started" and not self._began:
            self.store.ran_on({key: value for key, value in fields.items() if key not in ("worker", "pid", "host")})
        self._saw(fields["worker"])
        if event in ("skipped", "warning", "round"):
            fields = {key: value for key, value in fields.items() if key != "worker"}
            if (said := repr((event, sorted(fields.items())))) in self._said:
                return
            self._said.add(said)
        if event in ("step", "round"):
            health.tell(event, **fields)  # to the log, and wherever else the run is watched
        else:
            self.store.log(event, **fields)
