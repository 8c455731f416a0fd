"""A model by name: the embedded one, a local folder or GGUF file, or a hub id."""

from __future__ import annotations

import dataclasses
from typing import Any

from seal_jax.config import ModelConfig
from seal_jax.errors import SealError
from seal_jax.models import embedded, hf
from seal_jax.models.dtypes import resolve_dtype
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
        from seal_jax.models.gguf import read_gguf  # its package is needed for such a file alone

        spec, host, tokenizer = read_gguf(path)
        params = _place(host, spec, dtype, sharding)
    else:
        spec, tokenizer = hf.read_spec(path)
        params = hf.load_params(path, spec, dtype, sharding)
    if tokenizer.vocab_size > spec.vocab_size:
        raise SealError(f"{path}: the tokenizer has {tokenizer.vocab_size} ids, the model {spec.vocab_size}; they do not belong together")
    return Model(spec, params, tokenizer, config.name)


def _place(host: dict[str, Any], spec: DecoderSpec, dtype: Any, sharding: hf.Sharding | None) -> dict[str, Any]:
    """Host arrays on the devices, leaf by leaf; each host leaf is dropped once it is placed."""
    flat = {}
    for leaf in leaves(spec):
        parent = get_leaf(host, leaf.path[:-1])
        array = parent.pop(leaf.path[-1])
        flat[leaf.path] = hf.place(leaf.path, array.shape, dtype, lambda index, array=array: array[index], sharding)
        del array
    return nest(flat)
