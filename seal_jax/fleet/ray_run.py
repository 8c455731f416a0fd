"""A run by workers on the machines of a Ray cluster: one worker a slice, each a process a host, each holding the policy.

    driver    starts the office and the workers, starts lost ones anew, and ends with the first that has the table
    office    an actor without accelerators on the driver's machine: it has the run folder and the ledger
    worker    actors that run the same program as a run of one machine does, and ask the office what to compute

Ray places them, and tells when one is lost. What a lost worker had claimed is free for the others, and a new one reads what is there.
Within a worker of several hosts, JAX's processes find each other as they do without Ray (`parallel.processes`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import sys
import time
from typing import Any

from seal_jax.config import ExecutorConfig, RunConfig
from seal_jax.errors import SealError
from seal_jax.fleet import cluster
from seal_jax.fleet.ledger import Ledger
from seal_jax.fleet.store import WorkerStore

START = 120.0  # seconds for an actor to be there
POLL = 1.0  # seconds between looks at stalled workers
TELL = 60.0  # seconds between lines about resources that are waited for
VERSIONS = {"v5e": "v5litepod", "tpu7x": "v7x"}  # generations by Ray's names, where these differ


def run(config: RunConfig, command: str, trained: str | None = None) -> dict[str, Any]:
    """`rest_em.loop.train` or, of the run `trained`, `evaluate_only` by workers; returns the table.

    Raises `SealError` as those do, or if a unit has been lost with its worker more than `executor.retries` times.
    """
    with cluster.joined(log_to_driver=True):
        return _Driver(cluster.ray(), config, command, trained).run()


def _line(error: BaseException) -> str:
    """An error on one line, without Ray's account of where it came from."""
    cause = getattr(error, "cause", None) or error
    text = " ".join(str(cause).split())
    return (text if isinstance(cause, SealError) else f"{type(cause).__name__}: {text}")[:500]


# --- on the machines ------------------------------------------------------------------------------------------------


class Office:
    """The run folder and its ledger, as an actor."""

    def __init__(self, root: str):
        _enter(root)

    def open(self, config: RunConfig) -> None:
        """Makes the run folder, or opens it to go on."""
        from seal_jax.rest_em import loop

        self.opened = contextlib.ExitStack()
        self.store = self.opened.enter_context(loop.open_run(config))
        self.ledger = Ledger(self.store)

    def ask(self, method: str, *arguments: Any) -> Any:
        """A question of a worker: the method of the ledger or, what it does not know of, of the store."""
        if method == "replace":
            name, result, seconds = arguments
            return self.store.keep(name, result, seconds) and None
        return getattr(self.ledger if hasattr(Ledger, method) else self.store, method)(*arguments)

    def close(self, error: str | None) -> None:
        """The end of the run, or its stop."""
        stopped = None if error is None else SealError(error)
        self.opened.__exit__(None if stopped is None else SealError, stopped, None)


class Worker:
    """A process of a worker, as an actor."""

    def __init__(self, name: str, root: str):
        _enter(root)
        self.name = name

    def address(self) -> str:
        """host:port for a coordinator here."""
        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def run(
        self, config: RunConfig, command: str, trained: str | None, office: Any, environment: dict[str, str], hosts: int
    ) -> dict[str, Any]:
        """The whole program; its table."""
        import ray

        os.environ.update(environment)
        if hosts > 1:  # otherwise what the environment says of other processes is not about this one
            from seal_jax.parallel import processes

            processes.start()
        from seal_jax.parallel import compiler
        from seal_jax.rest_em import loop
        from seal_jax.runs.store import versions

        compiler.keep()

        def ask(method: str, *arguments: Any) -> Any:
            try:
                return ray.get(office.ask.remote(method, *arguments))
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None

        store = WorkerStore(self.name, config.run_dir, ask)
        store.log("worker_started", pid=os.getpid(), host=socket.gethostname(), **versions())
        return loop.train(config, store) if command == "train" else loop.evaluate_only(config, trained, store)


def _enter(root: str) -> None:
    """Relative paths of a config mean the same as where the command was given, if there is such a folder here."""
    from seal_jax import logs

    logs.setup()
    if os.path.isdir(root):
        os.chdir(root)


# --- the driver -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Slice:
    """A worker as the driver sees it: its place in the cluster, then its processes."""

    number: int
    life: int = 0  # how often it was started anew
    barren: int = 0  # lives in a row that ended before the program began
    reserved: Any = None  # its TPU slice, if it wants one
    group: Any = None  # its placement group
    ready: Any = None  # the reference that tells when that is there
    actors: list[Any] = dataclasses.field(default_factory=list)
    runs: list[Any] = dataclasses.field(default_factory=list)  # references of their ends

    @property
    def name(self) -> str:
        return f"{self.number}.{self.life}"


class _Driver:
    def __init__(self, ray: Any, config: RunConfig, command: str, trained: str | None):
        self.ray, self.config, self.job = ray, config, (command, trained)
        self.executor: ExecutorConfig = config.executor
        self.slices = [_Slice(i) for i in range(self.executor.workers)]
        self.told = self.looked = time.monotonic()

    def run(self) -> dict[str, Any]:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(self.ray.get_runtime_context().get_node_id(), soft=False)
        environment = {"env_vars": {**cluster.keys(), "JAX_PLATFORMS": "cpu"}}  # it must not take an accelerator from a worker
        options = {"num_cpus": 0, "scheduling_strategy": here, "runtime_env": environment, "max_concurrency": 1}
        self.office = self.ray.remote(Office).options(**options).remote(os.getcwd())
        try:
            self._call(self.office.open.remote(self.config))
            for part in self.slices:
                self._place(part)
            table = self._watch()
            self._call(self.office.close.remote(None))
            return table
        except BaseException as error:
            self._stop(error)
            raise
        finally:
            for part in self.slices:
                self._clear(part)
            self.ray.kill(self.office)

    def _stop(self, error: BaseException) -> None:
        with contextlib.suppress(Exception):  # the office is what failed, or does not answer: the first error is the one to read
            self.ray.get(self.office.close.remote(_line(error) if str(error) else type(error).__name__), timeout=20)

    def _call(self, reference: Any) -> Any:
        """What an actor returns; its own `SealError` comes as itself."""
        try:
            while not self.ray.wait([reference], timeout=POLL)[0]:
                cluster.stop_if_told()
            return self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self.ray.exceptions.RayActorError as error:
            raise SealError(
                f"{self.config.run_dir}: the process that has the run folder was lost: {_line(error)}; the same command goes on"
            ) from None

    def _ask(self, method: str, *arguments: Any) -> Any:
        return self._call(self.office.ask.remote(method, *arguments))

    # --- a worker's life --------------------------------------------------------------------------------------------

    def _place(self, part: _Slice) -> None:
        """Asks Ray for a place. Where a slice is wanted and there is none now, the worker stays without one, and `_look` asks again."""
        e = self.executor
        if e.slice is not None:
            from ray.util.tpu import slice_placement_group

            version, _, topology = e.slice.partition(":")
            try:
                options = {"accelerator_version": VERSIONS.get(version, version), "head_reservation_timeout_s": POLL}
                part.reserved = slice_placement_group(topology=topology, **options)
            except ValueError as error:
                raise SealError(f"executor.slice={e.slice}: {_line(error)}") from None
            except (TimeoutError, RuntimeError):
                return
            part.group = part.reserved.placement_group
        else:
            from ray.util.placement_group import placement_group

            own = {"CPU": e.cpus, "GPU": e.gpus, "TPU": e.tpus}
            part.group = placement_group([{kind: amount for kind, amount in own.items() if amount}] * e.hosts, strategy="STRICT_SPREAD")
        part.ready = part.group.ready()

    def _launch(self, part: _Slice) -> None:
        """Starts the worker's processes where Ray has made place."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        part.ready = None
        for number, bundle in enumerate(part.group.bundle_specs):
            place = PlacementGroupSchedulingStrategy(part.group, placement_group_bundle_index=number)
            more = {kind: amount for kind, amount in bundle.items() if kind not in ("CPU", "GPU")}
            options = {"num_cpus": bundle.get("CPU", 0), "num_gpus": bundle.get("GPU", 0), "resources": more}
            actor = self.ray.remote(Worker).options(scheduling_strategy=place, max_restarts=0, **options)
            part.actors.append(actor.remote(part.name, os.getcwd()))
        count = len(part.actors)
        own = cluster.keys()
        if not any(bundle.get(kind) for bundle in part.group.bundle_specs for kind in ("GPU", "TPU")):
            own["JAX_PLATFORMS"] = "cpu"  # or workers that were given no accelerator would all start on the same
            own["NPROC"] = str(max(1, round(self.executor.cpus)))  # by which XLA sizes its thread pools
        if count > 1 and not any("TPU" in bundle for bundle in part.group.bundle_specs):  # the hosts of a TPU slice know each other
            address = self.ray.get(part.actors[0].address.remote(), timeout=START)
            own |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
        environments = [{**own, "JAX_PROCESS_ID": str(number)} if "JAX_NUM_PROCESSES" in own else own for number in range(count)]
        part.runs = [
            actor.run.remote(self.config, *self.job, self.office, environment, count)
            for actor, environment in zip(part.actors, environments, strict=True)
        ]
        self._ask("expect", part.name)

    def _clear(self, part: _Slice) -> None:
        """Ends the worker's processes and gives its place back."""
        from ray.util.placement_group import remove_placement_group

        for actor in part.actors:
            self.ray.kill(actor)
        with contextlib.suppress(Exception):  # what is left of it goes with this process; the other workers must go now
            if part.reserved is not None:
                part.reserved.shutdown()
            elif part.group is not None:
                remove_placement_group(part.group)
        part.actors, part.runs, part.group, part.ready, part.reserved = [], [], None, None, None

    def _lost(self, part: _Slice, reason: str) -> None:
        """A worker's end before the run's: another takes its place, unless that has not helped so far."""
        self._clear(part)
        told = self._ask("release", part.name, reason)
        print(f"seal-jax: worker {part.name} was lost: {reason}", file=sys.stderr, flush=True)
        if told["losses"] > self.executor.retries:
            what = f"{', '.join(told['units'])}: {told['losses']} workers were lost over it, the last: {reason}"
            raise SealError(f"{what}; nothing finished is lost, the same command goes on")
        part.barren = 0 if told["began"] else part.barren + 1
        if part.barren > self.executor.retries:
            self.slices.remove(part)
            if not self.slices:
                raise SealError(f"no worker starts, after {part.barren} tries each; the last: {reason}")
            return
        part.life += 1
        self._place(part)

    # --- the run ----------------------------------------------------------------------------------------------------

    def _watch(self) -> dict[str, Any]:
        """Until a worker has the table."""
        while True:
            cluster.stop_if_told()
            waited = {reference: part for part in self.slices for reference in ([part.ready] if part.ready is not None else part.runs)}
            if not waited:  # none has a place
                time.sleep(POLL)
            for reference in self.ray.wait(list(waited), num_returns=1, timeout=POLL)[0] if waited else ():
                part = waited[reference]
                try:
                    if reference is part.ready:
                        self._launch(part)
                        continue
                    return self.ray.get(reference)
                except self.ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, SealError):
                        raise error.cause from None
                    self._lost(part, _line(error))
                except self.ray.exceptions.RayError as error:
                    self._lost(part, _line(error))
            self._look()

    def _look(self) -> None:
        """At workers that do nothing any more, and at those that Ray has no place for."""
        now = time.monotonic()
        if now - self.looked >= POLL:
            self.looked = now
            late = self._ask("overdue", self.executor.timeout) if self.executor.timeout is not None else []
            for part in [part for part in self.slices if part.name in late]:
                self._lost(part, f"stalled: nothing came of it in {self.executor.timeout:g} s (executor.timeout)")
        if now - self.told >= TELL and (idle := [part for part in self.slices if not part.runs]):
            self.told = now
            for part in [part for part in idle if part.group is None][:1]:
                self._place(part)
            have = {kind: amount for kind, amount in self.ray.cluster_resources().items() if kind in ("CPU", "GPU", "TPU")}
            print(f"seal-jax: waiting for Ray to place {len(idle)} of the workers; the cluster has {have}", file=sys.stderr, flush=True)
