"""Next-token cross-entropy that never holds the whole logits: device code.

The output embedding is frozen wherever this is used, so the gradient with respect to the hidden states is computed in the forward
pass, chunk by chunk, while the chunk's logits are at hand; nothing of the size of the vocabulary outlives its chunk.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp


def _chunks(hidden: jax.Array, targets: jax.Array, weights: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    count = hidden.shape[0]
    pad = -count % size

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape((count + pad) // size, size, *x.shape[1:])

    return split(hidden), split(targets), split(weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int) -> jax.Array:
    """The sum over positions of weight x negative log likelihood in nats, a float32 scalar.

    `hidden` [T, D], `head` [V, D] (frozen: its gradient is not computed), `targets` [T] int32, `weights` [T] float32 (0: no label
    here). At most `chunk` positions have their logits in memory at a time.
    """
    return _forward(hidden, head, targets, weights, chunk)[0]


def _forward(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int) -> tuple[jax.Array, Any]:
    def one(carry: None, part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        x, y, w = part
        logits = jnp.einsum("td,vd->tv", x, head.astype(x.dtype), preferred_element_type=jnp.float32)
        top = jnp.max(logits, axis=-1, keepdims=True)
        exp = jnp.exp(logits - top)
        total = jnp.sum(exp, axis=-1, keepdims=True)
        picked = jnp.take_along_axis(logits, y[:, None], axis=-1)
        nll = (jnp.log(total) + top - picked)[:, 0]
        # d nll / d logits = softmax - onehot; the one-hot part is a gather of the head's rows.
        slope = (exp * (w[:, None] / total)).astype(x.dtype)
        gradient = jnp.einsum("tv,vd->td", slope, head.astype(x.dtype), preferred_element_type=jnp.float32)
        gradient = gradient - w[:, None] * jnp.take(head, y, axis=0).astype(jnp.float32)
        return carry, (jnp.sum(nll * w), gradient.astype(x.dtype))

    size = min(chunk, hidden.shape[0])
    parts = _chunks(hidden, targets, weights, size)
    if parts[0].shape[0] == 1:
        _, (loss, gradient) = one(None, jax.tree.map(lambda x: x[0], parts))
    else:
        _, (loss, gradient) = jax.lax.scan(one, None, parts)
        loss, gradient = jnp.sum(loss), gradient.reshape(-1, hidden.shape[1])[: hidden.shape[0]]
    return loss, gradient


def _backward(chunk: int, gradient: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, None, None, None]:
    return (gradient * cotangent.astype(gradient.dtype), None, None, None)


cross_entropy.defvjp(_forward, _backward)
