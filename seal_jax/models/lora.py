"""Low-rank adapters: y = x @ W + (alpha / rank) * x @ a @ b (Hu et al. 2021, as in PEFT).

An adapter is a nested dict that follows the decoder's parameters and holds `a` [N, in, r] and `b` [N, r, out], float32, for the
targeted projections alone. The factor alpha / rank is kept beside the tree; `scaled` multiplies it into `b`, which is how the decoder
wants the collection `lora`. A rank below the tree's r is a number of columns of `a` that are zero: their gradients, and so their
moments and updates, are exactly zero from the first step on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax.models.spec import DecoderSpec

GROUPS = {
    "q_proj": "attn",
    "k_proj": "attn",
    "v_proj": "attn",
    "o_proj": "attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}


def dimensions(spec: DecoderSpec, target: str) -> tuple[int, int]:
    """(in, out) of the projection `target`."""
    d, f, q, kv = spec.hidden_size, spec.intermediate_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    return {
        "q_proj": (d, q),
        "k_proj": (d, kv),
        "v_proj": (d, kv),
        "o_proj": (q, d),
        "gate_proj": (d, f),
        "up_proj": (d, f),
        "down_proj": (f, d),
    }[target]


def init(key: jax.Array, spec: DecoderSpec, rank: int, targets: Sequence[str], active: jax.Array | int | None = None) -> Any:
    """A fresh adapter with PEFT's initialisation: `a` uniform in +-1/sqrt(in) (Kaiming, a = sqrt 5), `b` zero.

    `active` (default `rank`) is the number of rank columns in use; it may be traced. A column depends on the key, its target and its
    number alone, so that the columns in use are the same whatever `rank` and the other targets are.
    """
    used = jnp.arange(rank) < (rank if active is None else active)
    tree: dict[str, Any] = {}
    for target in sorted(set(targets), key=list(GROUPS).index):
        width, features = dimensions(spec, target)
        here = jax.random.fold_in(key, list(GROUPS).index(target))

        def column(number: jax.Array, here: jax.Array = here, width: int = width) -> jax.Array:
            bound = 1.0 / math.sqrt(width)
            return jax.random.uniform(jax.random.fold_in(here, number), (spec.num_layers, width), jnp.float32, -bound, bound)

        a = jax.vmap(column, out_axes=-1)(jnp.arange(rank))
        tree.setdefault(GROUPS[target], {})[target] = {
            "a": jnp.where(used, a, 0.0),
            "b": jnp.zeros((spec.num_layers, rank, features), jnp.float32),
        }
    return {"layers": tree}


def count(spec: DecoderSpec, rank: int, targets: Sequence[str]) -> int:
    """Parameters of one adapter."""
    return spec.num_layers * rank * sum(sum(dimensions(spec, target)) for target in set(targets))


def scaled(lora: Any, scale: jax.Array | float) -> Any:
    """The adapter with `scale` (alpha / rank, a scalar) multiplied into `b`: the collection that the decoder applies."""

    def multiply(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return leaf * scale if path[-1].key == "b" else leaf

    return jax.tree_util.tree_map_with_path(multiply, lora)


def concatenate(adapters: Sequence[Any]) -> Any:
    """Adapters as one of the summed ranks: a1 @ b1 + a2 @ b2 = [a1 a2] @ [b1; b2]. With scales folded in, or of equal alpha / rank.

    Leaves may be stacked [E, ...] over edits, and be numpy or JAX arrays.
    """

    def join(path: tuple[Any, ...], *parts: Any) -> Any:
        library = np if all(isinstance(part, np.ndarray) for part in parts) else jnp
        return library.concatenate(parts, axis=-1 if path[-1].key == "a" else -2)

    return jax.tree_util.tree_map_with_path(join, *adapters)


def merge(params: Any, lora: Any, scale: jax.Array | float) -> Any:
    """`params` with the adapter added to the kernels, in float32 and rounded once to the kernels' dtype."""

    def add(tree: Any, adapter: Any) -> Any:
        if "a" in adapter:
            delta = jnp.einsum("nir,nro->nio", adapter["a"], adapter["b"], precision=jax.lax.Precision.HIGHEST) * scale
            return {**tree, "kernel": (tree["kernel"].astype(jnp.float32) + delta).astype(tree["kernel"].dtype)}
        return {**tree, **{name: add(tree[name], part) for name, part in adapter.items()}}

    return add(params, lora)
