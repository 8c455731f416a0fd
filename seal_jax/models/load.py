"""A model by name: the embedded one, a local folder or GGUF file, or a hub id."""

from __future__ import annotations

import dataclasses
from pathlib import Path
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


def load_model(config: ModelConfig, sharding: hf.Sharding | None = None, key: str = "model.name") -> Model:
    """The model that `config.name` and `config.dtype` ask for, its parameters placed as `sharding` (path, shape) says.

    `key` is that of the config which gave the name. Raises `SealError` if it is not there, cannot be fetched, or is not supported.
    """
    dtype = resolve_dtype(config.dtype)
    path = _fetched(config.name, key)
    if path.is_file():
        from seal_jax.models.gguf import read_gguf  # its package is needed for such a file alone

        spec, host, tokenizer = read_gguf(path)
        params = _place(host, spec, dtype, sharding)
    else:
        spec, tokenizer = hf.read_spec(path)
        params = hf.load_params(path, spec, dtype, sharding)
    _check_ids(path, spec, tokenizer)
    return Model(spec, params, tokenizer, config.name)


def read_head(config: ModelConfig, key: str = "model.name") -> tuple[DecoderSpec, Tokenizer]:
    """The spec and the tokenizer of the model, which is fetched if it is a hub's. Raises `SealError` where `load_model` would, as far as
    can be told without reading weights."""
    resolve_dtype(config.dtype)
    path = _fetched(config.name, key)
    if path.is_file():
        from seal_jax.models import gguf

        spec, _, tokenizer = gguf.read_head(path)
    else:
        spec, tokenizer = hf.read_spec(path)
        hf.check_params(path, spec)
    _check_ids(path, spec, tokenizer)
    return spec, tokenizer


def _fetched(name: str, key: str) -> Path:
    return embedded.fetch() if name == "embedded" else hf.resolve(name, key)


def _check_ids(path: Path, spec: DecoderSpec, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > spec.vocab_size:
        raise SealError(f"{path}: the tokenizer has {tokenizer.vocab_size} ids, the model {spec.vocab_size}; they do not belong together")


def _place(host: dict[str, Any], spec: DecoderSpec, dtype: Any, sharding: hf.Sharding | None) -> dict[str, Any]:
    """Host arrays on the devices, leaf by leaf; each host leaf is dropped once it is placed."""
    flat = {}
    for leaf in leaves(spec):
        parent = get_leaf(host, leaf.path[:-1])
        array = parent.pop(leaf.path[-1])
        flat[leaf.path] = hf.place(leaf.path, array.shape, dtype, lambda index, array=array: array[index], sharding)
        del array
    return nest(flat)
