"""What is told of a run besides its event log, as the config's section `track` asks: curves elsewhere, and a trace by JAX's profiler.

The curves are those of the events "step" (`seal_jax.runs.health`), numbered through the run, and "round" (rewards and losses by round).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import logging
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, Protocol

from seal_jax import config as config_lib
from seal_jax.errors import SealError
from seal_jax.parallel import processes
from seal_jax.runs import events, files, health
from seal_jax.runs.places import Place
from seal_jax.runs.store import EVENTS, RunStore

log = logging.getLogger(__name__)

STEP = ("tokens", "tokens_per_s", "utilisation", "compiled", "compile_seconds", "memory", "memory_peak", "waiting")  # drawn of a step


class Sink(Protocol):
    """A place for curves."""

    def add(self, axis: str, at: int, values: Mapping[str, float]) -> None:
        """Points at `at` of the `axis` ("step" or "round")."""

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the folder `tensorboard/` of the run; in an object store they are there at the end."""

    def __init__(self, module: ModuleType, folder: Place):
        self._stack = contextlib.ExitStack()
        here = self._stack.enter_context(files.staged(folder / "tensorboard"))
        self._writer = module.SummaryWriter(str(here))

    def add(self, axis: str, at: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, at)
        self._writer.flush()

    def close(self) -> None:
        with self._stack:
            self._writer.close()


class Wandb:
    """A run of Weights & Biases; a run that goes on here goes on there."""

    def __init__(self, module: ModuleType, folder: Place, config: config_lib.RunConfig, identity: str):
        here = folder if isinstance(folder, pathlib.Path) else tempfile.gettempdir()
        options = {"name": config.name, "id": identity, "resume": "allow", "dir": str(here), "config": config_lib.to_dict(config)}
        try:
            self._run = module.init(project=config.track.wandb, **options)
        except Exception as error:  # wandb's own, for want of a key or of the network
            raise SealError(f"track.wandb={config.track.wandb!r}: {' '.join(str(error).split())[:300]}") from None
        for axis, names in (("step", [f"{kind}/*" for kind in health.KINDS]), ("round", ["reward/*", "loss/*"])):
            self._run.define_metric(axis)
            for name in names:
                self._run.define_metric(name, step_metric=axis)

    def add(self, axis: str, at: int, values: Mapping[str, float]) -> None:
        self._run.log({axis: at, **values})

    def close(self) -> None:
        self._run.finish()


@contextlib.contextmanager
def tracked(store: RunStore, config: config_lib.RunConfig) -> Iterator[None]:
    """While the block runs, its health goes into the run's log, and where `config.track` says.

    Raises `SealError` for a package that is missing.
    """
    track = config.track
    modules = {  # on every process, so that all or none go on
        "tensorboard": _module("tensorboardX", "track.tensorboard", "tensorboard") if track.tensorboard else None,
        "wandb": _module("wandb", "track.wandb", "wandb") if track.wandb is not None else None,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(health.told_to(store.log))
        if processes.first():
            before = events.read_events(store.folder / EVENTS)
            sinks: list[Sink] = []
            if modules["tensorboard"] is not None:
                sinks.append(TensorBoard(modules["tensorboard"], store.folder))
            if modules["wandb"] is not None:
                made = f"{before[0]['time']} {store.folder.resolve()}" if before else str(store.folder.resolve())
                sinks.append(Wandb(modules["wandb"], store.folder, config, hashlib.sha256(made.encode()).hexdigest()[:16]))
            for sink in sinks:
                stack.callback(sink.close)
            if sinks:
                stack.enter_context(health.told_to(_Curves(sinks, sum(e["event"] == "step" for e in before))))
            if track.profile is not None:
                stack.enter_context(_profiling(pathlib.Path(track.profile)))
        yield


class _Curves:
    """Turns events into points; `steps` were told before."""

    def __init__(self, sinks: list[Sink], steps: int):
        self._sinks, self._steps = sinks, steps

    def __call__(self, event: str, /, **fields: Any) -> None:
        if event == "step":
            self._steps += 1
            named = {f"{fields['kind']}/{key}": fields[key] for key in STEP}
        else:
            named = {key: value for key, value in fields.items() if key != "round"}
        values = {name: float(value) for name, value in named.items() if value is not None}
        for sink in self._sinks:
            sink.add(event, self._steps if event == "step" else fields["round"], values)


def _module(name: str, key: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise SealError(f'{key} needs the package {name}: pip install "seal_jax[{extra}]"') from None


# --- JAX's profiler --------------------------------------------------------------------------------------------------


class _Trace:
    """Where a trace is wanted, and how many groups have begun."""

    folder: pathlib.Path | None = None
    groups = 0


@contextlib.contextmanager
def _profiling(folder: pathlib.Path) -> Iterator[None]:
    _Trace.folder, _Trace.groups = folder, 0
    try:
        yield
        if _Trace.groups < 2:
            log.warning("track.profile: no second group of contexts was measured here, so that there is no trace")
    finally:
        _Trace.folder = None


@contextlib.contextmanager
def group() -> Iterator[None]:
    """A group of contexts is measured in the block. The second of a process is traced, if a trace is wanted: the first compiles."""
    _Trace.groups += 1
    if _Trace.folder is None or _Trace.groups != 2:
        yield
        return
    import jax

    with jax.profiler.trace(str(_Trace.folder)):
        yield
