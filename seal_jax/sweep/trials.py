"""Trials through Ray Tune: it places them, stops some early (ASHA) and asks Optuna for settings. To be imported where it is wanted alone.

What is known of a trial is in its record (`seal_jax.sweep.table`), which this process keeps; Ray's own state is not needed to go on.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import traceback
import types
from collections.abc import Callable, Sequence
from typing import Any

from seal_jax.fleet import cluster

# Read by Ray when it is imported. In a folder of its own a trial would not find data files given relative to here; and Ctrl+C is ours.
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from seal_jax.errors import SealError
from seal_jax.sweep import space as space_lib
from seal_jax.sweep import table as table_lib
from seal_jax.sweep import trial as trial_lib
from seal_jax.sweep.config import ResourcesConfig, Sweep
from seal_jax.sweep.space import Settings
from seal_jax.sweep.table import Record

logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)  # which trials failed stands in our table, with the reason
Measure = Callable[..., dict[str, Any]]  # as `trial.measure`
FINISHED = ("done", "stopped")  # what is not run again


def bundle(resources: ResourcesConfig) -> dict[str, float]:
    """A trial's resources by Ray's names."""
    return {"CPU": resources.cpu, **({"GPU": resources.gpu} if resources.gpu else {}), **({"TPU": resources.tpu} if resources.tpu else {})}


def check(resources: ResourcesConfig, there: dict[str, float]) -> None:
    """Raises `SealError` for resources of which there are not enough: Ray would wait for them."""
    for name, amount in bundle(resources).items():
        if amount > there.get(name, 0):
            raise SealError(
                f"resources.{name.lower()}={amount:g}: this machine has {there.get(name, 0):g}; set less, "
                "or RAY_ADDRESS to a cluster that has them"
            )


def run(sweep: Sweep, known: Sequence[Record], keep: Callable[[Record], None], measure: Measure = trial_lib.measure) -> None:
    """Runs the trials that are not finished in the records `known`; `keep` is given the record of each whenever it has changed."""
    known = [record for record in known if sweep.has(record["settings"])]  # the folder may hold trials of another space as well
    finished = [record for record in known if record["status"] in FINISHED]
    options: dict[str, Any] = {"num_samples": 1}
    space: dict[str, Any] = {}
    if sweep.config.search == "optuna":
        from seal_jax.sweep.optuna_search import OptunaTrials

        total = sweep.config.trials
        left = total - len(finished)
        begun = [record["settings"] for record in known if record["status"] not in FINISHED]
        options = {"num_samples": left, "search_alg": OptunaTrials(sweep, finished, begun)}
    else:
        wanted, done = sweep.settings(), {record["trial"] for record in finished}
        missing = [settings for settings in wanted if space_lib.digest(settings) not in done]
        total, left = len(wanted), len(missing)
        space = {"settings": tune.grid_search([json.dumps(settings) for settings in missing])}
    if left <= 0:
        return

    keys = cluster.keys()

    def trainable(config: dict[str, Any]) -> None:
        os.environ.update(keys)
        settings = json.loads(config["settings"])
        job = job_of(sweep, settings, cwd)
        trial_lib.prepare(job)

        def report(told: dict[str, Any]) -> None:
            if told["round"] < job.config.rest_em.rounds:  # after the last one a trial is not to be stopped: its evaluation follows
                tune.report({"reward": _number(told["rewards"][-1]), "round": told["round"], "told": json.dumps(told)})

        try:
            told = measure(job.run, job.config, report)
        except Exception as error:  # would come again, unlike the loss of the process, which Ray starts anew
            traceback.print_exc()  # into the log: the table has a line
            tune.report({"reward": float("nan"), "round": 0, "error": trial_lib.reason(error)})
            return
        last = {"reward": _number((told["rewards"] or [None])[-1]), "round": told["round"]}
        tune.report({**last, "value": _number(table_lib.score(told)), "told": json.dumps(told)})

    cwd = os.getcwd()
    folder = sweep.folder.resolve() / "ray"
    shutil.rmtree(folder, ignore_errors=True)  # nothing of it is needed to go on
    with cluster.joined(False, lambda there: check(sweep.config.resources, there)):
        asked = tune.PlacementGroupFactory([bundle(sweep.config.resources)])
        tuner = tune.Tuner(
            tune.with_resources(trainable, asked),
            param_space=space,
            tune_config=tune.TuneConfig(
                scheduler=scheduler(sweep, finished),
                max_concurrent_trials=sweep.config.concurrent,
                trial_dirname_creator=lambda trial: trial.trial_id,
                **options,
            ),
            run_config=tune.RunConfig(
                name=folder.name,
                storage_path=str(folder.parent),
                verbose=0,
                callbacks=[Records(sweep, total - left, total, keep, known)],
                failure_config=tune.FailureConfig(max_failures=sweep.config.retries),
            ),
        )
        tuner.fit()


def job_of(sweep: Sweep, settings: Settings, cwd: str) -> trial_lib.Job:
    """What the process of a trial is to know. Raises `SealError` if the config does not take the settings."""
    folder = sweep.folder / "trials" / space_lib.digest(settings)
    return trial_lib.Job(sweep.run, sweep.trial(settings, str(folder)), f"{folder}.log", sweep.config.resources, cwd)


def _number(value: float | None) -> float:
    """NaN for a reward that there is not: to Ray, neither good nor bad."""
    return float("nan") if value is None else value


def scheduler(sweep: Sweep, finished: Sequence[Record]) -> ASHAScheduler | None:
    """ASHA, as it would stand after the trials that are finished already; None if nothing is to be stopped early."""
    asha = sweep.config.asha
    if asha is None:
        return None
    options = {"max_t": sweep.rounds, "grace_period": asha.grace, "reduction_factor": asha.factor}
    made = ASHAScheduler(time_attr="round", metric="reward", mode="max", **options)
    for record in finished:
        stand_in: Any = types.SimpleNamespace(trial_id=record["trial"])
        controller: Any = None
        made.on_trial_add(controller, stand_in)
        for number, reward in enumerate(record["rewards"], 1):
            made.on_trial_result(controller, stand_in, {"round": number, "reward": _number(reward)})
        made.on_trial_complete(controller, stand_in, {})
    return made


class Records(tune.Callback):
    """Turns what Ray says of its trials into records and a line of progress each."""

    def __init__(self, sweep: Sweep, done: int, total: int, keep: Callable[[Record], None], known: Sequence[Record]):
        self._sweep, self._keep, self._done, self._total = sweep, keep, done, total
        self._failed: list[Any] = []
        self._before = {record["trial"]: record for record in known}

    def _record(self, trial: Any, status: str, problem: str | None = None) -> Record:
        settings = json.loads(trial.config["settings"])
        name = space_lib.digest(settings)
        told = json.loads(trial.last_result["told"]) if "told" in (trial.last_result or {}) else {}
        before = self._before.get(name, {})
        return {
            **{"trial": name, "settings": settings, "does": self._sweep.run, "status": status, "problem": problem},
            "rewards": told.get("rewards", before.get("rewards", [])),
            "table": told.get("table"),
            "result": told.get("result"),
            "seconds": told.get("seconds", before.get("seconds")),
            "run": str(self._sweep.folder / "trials" / name),
        }

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._keep(self._record(trial, "running"))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if (error := trial.last_result.get("error")) is not None:
            self._end(self._record(trial, "failed", error))
        else:
            self._end(self._record(trial, "done" if "value" in trial.last_result else "stopped"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._failed.append(trial)  # Ray writes down why only after this

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        cluster.stop_if_told()
        for trial in [trial for trial in self._failed if trial.get_pickled_error() is not None]:
            self._failed.remove(trial)
            self._end(self._record(trial, "failed", problem(trial.get_pickled_error())))

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        for trial in self._failed:
            error = trial.get_pickled_error()
            self._end(self._record(trial, "failed", "for a reason that Ray does not tell" if error is None else problem(error)))

    def _end(self, record: Record) -> None:
        self._done += 1
        self._keep(record)
        trial_lib.say(
            f"trial {self._done}/{self._total} {record['trial']} {space_lib.line(record['settings'])}: {table_lib.outcome(record)}"
        )


def problem(error: Exception) -> str:
    """Why a trial failed, in one line: the error that it raised, or what became of its process."""
    if isinstance(error, ray.exceptions.RayTaskError):
        return trial_lib.reason(error.cause)
    lines = [line for line in str(error).splitlines() if "Worker exit detail" in line or "dead because" in line]
    text = lines[-1] if lines else trial_lib.reason(error)
    return f"its process died: {' '.join(text.split('Some common causes')[0].split())}"
