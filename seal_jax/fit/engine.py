"""The inner loop for many edits: plans on the host, runs `step` on the device, and never waits for it until the end.

Each edit is a `FitJob` with its own data and hyperparameters. They are fitted in `slots` slots of one stacked state; see
`seal_jax.fit.plan` for who trains when and `seal_jax.fit.step` for what a step computes. An edit's result depends on its job alone.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax import rng
from seal_jax.config import FitConfig, LoraConfig
from seal_jax.fit import plan
from seal_jax.fit import step as step_lib
from seal_jax.models import lora as lora_lib
from seal_jax.models.decoder import Decoder

ADMIT = 8  # edits whose initial adapters are made at once
AHEAD = 8  # steps issued beyond the one whose end the progress waits for, so that the device never waits for the host
LOSS_POSITIONS = 1024  # positions, over all rows of a step, whose logits are in memory at once


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A tokenised training sequence: `ids`, with a loss on those from index `loss_from` on (at least 1: nothing predicts the first)."""

    ids: tuple[int, ...]
    loss_from: int = 1


@dataclasses.dataclass(frozen=True)
class FitJob:
    """One edit to fit. `key` names its random draws (`seal_jax.rng`): the initial adapter and the epoch orders."""

    key: tuple[str | int, ...]
    sequences: tuple[Tokens, ...]
    config: FitConfig


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The adapters of J jobs, stacked and on the device, with what the fit measured."""

    lora: Any  # leaves [>= J, ...] float32; entries past J are padding
    scale: np.ndarray  # [J] float32
    losses: list[np.ndarray]  # per job, the mean loss over labels in nats of each optimiser step, float32
    waste: plan.Waste


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3,))
def _step(decoder: Decoder, chunk: int, params: Any, state: step_lib.FitState, batch: step_lib.Batch) -> Any:
    return step_lib.step(decoder, chunk, params, state, batch)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _initial(spec: Any, rank: int, targets: tuple[str, ...], keys: jax.Array, active: jax.Array) -> Any:
    return jax.vmap(lambda key, used: lora_lib.init(jax.random.wrap_key_data(key), spec, rank, targets, used))(keys, active)


_admit = jax.jit(step_lib.admit, donate_argnums=(0,))


@functools.partial(jax.jit, donate_argnums=(0,))
def _collect(out: Any, state_lora: Any, slots: jax.Array, jobs: jax.Array) -> Any:
    return jax.tree.map(lambda o, x: o.at[jobs].set(jnp.take(x, slots, axis=0, mode="clip"), mode="drop"), out, state_lora)


@functools.partial(jax.jit, static_argnums=(1,))
def _zeros(shapes: Any, count: int) -> Any:
    return jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), shapes)


def total_steps(job: FitJob) -> int:
    """The optimiser steps of a job."""
    c = job.config
    steps = c.epochs * -(-len(job.sequences) // c.batch_size)
    return steps if c.max_steps is None else min(steps, c.max_steps)


def hyper(jobs: Sequence[FitJob]) -> step_lib.Hyper:
    """The jobs' hyperparameters as arrays [J]."""
    c = [job.config for job in jobs]
    f32, i32 = (lambda x: np.asarray(x, np.float32)), (lambda x: np.asarray(x, np.int32))
    return step_lib.Hyper(
        learning_rate=f32([x.learning_rate for x in c]),
        schedule=i32([step_lib.SCHEDULES.index(x.schedule) for x in c]),
        warmup_steps=i32([x.warmup_steps for x in c]),
        total_steps=i32([total_steps(job) for job in jobs]),
        weight_decay=f32([x.weight_decay for x in c]),
        max_grad_norm=f32([x.max_grad_norm for x in c]),
        scale=f32([x.lora.alpha / x.lora.rank for x in c]),
    )


def _pad(values: Sequence[int], size: int, fill: int) -> np.ndarray:
    return np.asarray([*values, *[fill] * (size - len(values))], np.int32)


class FitEngine:
    """Fits jobs whose LoRA targets and batch size are the same; everything else may differ from job to job.

    `params` are an argument of `fit`, so that one engine serves every policy of a run without compiling again.
    """

    def __init__(
        self,
        decoder: Decoder,
        lora: LoraConfig,
        *,
        slots: int,
        tokens_per_step: int,
        batch_size: int = 1,
        microbatch: int | None = None,
        lengths: Sequence[int] = plan.LENGTHS,
    ):
        self.decoder = decoder
        self.rank, self.targets = lora.rank, tuple(lora.targets)
        self.slots, self.tokens_per_step, self.lengths = slots, tokens_per_step, tuple(lengths)
        self.batch_size, self.microbatch = batch_size, min(microbatch or batch_size, batch_size)
        shape = functools.partial(lora_lib.init, jax.random.key(0), decoder.spec, self.rank, self.targets)
        self.adapter_shapes = jax.eval_shape(shape)

    def fit(self, params: Any, jobs: Sequence[FitJob], *, seed: int = 0, progress: Callable[[int], None] | None = None) -> Fitted:
        """Fits every job from a fresh adapter. `progress` is called with the number of real tokens of each step that ended.

        Raises ValueError for a job without sequences or with another rank, targets or batch size than the engine's.
        """
        for job in jobs:
            self._check(job)
        orders = [
            plan.epoch_orders(
                len(job.sequences), job.config.epochs, job.config.batch_size, rng.generator(seed, *job.key, "order"), job.config.max_steps
            )
            for job in jobs
        ]
        lengths = [
            [plan.padded_length(max(len(job.sequences[i].ids) - 1 for i in step), self.lengths) for step in order]
            for job, order in zip(jobs, orders, strict=True)
        ]
        room = -(-len(jobs) // ADMIT) * ADMIT if len(jobs) > 1 else 1
        slots = min(self.slots, room)
        state = _zeros_state(self.adapter_shapes, slots)
        out = _zeros(self.adapter_shapes, room)
        scalars, waste, issued = hyper(jobs), plan.Waste(), []
        pending: collections.deque[tuple[jax.Array, int]] = collections.deque()
        for action in plan.schedule(lengths, slots, self.batch_size, self.tokens_per_step):
            if isinstance(action, plan.Admit):
                state = self._admit(state, action, jobs, scalars, seed)
            elif isinstance(action, plan.Retire):
                index = [_pad(x, slots, fill) for x, fill in ((action.slots, 0), (action.edits, 1 << 30))]
                out = _collect(out, state.lora, *jax.device_put(index))
            else:
                batch, real = self._batch(action, jobs, orders)
                chunk = max(16, LOSS_POSITIONS // action.rows)
                state, losses = _step(self.decoder, chunk, params, state, batch)
                issued.append((action, losses))
                waste.slots, waste.tokens, waste.steps = waste.slots + batch.inputs.size, waste.tokens + real, waste.steps + 1
                if progress is not None:
                    pending.append((losses, real))
                    if len(pending) > AHEAD:
                        _report(pending.popleft(), progress)
        while progress is not None and pending:
            _report(pending.popleft(), progress)
        return Fitted(out, scalars.scale, _losses(issued, orders), waste)

    def _check(self, job: FitJob) -> None:
        c = job.config
        if not job.sequences:
            raise ValueError(f"job {job.key}: nothing to train on")
        if c.lora.rank > self.rank or tuple(c.lora.targets) != self.targets or c.batch_size > self.batch_size:
            raise ValueError(f"job {job.key}: rank, targets or batch size do not fit this engine")

    def _admit(
        self, state: step_lib.FitState, action: plan.Admit, jobs: Sequence[FitJob], scalars: step_lib.Hyper, seed: int
    ) -> step_lib.FitState:
        for i in range(0, len(action.edits), ADMIT):
            edits, slots = list(action.edits[i : i + ADMIT]), action.slots[i : i + ADMIT]
            size = 1 if len(state.hyper.scale) == 1 else ADMIT
            edits += [edits[-1]] * (size - len(edits))
            keys = np.stack([rng.words(seed, *jobs[e].key, "adapter") for e in edits])
            active = np.asarray([jobs[e].config.lora.rank for e in edits], np.int32)
            lora = _initial(self.decoder.spec, self.rank, self.targets, *jax.device_put((keys, active)))
            rates = jax.tree.map(lambda x, e=edits: x[np.asarray(e)], scalars)
            state = _admit(state, *jax.device_put((_pad(slots, size, 1 << 30), lora, rates)))
        return state

    def _batch(self, action: plan.Step, jobs: Sequence[FitJob], orders: Sequence[Sequence[Sequence[int]]]) -> tuple[step_lib.Batch, int]:
        """The step's arrays, and how many of its token slots are real."""
        shape = (action.rows, self.batch_size, action.length)
        inputs, targets, weights = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        real = 0
        for row, (edit, number) in enumerate(zip(action.edits, action.numbers, strict=True)):
            for place, index in enumerate(orders[edit][number]):
                sequence = jobs[edit].sequences[index]
                ids, count = np.asarray(sequence.ids, np.int32), len(sequence.ids) - 1
                inputs[row, place, :count], targets[row, place, :count] = ids[:-1], ids[1:]
                weights[row, place, max(sequence.loss_from, 1) - 1 : count] = 1.0
                real += count
        split = (action.rows, -(-self.batch_size // self.microbatch), self.microbatch, action.length)
        short = split[1] * split[2] - self.batch_size
        arrays = [np.pad(x, ((0, 0), (0, short), (0, 0))).reshape(split) for x in (inputs, targets, weights)]
        return jax.device_put(step_lib.Batch(_pad(action.slots, action.rows, 1 << 30), *arrays)), real


@functools.partial(jax.jit, static_argnums=(1,))
def _zeros_state(shapes: Any, slots: int) -> step_lib.FitState:
    return step_lib.empty_state(shapes, slots)


def _report(step: tuple[jax.Array, int], progress: Callable[[int], None]) -> None:
    step[0].block_until_ready()
    progress(step[1])


def _losses(issued: Sequence[tuple[plan.Step, jax.Array]], orders: Sequence[Sequence[Any]]) -> list[np.ndarray]:
    losses = [np.zeros(len(order), np.float32) for order in orders]
    values = jax.device_get([x for _, x in issued])
    for (action, _), row in zip(issued, values, strict=True):
        for edit, number, value in zip(action.edits, action.numbers, row, strict=False):
            losses[edit][number] = value
    return losses
