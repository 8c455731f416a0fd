"""One trial: a run folder, made by the library as the commands make it, in a process of its own. Imports JAX only once it runs."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from seal_jax import logs
from seal_jax.config import RunConfig
from seal_jax.sweep import table as table_lib
from seal_jax.sweep.config import ResourcesConfig


@dataclasses.dataclass(frozen=True)
class Job:
    """What a process must know to run a trial: `run` is "train" or "evaluate"; `log` takes what it prints."""

    run: str
    config: RunConfig
    log: str
    resources: ResourcesConfig
    cwd: str


def environment(resources: ResourcesConfig) -> dict[str, str]:
    """What a trial's process is told before JAX starts. Which GPUs and TPU chips it sees is Ray's to say."""
    found = {"NPROC": str(resources.cpu)}  # by which XLA sizes its thread pools; otherwise one thread a core of the machine
    if not resources.gpu and not resources.tpu:
        found["JAX_PLATFORMS"] = "cpu"  # or trials that were given no accelerator would all start on the same
    elif 0 < resources.gpu < 1:
        found["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 * resources.gpu:.3f}"  # by default, each takes three quarters of the GPU
    return found


def prepare(job: Job) -> None:
    """Makes this process the trial's: its environment, its folder, and its log in place of standard output and error."""
    os.environ.update(environment(job.resources))
    if os.path.isdir(job.cwd):
        os.chdir(job.cwd)  # which data files are relative to
    pathlib.Path(job.log).parent.mkdir(parents=True, exist_ok=True)
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    logs.setup()
    say(f"seal-jax {job.run}: {job.config.name}, run folder {job.config.run_dir}")


def measure(run: str, config: RunConfig, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Trains or evaluates, in the run folder that the config names, or goes on there.

    `report` is called after each round with {"round", "rewards", "seconds"}; what comes back has the last of these, and "table" and
    "result" as `seal_jax.sweep.table` says.
    """
    from seal_jax.rest_em import loop

    rewards: list[float | None] = []

    def told() -> dict[str, Any]:
        return {"round": len(rewards), "rewards": list(rewards), "seconds": seconds(config.run_dir)}

    def after_round(number: int, records: Sequence[dict[str, Any]]) -> None:
        rewards.append(table_lib.reward(records))
        report(told())

    if run == "train":
        table, policy = loop.train(config, after_round=after_round), loop.policy_name(config.rest_em.rounds)
    else:
        table, policy = loop.evaluate_only(config), loop.policy_name(0)
    return {**told(), "table": table, "result": table_lib.result(table, policy)}


def seconds(folder: str) -> float:
    """What the units of a run have taken so far, over all processes that worked on it."""
    from seal_jax.runs.events import read_events
    from seal_jax.runs.store import EVENTS

    events = read_events(pathlib.Path(folder) / EVENTS)
    return round(sum(e.get("seconds", 0.0) for e in events if e["event"] == "unit_done"), 3)


def reason(error: BaseException) -> str:
    """An error in one line, as a row of the table says it."""
    from seal_jax.errors import SealError

    text = " ".join(str(error).split())
    if isinstance(error, SealError):
        return text
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)
