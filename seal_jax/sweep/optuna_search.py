"""Optuna as a searcher of Ray Tune, over the space of a sweep.

Ray's own `OptunaSearch` has no place for what this needs: trials that ASHA stops are told to Optuna as pruned, by their rewards so far and
not as if these were a final accuracy; and settings that are known already are not run again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from ray.tune.search import Searcher

from seal_jax import rng
from seal_jax.sweep import space as space_lib
from seal_jax.sweep import table as table_lib
from seal_jax.sweep.config import Sweep
from seal_jax.sweep.space import Choices, Range, Settings
from seal_jax.sweep.table import Record

TRIES = 100  # suggestions that may be known already, before the space counts as exhausted


class OptunaTrials(Searcher):
    """Suggests first the settings `begun`, then what Optuna's TPE draws from the records `finished` and from what it is told since.

    The sampler is seeded by the sweep's seed and the number of finished trials: one that goes on does not repeat its first draws.
    """

    def __init__(self, sweep: Sweep, finished: Sequence[Record], begun: Sequence[Settings]):
        super().__init__(metric="reward", mode="max")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._sweep, self._space = sweep, sweep.space
        self._distributions = {key: distribution(d) for key, d in sweep.space.items()}
        sampler = optuna.samplers.TPESampler(seed=int(rng.words(sweep.config.seed, "optuna", len(finished))[0]))
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._known: set[str] = set()
        self._asked: dict[str, optuna.Trial] = {}
        for record in finished:
            self._known.add(record["trial"])
            if (params := self._params(record["settings"])) is not None:
                self._study.add_trial(self._past(record, params))
        for settings in begun:
            if (params := self._params(settings)) is not None:
                self._study.enqueue_trial(params)

    def _params(self, settings: Settings) -> dict[str, Any] | None:
        """The settings as Optuna has them; None if they are not in the space, which may have changed."""
        if not self._sweep.has(settings):
            return None
        return {key: json.dumps(v) if isinstance(self._space[key], Choices) else v for key, v in settings.items()}

    def _past(self, record: Record, params: Mapping[str, Any]) -> optuna.trial.FrozenTrial:
        rewards = {number: float("nan") if r is None else r for number, r in enumerate(record["rewards"], 1)}
        value = table_lib.score(record)
        state = TrialState.COMPLETE if value is not None else TrialState.PRUNED
        return optuna.trial.create_trial(
            state=state, value=value, params=dict(params), distributions=self._distributions, intermediate_values=rewards
        )

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        for _ in range(TRIES):
            asked = self._study.ask(self._distributions)
            settings = {key: json.loads(v) if isinstance(self._space[key], Choices) else v for key, v in asked.params.items()}
            name = space_lib.digest(settings)
            if name not in self._known:
                self._known.add(name)
                self._asked[trial_id] = asked
                return {"settings": json.dumps(settings)}
            self._study.tell(asked, state=TrialState.FAIL)
        return Searcher.FINISHED

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if "value" not in result and "error" not in result:  # the last one, which comes after its round's own
            self._asked[trial_id].report(result["reward"], result["round"])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        asked, value = self._asked.pop(trial_id), (result or {}).get("value")
        if error or "error" in (result or {}):
            self._study.tell(asked, state=TrialState.FAIL)
        elif value is None or math.isnan(value):
            self._study.tell(asked, state=TrialState.PRUNED)
        else:
            self._study.tell(asked, value)

    def save(self, checkpoint_path: str) -> None:
        """Ray's own state is not gone on with."""

    def restore(self, checkpoint_path: str) -> None:
        """As `save`."""


def distribution(dimension: Choices | Range) -> BaseDistribution:
    """A dimension of the space as Optuna names it; choices as JSON, since Optuna's are plain values."""
    if isinstance(dimension, Choices):
        return CategoricalDistribution([json.dumps(value) for value in dimension.values])
    kind = IntDistribution if dimension.whole else FloatDistribution
    return kind(dimension.low, dimension.high, log=dimension.log)
