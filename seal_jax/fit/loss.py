"""Next-token cross-entropy that never holds the whole logits and looks only where a label is: device code.

Gradients are computed in the forward pass, chunk by chunk, while the chunk's logits are at hand; no logits outlive their chunk.
Positions that carry a label are brought to the front, and the chunks behind them are not computed: prompts and padding cost nothing here.

`cross_entropy` is for many edits under one frozen output embedding: the positions of all of them make one row. `grouped_cross_entropy`
is for one model over many devices, whose output embedding may be trained: each group of positions stays on its device.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from seal_jax.parallel import mesh as mesh_lib


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int) -> jax.Array:
    """The sum over positions of weight x negative log likelihood in nats, a float32 scalar.

    `hidden` [T, D], `head` [V, D] (frozen: its gradient is not computed), `targets` [T] int32, `weights` [T] float32 (0: no label
    here). At most `chunk` positions have their logits in memory at a time, also under `jax.vmap`, over which `head` must be shared.
    """
    return _forward(hidden, head, targets, weights, chunk)[0]


def _forward(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int) -> tuple[jax.Array, Any]:
    nll, gradient = _merged(chunk)(hidden, head, targets, weights)
    return jnp.sum(nll), gradient


def _backward(chunk: int, gradient: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, None, None, None]:
    return (gradient * cotangent.astype(gradient.dtype), None, None, None)


cross_entropy.defvjp(_forward, _backward)


@functools.cache
def _merged(chunk: int) -> Any:
    """`_positions`, for which a `vmap` over edits makes one longer row of positions instead of a loop of loops."""

    @custom_vmap
    def call(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _positions(hidden, head, targets, weights, chunk)

    @call.def_vmap
    def rule(size: int, batched: list[bool], hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> Any:
        if batched[1]:
            raise NotImplementedError("cross_entropy: the head is shared by all that jax.vmap maps over")
        each = [
            x if b else jnp.broadcast_to(x, (size, *x.shape))
            for x, b in zip((hidden, targets, weights), (batched[0], *batched[2:]), strict=True)
        ]
        hidden, targets, weights = (x.reshape(-1, *x.shape[2:]) for x in each)
        nll, gradient = call(hidden, head, targets, weights)
        return (nll.reshape(size, -1), gradient.reshape(size, -1, gradient.shape[-1])), (True, True)

    return call


def _positions(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Per position, weight x nll [T] float32 and its gradient with respect to the hidden state [T, D]."""
    # XLA's partitioner for TPUs aborts on gathers from rows that are dealt out, of edits on several shards (seen with libtpu 0.0.52).
    hidden, targets, weights = mesh_lib.gathered((hidden, targets, weights))
    count = hidden.shape[0]
    size = min(chunk, count)
    labelled = weights != 0
    order = jnp.argsort(~labelled, stable=True)
    order = jnp.pad(order, (0, -count % size), constant_values=count)  # past the end: reads nothing, writes nowhere

    def part(i: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        here = jax.lax.dynamic_slice_in_dim(order, i * size, size)
        x, y, w = (jnp.take(v, here, axis=0, mode="fill", fill_value=0) for v in (hidden, targets, weights))
        nll, gradient = _chunk(x, head, y, w)
        return found[0].at[here].set(nll, mode="drop"), found[1].at[here].set(gradient, mode="drop")

    chunks = (jnp.sum(labelled) + size - 1) // size
    return jax.lax.fori_loop(0, chunks, part, (jnp.zeros(count, jnp.float32), jnp.zeros_like(hidden)))


def _chunk(x: jax.Array, head: jax.Array, y: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    with jax.named_scope("loss"):
        logits = jnp.einsum("td,vd->tv", x.astype(head.dtype), head, preferred_element_type=jnp.float32)
        top = jnp.max(logits, axis=-1, keepdims=True)
        exp = jnp.exp(logits - top)
        total = jnp.sum(exp, axis=-1, keepdims=True)
        picked = jnp.take_along_axis(logits, y[:, None], axis=-1)
        nll = (jnp.log(total) + top - picked)[:, 0]
        # d nll / d logits = softmax - onehot; the one-hot part is a gather of the head's rows.
        slope = (exp * (w[:, None] / total)).astype(head.dtype)
        gradient = jnp.einsum("tv,vd->td", slope, head, preferred_element_type=jnp.float32)
        gradient = gradient - w[:, None] * jnp.take(head, y, axis=0).astype(jnp.float32)
        return nll * w, gradient.astype(x.dtype)


# --- One model, groups of positions ----------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def grouped_cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int, train_head: bool
) -> jax.Array:
    """The sum over groups and positions of weight x negative log likelihood in nats, a float32 scalar.

    `hidden` [G, T, D], `head` [V, D], `targets` [G, T] int32, `weights` [G, T] float32 (0: no label here). Each group is worked on by
    itself, so that nothing but the head's gradient crosses groups; at most `chunk` positions of each have their logits in memory at a
    time. With `train_head`, the gradient of `head` is added up over the chunks in float32; without, `head` is frozen and gets none.
    """
    return _grouped(hidden, head, targets, weights, chunk, train_head)[0]


def _grouped_forward(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int, train_head: bool
) -> tuple[jax.Array, Any]:
    loss, slope, head_slope = _grouped(hidden, head, targets, weights, chunk, train_head)
    return loss, (slope, None if head_slope is None else head_slope.astype(head.dtype))


def _grouped_backward(chunk: int, train_head: bool, slopes: Any, cotangent: jax.Array) -> tuple[Any, Any, None, None]:
    slope, head_slope = jax.tree.map(lambda g: g * cotangent.astype(g.dtype), slopes)
    return slope, head_slope, None, None


grouped_cross_entropy.defvjp(_grouped_forward, _grouped_backward)


def _grouped(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int, train_head: bool
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The loss, its gradient with respect to the hidden states [G, T, D], and that with respect to the head [V, D] float32."""
    count, width = hidden.shape[1:]
    size = min(chunk, count)
    labelled = weights != 0
    order = jnp.argsort(~labelled, axis=1, stable=True)
    order = jnp.pad(order, ((0, 0), (0, -count % size)), constant_values=count)  # past the end: reads nothing, writes nowhere
    read = jax.vmap(lambda v, here: jnp.take(v, here, axis=0, mode="fill", fill_value=0))
    write = jax.vmap(lambda v, here, new: v.at[here].set(new, mode="drop"))

    def part(i: jax.Array, found: Any) -> Any:
        loss, slope, head_slope = found
        here = jax.lax.dynamic_slice_in_dim(order, i * size, size, axis=1)
        x, y, w = (read(v, here) for v in (hidden, targets, weights))
        flat = x.reshape(-1, width), head, y.ravel(), w.ravel()
        if train_head:
            nll, gradient, more = _chunk_trained(*flat)
            head_slope = head_slope + more
        else:
            nll, gradient = _chunk(*flat)
        return loss + jnp.sum(nll), write(slope, here, gradient.reshape(x.shape)), head_slope

    chunks = (jnp.max(jnp.sum(labelled, axis=1)) + size - 1) // size
    start = jnp.zeros((), jnp.float32), jnp.zeros_like(hidden), jnp.zeros(head.shape, jnp.float32) if train_head else None
    return jax.lax.fori_loop(0, chunks, part, start)


def _chunk_trained(x: jax.Array, head: jax.Array, y: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weight x nll [t] float32, and its gradients with respect to `x` [t, D] and to the head [V, D] float32."""
    with jax.named_scope("loss"):
        logits = jnp.einsum("td,vd->tv", x.astype(head.dtype), head, preferred_element_type=jnp.float32)
        log_p = jax.nn.log_softmax(logits, axis=-1)
        # By comparison and not by gather, which devices that share the vocabulary could not do each on its own part.
        picked = jnp.arange(head.shape[0])[None, :] == y[:, None]
        nll = -jnp.sum(jnp.where(picked, log_p, 0.0), axis=-1)
        slope = ((jnp.exp(log_p) - picked) * w[:, None]).astype(head.dtype)
        gradient = jnp.einsum("tv,vd->td", slope, head, preferred_element_type=jnp.float32)
        head_slope = jnp.einsum("tv,td->vd", slope, x.astype(head.dtype), preferred_element_type=jnp.float32)
        return nll * w, gradient.astype(x.dtype), head_slope
