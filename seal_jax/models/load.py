"""A model by name: the embedded one, a local folder or GGUF file, or a hub id."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from seal_jax.config import ModelConfig
from seal_jax.errors import SealError
from seal_jax.models import embedded, hf
from seal_jax.models.gguf import read_gguf
from seal_jax.models.spec import DecoderSpec
from seal_jax.models.tokenizer import Tokenizer
from seal_jax.models.tree import get as get_leaf
from seal_jax.models.tree import leaves, nest


@dataclasses.dataclass(frozen=True)
class Model:
    """A policy: what it looks like, its weights and its tokenizer."""

    spec: DecoderSpec
    params: dict[str, Any]  # the decoder's tree of jax arrays
    tokenizer: Tokenizer
    name: str  # as the config gave it


def load_model(config: ModelConfig, sharding: hf.Sharding | None = None) -> Model:
    """The model that `config.name` and `config.dtype` ask for, its parameters placed as `sharding` (path, shape) says.

    Raises `SealError` if it is not there, cannot be fetched, or is not supported.
    """
    dtype = resolve_dtype(config.dtype)
    path = embedded.fetch() if config.name == "embedded" else hf.resolve(config.name)
    if path.is_file():
        spec, host, tokenizer = read_gguf(path)
        params = _place(host, spec, dtype, sharding)
    else:
        spec, tokenizer = hf.read_spec(path)
        params = hf.load_params(path, spec, dtype, sharding)
    if tokenizer.vocab_size > spec.vocab_size:
        raise SealError(f"{path}: the tokenizer has {tokenizer.vocab_size} ids, the model {spec.vocab_size}; they do not belong together")
    return Model(spec, params, tokenizer, config.name)


def resolve_dtype(name: str) -> Any:
    """The dtype of the weights: "float32", "bfloat16", or "auto", which is bfloat16 where products of it are fast.

    That is on accelerators, and on CPUs with matrix units for it (Intel's AMX).
    """
    if name == "auto":
        name = "bfloat16" if jax.default_backend() != "cpu" or _cpu_has_amx() else "float32"
    return jnp.dtype(name)


def activation_dtype(weights: Any) -> Any:
    """The dtype that a decoder with `weights` of some dtype computes in: the same, but float32 on CPU.

    A CPU has no other arithmetic: bfloat16 activations would be converted to and fro; only products with bfloat16 weights may be fast.
    """
    return jnp.dtype(jnp.float32) if jax.default_backend() == "cpu" else jnp.dtype(weights)


@functools.cache
def _cpu_has_amx() -> bool:
    try:
        return "amx_bf16" in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def _place(host: dict[str, Any], spec: DecoderSpec, dtype: Any, sharding: hf.Sharding | None) -> dict[str, Any]:
    """Host arrays on the devices, leaf by leaf; each host leaf is dropped once it is placed."""
    flat = {}
    for leaf in leaves(spec):
        parent = get_leaf(host, leaf.path[:-1])
        array = parent.pop(leaf.path[-1])
        flat[leaf.path] = hf.place(leaf.path, array.shape, dtype, lambda index, array=array: array[index], sharding)
        del array
    return nest(flat)
