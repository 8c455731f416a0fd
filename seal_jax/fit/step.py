"""One optimiser step of many adapters at once: device code, pure functions.

Each edit in the step brings its own batch, learning rate, schedule, decay, clip and scale; `jax.vmap` maps the gradient of one adapter
over them, with the frozen parameters shared. Source: the inner loop of SEAL, `TTT_server.py` (HF Trainer with AdamW, linear decay,
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
from seal_jax.parallel import mesh as mesh_lib

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
    anchor: jax.Array  # float32, see `penalty`
    orthogonal: jax.Array  # float32


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
    held: jax.Array | None = None  # [M] int32, which of the held adapters each edit stands on, where there are any


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


def penalty(hyper: Hyper, lora: Any, held: Any) -> jax.Array:
    """What keeps an edit from undoing what was learnt before; added to the loss.

    `anchor` weighs half the squared Frobenius norm of what the adapter adds to all the kernels: the L2 distance from the weights before,
    of the product a @ b and not of its factors. `orthogonal` weighs half the squared products of the columns of `a` with those of the held
    adapter's: edits read other directions of the input than earlier ones (O-LoRA, Wang et al. 2023).
    """

    def of(adapter: Any, before: Any) -> jax.Array:
        if "a" not in adapter:
            return sum(of(part, before.get(name, {})) for name, part in adapter.items())
        a, b = adapter["a"], adapter["b"]
        added = jnp.einsum("nir,nis->nrs", a, a) * jnp.einsum("nro,nso->nrs", b, b)  # the trace of (a @ b)^T (a @ b), without that product
        cost = hyper.anchor * hyper.scale**2 * jnp.sum(added)
        if "a" in before:
            cost += hyper.orthogonal * jnp.sum(jnp.einsum("nir,nis->nrs", before["a"], a) ** 2)
        return 0.5 * cost

    return of(lora, held or {})


def adapter_loss(
    decoder: Decoder, chunk: int, lora: Any, scale: jax.Array, before: Any, inputs: jax.Array, targets: jax.Array, weights: jax.Array
) -> jax.Array:
    """Summed weighted loss of one adapter on its sequences [B, L]. `before`: the frozen collections, `params` and perhaps `held`."""
    hidden, _ = decoder.apply({**before, "lora": lora_lib.scaled(lora, scale)}, inputs)
    with jax.named_scope("loss"):
        return cross_entropy(hidden.reshape(-1, hidden.shape[-1]), head(before["params"]), targets.ravel(), weights.ravel(), chunk)


def gradient(
    decoder: Decoder, chunk: int, params: Any, hyper: Hyper, lora: Any, batch: Batch, held: Any = None, penalised: bool = False
) -> tuple[jax.Array, Any]:
    """The mean loss over the labels of one adapter's batch, and the gradient of it and, with `penalised`, of the `penalty`.

    `held` (or None): the adapter on which this one stands.
    """
    before = {"params": params} if held is None else {"params": params, "held": held}
    arrays = (batch.inputs, batch.targets, batch.weights)
    labels = jnp.maximum(jnp.sum(batch.weights), 1.0)
    loss, slope = jax.value_and_grad(lambda lora: adapter_loss(decoder, chunk, lora, hyper.scale, before, *arrays) / labels)(lora)
    if penalised:
        slope = jax.tree.map(jnp.add, slope, jax.grad(penalty, argnums=1)(hyper, lora, held))
    return loss, slope


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


def step(
    decoder: Decoder, chunk: int, params: Any, state: FitState, batch: Batch, held: Any = None, penalised: bool = False
) -> tuple[FitState, Report]:
    """One optimiser step of the M edits that `batch` names, no slot twice: gradients, clip, AdamW. The other slots are untouched, and an
    edit that has ended stays as it is.

    `held`: adapters stacked [H, ...] with their scale folded in, among which `batch.held` chooses; None: there are none.
    `penalised`: whether any edit has a `penalty`; the reported loss is without.
    """
    weights = mesh_lib.as_adapters((state.lora, state.moments.mu, state.moments.nu))
    hyper, progress, count, lora = taken((state.hyper, state.progress, state.moments.count, weights[0]), batch.slots)

    def slopes(hyper: Hyper, lora: Any, part: Batch, base: Any) -> tuple[jax.Array, Any]:
        return gradient(decoder, chunk, params, hyper, lora, part, base, penalised)

    loss, slope = jax.vmap(slopes)(hyper, lora, batch, taken(held, batch.held))
    keep = lambda old, new: jnp.where(progress.ended, old, new)  # noqa: E731
    after = jax.tree.map(keep, progress, jax.vmap(watch)(hyper, progress, count, loss))
    rows = *mesh_lib.gathered_rows((batch.slots, progress.ended, hyper, count)), mesh_lib.as_adapters(mesh_lib.gathered_rows(slope))
    lora, mu, nu = jax.lax.platform_dependent(weights, rows, cpu=descend_together, default=descend_in_place)
    report = Report(keep(jnp.full_like(loss, -1.0), loss), after.ended)
    counts, after = put((state.moments.count, state.progress), batch.slots, (keep(count, count + 1), after))
    return FitState(lora, optax.ScaleByAdamState(counts, mu, nu), state.hyper, after), report


def taken(tree: Any, slots: jax.Array) -> Any:
    """The parts of `slots` [M], or of one slot. For an idle row (an index >= K) those of the last: what comes of it is dropped."""
    return jax.tree.map(lambda x: jnp.take(x, slots, axis=0, mode="clip"), tree)


def put(tree: Any, slots: jax.Array, rows: Any) -> Any:
    """`tree` with `rows` in the place of the parts of `slots` [M], but for those of idle rows."""
    return jax.tree.map(lambda old, new: old.at[slots].set(new, mode="drop"), tree, rows)


# Adapters and moments of all slots, and of each row its slot, whether its edit has ended, its hyperparameters, its count, its gradient.
Weights = tuple[Any, Any, Any]
Rows = tuple[jax.Array, jax.Array, Hyper, jax.Array, Any]


def _descended(own: Weights, ended: jax.Array, hyper: Hyper, count: jax.Array, slope: Any) -> Weights:
    """Adapter and moments of one edit after `descend`, or as they were if it has ended."""
    lora, moments = descend(hyper, own[0], optax.ScaleByAdamState(count, *own[1:]), slope)
    return jax.tree.map(lambda old, new: jnp.where(ended, old, new), own, (lora, moments.mu, moments.nu))


def descend_together(weights: Weights, rows: Rows) -> Weights:
    """Those of `rows` are taken out and descend, all at once, and are put back one after another.

    The loop puts them where they lie. One scatter would be fused with the steps that read the moments, so that XLA for CPUs copied the
    moments of all slots first, and twice; it does so too where it knows how often a loop runs.
    """
    slots, *rest = rows
    new, used_first = mesh_lib.as_adapters(jax.vmap(_descended)(taken(weights, slots), *rest)), jnp.argsort(slots)

    def one(i: jax.Array, weights: Weights) -> Weights:
        row = used_first[i]
        return mesh_lib.as_adapters(
            jax.tree.map(lambda old, x: jax.lax.dynamic_update_index_in_dim(old, x[row], slots[row], 0), weights, new)
        )

    return jax.lax.fori_loop(0, jnp.sum(slots < jax.tree.leaves(weights)[0].shape[0]), one, weights)


def descend_in_place(weights: Weights, rows: Rows) -> Weights:
    """The same, but each row is read, descends and is put back before the next. Taken out together, adapters and moments are in memory
    three times over, and XLA for GPUs lays all slots out anew for it; XLA for CPUs would copy them all here, for each row."""

    def one(weights: Weights, row: Rows) -> tuple[Weights, None]:
        slot, ended, *rest = row
        own = jax.lax.optimization_barrier(taken(weights, slot))  # read before it is written, or all would have to be kept to read from
        new = _descended(own, ended | (slot >= jax.tree.leaves(weights)[0].shape[0]), *rest)
        put_back = jax.tree.map(lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new, slot, 0), weights, new)
        return mesh_lib.as_adapters(put_back), None

    return jax.lax.scan(one, weights, rows)[0]


def admit(state: FitState, slots: jax.Array, lora: Any, hyper: Hyper) -> FitState:
    """Fresh edits into `slots` [Q] (an index >= K is dropped): their initial adapters and hyperparameters [Q, ...], the rest as new."""
    fresh = empty_state(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), lora), len(slots))
    fresh = fresh._replace(lora=lora, hyper=hyper)
    return put(state, slots, fresh)


def empty_state(lora_shapes: Any, slots: int) -> FitState:
    """The state of `slots` edits before their first step, adapters zero; `lora_shapes` is the shape tree of one adapter."""
    zeros = lambda: jax.tree.map(lambda x: jnp.zeros((slots, *x.shape), x.dtype), lora_shapes)  # noqa: E731
    moments = optax.ScaleByAdamState(jnp.zeros(slots, jnp.int32), zeros(), zeros())
    integers = ("schedule", "warmup_steps", "total_steps", "epoch_steps", "patience")
    hyper = Hyper(**{name: jnp.zeros(slots, jnp.int32 if name in integers else jnp.float32) for name in Hyper._fields})
    progress = Progress(jnp.zeros(slots, bool), jnp.zeros(slots), jnp.full(slots, jnp.inf, jnp.float32), jnp.zeros(slots, jnp.int32))
    return FitState(zeros(), moments, hyper, progress)
