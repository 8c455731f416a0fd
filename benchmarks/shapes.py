"""The models that are measured, with weights made on the device, and what their work costs: operations and bytes, counted by hand."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from seal_jax.config import LoraConfig, ModelConfig
from seal_jax.models import lora as lora_lib
from seal_jax.models.shapes import published
from seal_jax.models.spec import DecoderSpec
from seal_jax.models.tree import leaves, nest
from seal_jax.parallel import mesh as mesh_lib

# Without end tokens: what random weights say should not end early.
SHAPES = {name: dataclasses.replace(published(name), eos_ids=(), bos_id=None) for name in ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b")}
SHAPES["tiny"] = dataclasses.replace(
    SHAPES["qwen2.5-0.5b"],
    **{"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16},
)


def load(name: str, dtype: jnp.dtype, seed: int = 0) -> tuple[DecoderSpec, Any]:
    """(spec, params): the shape `name` with random weights, or "embedded", or whatever else `load_model` knows."""
    if name in SHAPES:
        return SHAPES[name], mesh_lib.laid_out(random_params(SHAPES[name], dtype, seed), mesh_lib.single())
    from seal_jax.models.load import load_model  # reads every format, and so needs more packages than the shapes do

    model = load_model(ModelConfig(name, str(dtype)))
    return model.spec, model.params


def random_params(spec: DecoderSpec, dtype: jnp.dtype, seed: int = 0) -> Any:
    """Normal weights of deviation 0.02 and norms near 1, each leaf made where it stays."""
    key = jax.random.key(seed, impl="rbg")  # threefry would take longer than the benchmark's first case
    flat = {}
    for number, leaf in enumerate(leaves(spec)):
        flat[leaf.path] = _leaf(jax.random.fold_in(key, number), leaf.shape, dtype, "norm" in "/".join(leaf.path))
    return nest(flat)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _leaf(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, norm: bool) -> jax.Array:
    return jax.random.normal(key, shape, dtype) * 0.02 + jnp.asarray(1.0 if norm else 0.0, dtype)


def matrix_parameters(spec: DecoderSpec) -> int:
    """Weights that a token is multiplied with: all linear layers and the output embedding."""
    linear = sum(a * b for a, b in (lora_lib.dimensions(spec, target) for target in lora_lib.GROUPS))
    return spec.num_layers * linear + spec.vocab_size * spec.hidden_size


def decode_bytes(
    spec: DecoderSpec, weight: int, activation: int, positions: Sequence[float], adapters: int = 0, lora: LoraConfig | None = None
) -> float:
    """The fewest bytes that one decoding step reads: every weight once, each adapter once, and the cache of rows at `positions`; of
    `weight` bytes a weight, and of `activation` bytes an entry of a cache or of an adapter that answers."""
    cache = sum(positions) * 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim
    own = adapters * lora_lib.count(spec, lora.rank, lora.targets) if lora is not None else 0
    return matrix_parameters(spec) * weight + (cache + own) * activation
