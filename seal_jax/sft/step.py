"""One optimiser step of one model, of an adapter or of all its weights: device code, pure functions.

The weights that train are float32, and so are moments and sums of gradients over microbatches; products, and with them each microbatch's
gradients of kernels, are in the dtype of the model's weights. The gradient is of the mean loss over the labels of the whole step, added
up over its microbatches; clipping, AdamW and schedules are those of `seal_jax.fit.step`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from seal_jax.fit.loss import grouped_cross_entropy
from seal_jax.fit.step import Hyper, descend
from seal_jax.models import lora as lora_lib
from seal_jax.models.decoder import Decoder, head


class SftState(NamedTuple):
    """What trains, and its optimiser."""

    weights: Any  # float32: an adapter (see seal_jax.models.lora), or all parameters of the model
    moments: optax.ScaleByAdamState  # count int32, the steps taken; mu and nu as `weights`


class Rows(NamedTuple):
    """One optimiser step: A accumulated microbatches of R rows of L token slots. `weights` 0 marks "no label here"."""

    inputs: jax.Array  # [A, R, L] int32
    targets: jax.Array  # [A, R, L] int32, the token after each input
    weights: jax.Array  # [A, R, L] float32
    positions: jax.Array  # [A, R, L] int32, counted from the beginning of each sequence
    first: jax.Array  # [A, R, L] int32, where in the row the slot's sequence begins; padding sees itself alone


def start(weights: Any) -> SftState:
    """The state before the first step."""
    zeros = lambda: jax.tree.map(jnp.zeros_like, weights)  # noqa: E731
    return SftState(weights, optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros(), zeros()))


def computed(weights: Any, dtype: jnp.dtype) -> Any:
    """All parameters as they are computed with: the kernels in `dtype`.

    The rest stays float32: the embedding because the gradients of a token's every occurrence are added up in its dtype, and norms and
    biases because the decoder converts them itself.
    """
    cast = lambda path, x: x.astype(dtype) if path[-1].key == "kernel" else x  # noqa: E731
    return jax.tree_util.tree_map_with_path(cast, weights)


def summed_loss(
    decoder: Decoder, chunk: int, groups: int, dtype: jnp.dtype | None, frozen: Any, weights: Any, scale: jax.Array, rows: Rows
) -> jax.Array:
    """The summed loss of one microbatch; its leaves are [R, L], of which each of `groups` data shards has R / groups rows.

    `dtype` None: `weights` is an adapter of the `frozen` parameters, with `scale` = alpha / rank. Otherwise `weights` are all parameters
    as `computed`, and `dtype` is that of the output embedding's products.
    """
    if dtype is None:
        params, variables = frozen, {"params": frozen, "lora": lora_lib.scaled(weights, scale)}
        output = head(params)
    else:
        params, variables = weights, {"params": weights}
        output = head(params).astype(dtype)
    hidden, _ = decoder.apply(variables, rows.inputs, rows.positions, first=rows.first)
    with jax.named_scope("loss"):
        hidden, targets, labels = (x.reshape(groups, -1, *x.shape[2:]) for x in (hidden, rows.targets, rows.weights))
        return grouped_cross_entropy(hidden, output, targets, labels, chunk, dtype is not None)


def step(
    decoder: Decoder, chunk: int, groups: int, dtype: jnp.dtype | None, frozen: Any, state: SftState, hyper: Hyper, rows: Rows
) -> tuple[SftState, jax.Array]:
    """One optimiser step; leaves of `hyper` are scalars. Returns the mean loss over the step's labels in nats, float32, as well."""
    weights = state.weights if dtype is None else computed(state.weights, dtype)

    def slope_of(part: Rows) -> tuple[jax.Array, Any]:
        loss, slope = jax.value_and_grad(lambda w: summed_loss(decoder, chunk, groups, dtype, frozen, w, hyper.scale, part))(weights)
        return loss, jax.tree.map(lambda g: g.astype(jnp.float32), slope)

    if rows.inputs.shape[0] == 1:
        loss, slope = slope_of(jax.tree.map(lambda x: x[0], rows))
    else:

        def add(total: Any, part: Rows) -> tuple[Any, None]:
            # All steps have as many microbatches as the largest one needs: those that are empty cost nothing.
            more = lambda: jax.tree.map(jnp.add, total, slope_of(part))  # noqa: E731
            return jax.lax.cond(jnp.any(part.weights != 0), more, lambda: total), None

        zero = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.weights)
        (loss, slope), _ = jax.lax.scan(add, zero, rows)
    labels = jnp.maximum(jnp.sum(rows.weights), 1.0)
    return SftState(*descend(hyper, state.weights, state.moments, jax.tree.map(lambda g: g / labels, slope))), loss / labels
