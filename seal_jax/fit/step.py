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


class Hyper(NamedTuple):
    """What may differ between edits. Leaves are [K], or scalars inside the vmapped step."""

    learning_rate: jax.Array  # float32, the peak
    schedule: jax.Array  # int32, an index into SCHEDULES
    warmup_steps: jax.Array  # int32
    total_steps: jax.Array  # int32, warm-up included; the schedule reaches 0 there
    weight_decay: jax.Array  # float32, decoupled
    max_grad_norm: jax.Array  # float32; 0: no clipping
    scale: jax.Array  # float32, alpha / rank


class FitState(NamedTuple):
    """Adapters and optimisers of K slots; every leaf has a leading axis K."""

    lora: Any  # float32, see seal_jax.models.lora
    moments: optax.ScaleByAdamState  # count [K] int32, mu and nu as `lora`
    hyper: Hyper


class Batch(NamedTuple):
    """One optimiser step of M edits: A accumulated microbatches of B sequences of L tokens. `weights` 0 marks "no label here"."""

    slots: jax.Array  # [M] int32; an index >= K is an idle row, whose result is dropped
    inputs: jax.Array  # [M, A, B, L] int32
    targets: jax.Array  # [M, A, B, L] int32, the token after each input
    weights: jax.Array  # [M, A, B, L] float32


def learning_rate(hyper: Hyper, step: jax.Array) -> jax.Array:
    """The rate at optimiser step `step` (from 0), as transformers' `get_scheduler` has it: linear warm-up, then the schedule."""
    step, warmup, total = (x.astype(jnp.float32) for x in (step, hyper.warmup_steps, hyper.total_steps))
    progress = jnp.clip((step - warmup) / jnp.maximum(total - warmup, 1.0), 0.0, 1.0)
    decay = jnp.select(
        [hyper.schedule == 0, hyper.schedule == 1], [jnp.ones_like(progress), 1.0 - progress], 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    )
    return hyper.learning_rate * jnp.where(step < warmup, step / jnp.maximum(warmup, 1.0), decay)


def adapter_loss(
    decoder: Decoder, chunk: int, lora: Any, scale: jax.Array, params: Any, inputs: jax.Array, targets: jax.Array, weights: jax.Array
) -> jax.Array:
    """Summed weighted loss of one adapter on one microbatch [B, L]."""
    hidden, _ = decoder.apply({"params": params, "lora": lora_lib.scaled(lora, scale)}, inputs)
    with jax.named_scope("loss"):
        return cross_entropy(hidden.reshape(-1, hidden.shape[-1]), head(params), targets.ravel(), weights.ravel(), chunk)


def update(
    decoder: Decoder, chunk: int, params: Any, lora: Any, moments: optax.ScaleByAdamState, hyper: Hyper, batch: Batch
) -> tuple[Any, optax.ScaleByAdamState, jax.Array]:
    """One optimiser step of one adapter: gradient of the mean loss over the labels, clip, AdamW. Returns the loss too."""
    gradient_of = jax.value_and_grad(lambda *args: adapter_loss(decoder, chunk, *args))
    arrays = (batch.inputs, batch.targets, batch.weights)  # [A, B, L]
    if batch.inputs.shape[0] == 1:
        loss, gradient = gradient_of(lora, hyper.scale, params, *(x[0] for x in arrays))
    else:

        def accumulate(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient_of(lora, hyper.scale, params, *part)), None

        zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, lora))
        (loss, gradient), _ = jax.lax.scan(accumulate, zero, arrays)
    labels = jnp.maximum(jnp.sum(batch.weights), 1.0)
    loss, gradient = loss / labels, jax.tree.map(lambda g: g / labels, gradient)
    rate = learning_rate(hyper, moments.count)
    clip = jnp.where(hyper.max_grad_norm > 0, hyper.max_grad_norm, jnp.inf)
    gradient = jax.tree.map(lambda g: g * jnp.minimum(1.0, clip / (optax.global_norm(gradient) + 1e-6)), gradient)
    direction, moments = optax.scale_by_adam().update(gradient, moments)
    lora = jax.tree.map(lambda p, d: p - rate * (d + hyper.weight_decay * p), lora, direction)
    return lora, moments, loss


def step(decoder: Decoder, chunk: int, params: Any, state: FitState, batch: Batch) -> tuple[FitState, jax.Array]:
    """One optimiser step of the M edits that `batch` names; the other slots are untouched. Losses [M] float32."""
    gather = lambda tree: jax.tree.map(lambda x: jnp.take(x, batch.slots, axis=0, mode="clip"), tree)  # noqa: E731
    lora, moments, losses = jax.vmap(lambda lora, moments, hyper, part: update(decoder, chunk, params, lora, moments, hyper, part))(
        gather(state.lora), gather(state.moments), gather(state.hyper), batch
    )
    put = lambda old, new: jax.tree.map(lambda o, n: o.at[batch.slots].set(n, mode="drop"), old, new)  # noqa: E731
    return FitState(put(state.lora, lora), put(state.moments, moments), state.hyper), losses


def admit(state: FitState, slots: jax.Array, lora: Any, hyper: Hyper) -> FitState:
    """Fresh edits into `slots` [Q] (an index >= K is dropped): their initial adapters and hyperparameters [Q, ...], moments zero."""
    put = lambda old, new: jax.tree.map(lambda o, n: o.at[slots].set(n, mode="drop"), old, new)  # noqa: E731
    zeros = jax.tree.map(lambda x: jnp.zeros((len(slots), *x.shape[1:]), x.dtype), state.moments)
    return FitState(put(state.lora, lora), put(state.moments, zeros), put(state.hyper, hyper))


def empty_state(lora_shapes: Any, slots: int) -> FitState:
    """A state of zeros for `slots` edits; `lora_shapes` is the shape tree of one adapter."""
    lora = jax.tree.map(lambda x: jnp.zeros((slots, *x.shape), x.dtype), lora_shapes)
    moments = optax.ScaleByAdamState(jnp.zeros(slots, jnp.int32), lora, jax.tree.map(jnp.zeros_like, lora))
    floats, ints = jnp.zeros(slots, jnp.float32), jnp.zeros(slots, jnp.int32)
    return FitState(jax.tree.map(jnp.copy, lora), moments, Hyper(floats, ints, ints, ints, floats, floats, floats))
