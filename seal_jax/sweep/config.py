"""What a sweep file says: typed dataclasses, filled from YAML and `key=value` overrides, checked as strictly as a run's config.

name: rates
base: ../quickstart.yaml            # relative to this file
set: {evaluate.contexts: 4}         # for all trials
run: train
search: random
trials: 12
space:
  fit.learning_rate: {low: 1.0e-4, high: 5.0e-3, log: true}
  fit.epochs: [2, 5, 10]
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import omegaconf
from omegaconf import OmegaConf

from seal_jax import config as config_lib
from seal_jax.config import RunConfig
from seal_jax.errors import SealError
from seal_jax.runs.places import Place, place
from seal_jax.sweep import space as space_lib
from seal_jax.sweep.space import Choices, Range, Settings, Space


@dataclasses.dataclass
class ResourcesConfig:
    """What Ray gives to one trial."""

    cpu: int = 1  # cores; XLA's thread pools have as many threads
    gpu: float = 0  # a share below 1 is a share of its memory
    tpu: int = 0  # chips of one host: 1, 2, 4 or 8


@dataclasses.dataclass
class AshaConfig:
    """Early stopping by asynchronous successive halving (ASHA, arXiv 1810.05934), on the reward of a round."""

    grace: int = 1  # rounds that every trial is given
    factor: int = 3  # of the trials that come so far about one in so many goes on, after `grace`, `grace * factor`, ... rounds


@dataclasses.dataclass
class SweepConfig:
    name: str = "sweep"  # what the sweep is called
    base: str = ""  # the config that trials change: a file, relative to this one
    set: Any = None  # config keys that all trials set, by dotted key or in sections
    run: str | None = None  # what a trial does: "train" or "evaluate"; null: train, as a lane evaluate
    search: str = "grid"  # "grid", "random" or "optuna": trials of Ray Tune; "lanes": settings of fit.* at once, in one program
    trials: int = 10  # of random and optuna, and of lanes where the space has a range
    seed: int = 0  # of the settings that are drawn
    space: Any = None  # config keys that trials differ in: a list of values, or {low, high} with log: true or without
    concurrent: int = 1  # trials at once, where there are resources for them
    resources: ResourcesConfig = dataclasses.field(default_factory=ResourcesConfig)
    retries: int = 2  # how often a trial whose process was lost is started again, to go on where it was
    asha: AshaConfig | None = None  # {grace: 1, factor: 3}; null: all trials run to their end
    run_dir: str = "sweeps/${name}"  # the sweep's folder


CHOICES = {"run": (None, "train", "evaluate"), "search": ("grid", "random", "optuna", "lanes"), "resources.tpu": (0, 1, 2, 4, 8)}
AT_LEAST = {"trials": 1, "seed": 0, "concurrent": 1, "retries": 0, "resources.cpu": 1, "resources.gpu": 0}
RANGE = ("low", "high", "log")  # keys of a range
OWN = ("name", "run_dir")  # config keys that are each trial's own


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep that has been checked. `base` is the config of all trials as far as it is the same, `space` what they differ in."""

    config: SweepConfig
    base: RunConfig
    space: Space
    data: dict[str, Any]  # the base file as it was read: interpolations in it follow what a trial sets
    fixed: Settings  # of all trials
    where: str  # the sweep file, for messages

    @property
    def run(self) -> str:
        """What a trial does: "train" or "evaluate"."""
        return self.config.run or ("evaluate" if self.config.search == "lanes" else "train")

    @property
    def folder(self) -> Place:
        return place(self.config.run_dir)

    @property
    def rounds(self) -> int:
        """The most rounds of ReST-EM that a trial may have."""
        said = self.space.get("rest_em.rounds")
        if said is None:
            return self.base.rest_em.rounds
        return max(said.values) if isinstance(said, Choices) else int(said.high)

    def trial(self, settings: Settings, run_dir: str | None = None) -> RunConfig:
        """The config of the trial with these settings. Raises `SealError` if there is none such."""
        own = {} if run_dir is None else {"name": f"{self.config.name}-{pathlib.Path(run_dir).name}", "run_dir": run_dir}
        return config_lib.build(self.data, where=self.where, settings={**self.fixed, **settings, **own})

    def has(self, settings: Settings) -> bool:
        """Whether the settings are in the space."""
        return settings.keys() == self.space.keys() and all(d.has(settings[key]) for key, d in self.space.items())

    def settings(self) -> list[Settings]:
        """The settings of the trials, where they are known beforehand: of all searches but optuna."""
        ranges = [key for key, d in self.space.items() if isinstance(d, Range)]
        if self.config.search == "random" or (self.config.search == "lanes" and ranges):
            return space_lib.random(self.space, self.config.trials, self.config.seed)
        return space_lib.grid({key: d for key, d in self.space.items() if isinstance(d, Choices)})


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Sweep:
    """The sweep of the file `path`, with overrides of its keys (`trials=20`, `set.evaluate.contexts=8`, `space.fit.epochs=[2,5]`).

    Each value of the space is tried in the config by itself. Raises `SealError` for the first that it does not take, and for whatever
    else is unknown, missing, of a wrong type or out of range.
    """
    where = str(path)
    said, given = config_lib.read(path), None
    try:
        given = OmegaConf.create(said)
        for item in overrides:
            given = config_lib.override(given, item)
            config_lib.keep_texts(OmegaConf.structured(SweepConfig), given, item)
        parts = {key: OmegaConf.to_container(given)[key] for key in ("set", "space") if given._get_node(key) is not None}
    except (omegaconf.errors.OmegaConfBaseException, ValueError) as error:
        raise SealError(f"{where}: {' '.join(str(error).split())}") from None
    for key, value in parts.items():
        if value is not None and not isinstance(value, Mapping):
            raise SealError(f"{where}: {key}={value!r}: expected a mapping of config keys, say fit.epochs")
    config = config_lib.fill(OmegaConf.structured(SweepConfig), OmegaConf.masked_copy(given, [k for k in given if k not in parts]), where)
    _check(config, where)
    data = config_lib.read(pathlib.Path(path).parent / config.base)
    fixed, asked = _overridden(parts, data, overrides)
    for key in (*fixed, *asked):
        if key.startswith("executor."):
            raise SealError(f"{where}: {key}: a trial runs in one process, and Ray places trials; leave it out")
        if key in OWN:
            raise SealError(f"{where}: {key}: each trial has its own; set the sweep's {key} instead")
    if both := sorted(fixed.keys() & asked.keys()):
        raise SealError(f"{where}: {both[0]} is in set and in space; leave it out of one")
    if not asked:
        raise SealError(f"{where}: space is empty: name the config keys that trials differ in")
    fixed["executor.name"] = "local"  # whatever the base has: Ray places trials
    sweep = Sweep(config, config_lib.build(data, where=where, settings=fixed), {}, data, fixed, where)
    space = {key: _dimension(sweep, key, space_lib.parse(key, value, where)) for key, value in asked.items()}
    if config.search == "grid" and (ranges := [key for key, d in space.items() if isinstance(d, Range)]):
        raise SealError(f"{where}: space.{ranges[0]} is a range, search is grid: give a list of values, or search: random or optuna")
    sweep = dataclasses.replace(sweep, space=space)
    if config.asha is not None:
        _check_asha(sweep)
    return sweep


def _overridden(parts: Mapping[str, Any], data: Mapping[str, Any], overrides: Sequence[str]) -> tuple[Settings, Settings]:
    """What `set` and `space` say by dotted config key, whichever way the file spells keys, an override over the file.

    A text stays as an override has it: 00576224 is a number to YAML, and to ARC the id of a puzzle.
    """
    found = {part: space_lib.flatten(parts.get(part) or {}, RANGE if part == "space" else ()) for part in ("set", "space")}
    task = {**found["set"], "task.name": found["set"].get("task.name", (data.get("task") or {}).get("name"))}["task.name"]
    schema = config_lib.schema_of(task) if task in config_lib.task_names() else None
    for item in overrides:
        key, _, written = item.partition("=")
        part, _, key = key.partition(".")
        if part in found and key and key in found[part]:
            is_text = schema is not None and config_lib.is_text(schema, key)
            value = config_lib.texts(written) if is_text else OmegaConf.to_container(OmegaConf.from_dotlist([f"value={written}"]))["value"]
            found[part][key] = value
    return found["set"], found["space"]


def _value(config: Any, key: str) -> Any:
    """The value of a dotted key as JSON data."""
    for part in key.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config


def _dimension(sweep: Sweep, key: str, said: Choices | Range) -> Choices | Range:
    """What was said of `key`, with values as the config has them; each is tried in it."""
    if isinstance(said, Choices):
        return Choices(tuple(_value(sweep.trial({key: value}), key) for value in said.values))
    text = isinstance(_value(sweep.base, key), str)  # which would not take a number
    low, high = (said.low, said.high) if text else (_value(sweep.trial({key: value}), key) for value in (said.low, said.high))
    if text or not all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high)):
        raise SealError(f"{sweep.where}: space.{key}: is no number in the config, so it has no range; give a list of values")
    return Range(low, high, said.log)


def _check(config: SweepConfig, where: str) -> None:
    for key, choices in CHOICES.items():
        if (value := _value(config, key)) not in choices:
            raise SealError(f"{where}: {key}={value!r}: expected one of {', '.join(str(c) for c in choices if c is not None)}")
    for key, least in AT_LEAST.items():
        if not (value := _value(config, key)) >= least:
            raise SealError(f"{where}: {key}={value}: expected at least {least}")
    if not config.base:
        raise SealError(f"{where}: base is missing: the config file that trials change, relative to this one")
    if config.search == "lanes" and config.run == "train":
        raise SealError(f"{where}: run=train, search=lanes: lanes share a program that trains no policy; run: evaluate, or another search")


def _check_asha(sweep: Sweep) -> None:
    asha, rounds = sweep.config.asha, sweep.rounds
    assert asha is not None
    if sweep.config.search == "lanes" or sweep.run == "evaluate":
        raise SealError(f"{sweep.where}: asha: stops trials by their rounds, and these have none; leave it out, or run: train")
    if asha.factor < 2:
        raise SealError(f"{sweep.where}: asha.factor={asha.factor}: expected at least 2")
    if not 1 <= asha.grace < rounds:
        raise SealError(
            f"{sweep.where}: asha.grace={asha.grace}, rest_em.rounds={rounds}: expected at least 1 and fewer than the rounds, "
            "or there is nothing to stop; leave asha out"
        )
