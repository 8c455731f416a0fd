"""One optimiser step of many adapters at once: device code, pure functions.

Each edit in the step brings its own batch, learning rate, schedule, decay, clip and scale; `jax.vmap` maps the step of one adapter over
them, with the frozen parameters shared. Source: the inner loop of SEAL, `TTT_server.py` (HF Trainer with AdamW, linear decay,
clipping at 1.0), minus its loss on padding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from seal_jax.fit.loss import cross_entropy
from seal_jax.models import lora as lora_lib
from seal_jax.models.decoder import Decoder, head

SCHEDULES = ("constant", "linear", "cosine")
UNDECAYED = ("scale", "bias")  # leaves that weight decay leaves alone


class Hyper(NamedTuple):
    """What may differ between edits. Leaves are [K], or scalars inside the vmapped step."""

    learning_rate: jax.Array  # float32, the peak
    schedule: jax.Array  # int32, an index into SCHEDULES
    warmup_steps: jax.Array  # int32
    total_steps: jax.Array  # int32, warm-up included; the schedule reaches 0 there
    weight_decay: jax.Array  # float32, decoupled
    max_grad_norm: jax.Array  # float32; 0: no clipping
    scale: jax.Array  # float32, alpha / rank
    epoch_steps: jax.Array  # int32, optimiser steps of one epoch
    stop_loss: jax.Array  # float32, see `seal_jax.config.StopConfig`
    stop_gain: jax.Array  # float32
    patience: jax.Array  # int32


class Progress(NamedTuple):
    """What the rule for an early end looks at. Leaves are [K], or scalars inside the vmapped step."""

    ended: jax.Array  # bool: the edit takes no further step
    total: jax.Array  # float32, the sum of the epoch's losses so far
    best: jax.Array  # float32, the least mean loss of an epoch
    stale: jax.Array  # int32, epochs since that have not improved on it


class FitState(NamedTuple):
    """Adapters and optimisers of K slots; every leaf has a leading axis K."""

    lora: Any  # float32, see seal_jax.models.lora
    moments: optax.ScaleByAdamState  # count [K] int32, mu and nu as `lora`
    hyper: Hyper
    progress: Progress


class Report(NamedTuple):
    """What a step says of each of its M edits."""

    loss: jax.Array  # [M] float32, the mean over labels in nats; -1 where the edit had ended before
    ended: jax.Array  # [M] bool, after this step


class Batch(NamedTuple):
    """One optimiser step of M edits: B sequences of L tokens each. `weights` 0 marks "no label here"."""

    slots: jax.Array  # [M] int32; an index >= K is an idle row, whose result is dropped
    inputs: jax.Array  # [M, B, L] int32
    targets: jax.Array  # [M, B, L] int32, the token after each input
    weights: jax.Array  # [M, B, L] float32


def learning_rate(hyper: Hyper, step: jax.Array) -> jax.Array:
    """The rate at optimiser step `step` (from 0), as transformers' `get_scheduler` has it: linear warm-up, then the schedule."""
    step, warmup, total = (x.astype(jnp.float32) for x in (step, hyper.warmup_steps, hyper.total_steps))
    progress = jnp.clip((step - warmup) / jnp.maximum(total - warmup, 1.0), 0.0, 1.0)
    decay = jnp.select(
        [hyper.schedule == 0, hyper.schedule == 1], [jnp.ones_like(progress), 1.0 - progress], 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    )
    return hyper.learning_rate * jnp.where(step < warmup, step / jnp.maximum(warmup, 1.0), decay)


def watch(hyper: Hyper, progress: Progress, step: jax.Array, loss: jax.Array) -> Progress:
    """The progress after optimiser step `step` (from 0) with mean loss `loss`; whether the edit ends is decided at an epoch's end."""
    total = progress.total + loss
    mean = total / hyper.epoch_steps.astype(jnp.float32)
    over = (step + 1) % hyper.epoch_steps == 0
    better = mean < progress.best * (1.0 - hyper.stop_gain)
    stale = jnp.where(better, 0, progress.stale + 1)
    low = (hyper.stop_loss > 0) & (mean <= hyper.stop_loss)
    flat = (hyper.stop_gain > 0) & (stale >= hyper.patience)
    after = Progress(low | flat, jnp.zeros_like(total), jnp.minimum(mean, progress.best), stale)
    return jax.tree.map(lambda a, b: jnp.where(over, a, b), after, progress._replace(total=total))


def adapter_loss(
    decoder: Decoder, chunk: int, lora: Any, scale: jax.Array, params: Any, inputs: jax.Array, targets: jax.Array, weights: jax.Array
) -> jax.Array:
    """Summed weighted loss of one adapter on its sequences [B, L]."""
    hidden, _ = decoder.apply({"params": params, "lora": lora_lib.scaled(lora, scale)}, inputs)
    with jax.named_scope("loss"):
        return cross_entropy(hidden.reshape(-1, hidden.shape[-1]), head(params), targets.ravel(), weights.ravel(), chunk)


def gradient(decoder: Decoder, chunk: int, params: Any, lora: Any, scale: jax.Array, batch: Batch) -> tuple[jax.Array, Any]:
    """The mean loss over the labels of one adapter's batch, and its gradient."""
    gradient_of = jax.value_and_grad(lambda lora: adapter_loss(decoder, chunk, lora, scale, params, *batch[1:]))
    loss, summed = gradient_of(lora)
    labels = jnp.maximum(jnp.sum(batch.weights), 1.0)
    return loss / labels, jax.tree.map(lambda g: g / labels, summed)


def descend(hyper: Hyper, weights: Any, moments: optax.ScaleByAdamState, slope: Any) -> tuple[Any, optax.ScaleByAdamState]:
    """The float32 `weights` and `moments` after a step along `slope`: clipped by its norm, AdamW at the scheduled rate.

    Decay is of matrices alone, as in transformers' Trainer: not of the scales of norms, nor of biases (which adapters do not have).
    """
    rate = learning_rate(hyper, moments.count)
    clip = jnp.where(hyper.max_grad_norm > 0, hyper.max_grad_norm, jnp.inf)
    factor = jnp.minimum(1.0, clip / (optax.global_norm(slope) + 1e-6))
    direction, after = optax.scale_by_adam().update(jax.tree.map(lambda g: g * factor, slope), moments)

    def one(path: tuple[Any, ...], p: jax.Array, d: jax.Array) -> jax.Array:
        return p - rate * (d if path[-1].key in UNDECAYED else d + hyper.weight_decay * p)

    return jax.tree_util.tree_map_with_path(one, weights, direction), after


def update(decoder: Decoder, chunk: int, params: Any, edit: FitState, batch: Batch) -> tuple[FitState, Report]:
    """One optimiser step of one adapter: gradient of the mean loss, clip, AdamW. An edit that has ended stays as it is."""
    hyper, moments = edit.hyper, edit.moments
    loss, slope = gradient(decoder, chunk, params, edit.lora, hyper.scale, batch)
    lora, after = descend(hyper, edit.lora, moments, slope)
    new = FitState(lora, after, hyper, watch(hyper, edit.progress, moments.count, loss))
    new = jax.tree.map(lambda old, new: jnp.where(edit.progress.ended, old, new), edit, new)
    return new, Report(jnp.where(edit.progress.ended, -1.0, loss), new.progress.ended)


def step(decoder: Decoder, chunk: int, params: Any, state: FitState, batch: Batch) -> tuple[FitState, Report]:
    """One optimiser step of the M edits that `batch` names; the other slots are untouched."""
    edits = jax.tree.map(lambda x: jnp.take(x, batch.slots, axis=0, mode="clip"), state)
    edits, report = jax.vmap(lambda edit, part: update(decoder, chunk, params, edit, part))(edits, batch)
    return jax.tree.map(lambda old, new: old.at[batch.slots].set(new, mode="drop"), state, edits), report


def admit(state: FitState, slots: jax.Array, lora: Any, hyper: Hyper) -> FitState:
    """Fresh edits into `slots` [Q] (an index >= K is dropped): their initial adapters and hyperparameters [Q, ...], the rest as new."""
    fresh = empty_state(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), lora), len(slots))
    fresh = fresh._replace(lora=lora, hyper=hyper)
    return jax.tree.map(lambda old, new: old.at[slots].set(new, mode="drop"), state, fresh)


def empty_state(lora_shapes: Any, slots: int) -> FitState:
    """The state of `slots` edits before their first step, adapters zero; `lora_shapes` is the shape tree of one adapter."""
    zeros = lambda: jax.tree.map(lambda x: jnp.zeros((slots, *x.shape), x.dtype), lora_shapes)  # noqa: E731
    moments = optax.ScaleByAdamState(jnp.zeros(slots, jnp.int32), zeros(), zeros())
    integers = ("schedule", "warmup_steps", "total_steps", "epoch_steps", "patience")
    hyper = Hyper(**{name: jnp.zeros(slots, jnp.int32 if name in integers else jnp.float32) for name in Hyper._fields})
    progress = Progress(jnp.zeros(slots, bool), jnp.zeros(slots), jnp.full(slots, jnp.inf), jnp.zeros(slots, jnp.int32))
    return FitState(zeros(), moments, hyper, progress)
