"""Models in GGUF files (llama.cpp's format), dequantised to float32 on the host."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import gguf
import numpy as np

from seal_jax.errors import SealError
from seal_jax.models.folder import one_line
from seal_jax.models.spec import DecoderSpec, from_hf
from seal_jax.models.tokenizer import Tokenizer
from seal_jax.models.tree import Leaf, leaves, nest

# The names of `tree.leaves` in GGUF files.
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class _Reader(gguf.GGUFReader):
    """Holds the mapped file as a plain array: numpy's `memmap` makes the many small reads of the metadata three times slower."""

    @property
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._data = mapped.view(np.ndarray)


def read_gguf(path: str | os.PathLike[str]) -> tuple[DecoderSpec, dict[str, Any], Tokenizer]:
    """(spec, params, tokenizer) of a GGUF file. `params` is the decoder's tree with float32 numpy leaves.

    Raises `SealError` for a file that is missing, damaged, or of an architecture, quantisation or tokenizer that is not supported.
    """
    spec, tensors, tokenizer = read_head(path)
    flat = {leaf.path: _read(leaf, spec, tensors, str(path)) for leaf in leaves(spec)}
    return spec, nest(flat), tokenizer


def read_head(path: str | os.PathLike[str]) -> tuple[DecoderSpec, dict[str, Any], Tokenizer]:
    """(spec, tensors by name, tokenizer) of a GGUF file, no weights read yet. Raises `SealError` as `read_gguf`."""
    try:
        reader = _Reader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except FileNotFoundError:
        raise SealError(f"{path}: no such file") from None
    except Exception as error:  # the reader fails in many ways on a file that is cut short or of another kind
        raise SealError(f"{path}: not a readable GGUF file ({one_line(error)}); fetch it again") from None
    where = str(path)
    tokenizer = Tokenizer.from_gguf_metadata(fields, where)
    spec = dataclasses.replace(_spec(fields, tensors, where), eos_ids=tokenizer.eos_ids)
    known = {_named(name) for leaf in leaves(spec) for name in leaf.names(spec)}
    if strange := sorted(tensors.keys() - known):
        raise SealError(f"{where}: tensor {strange[0]} has no place in the {spec.model_type} model of the metadata")
    return spec, tensors, tokenizer


def _spec(fields: dict[str, Any], tensors: dict[str, Any], where: str) -> DecoderSpec:
    arch = fields.get("general.architecture")

    def meta(key: str, default: Any = ...) -> Any:
        value = fields.get(f"{arch}.{key}", default)
        if value is ...:
            raise SealError(f"{where}: the metadata has no {arch}.{key}")
        return value

    if arch not in ("llama", "qwen2", "qwen3"):
        raise SealError(f"{where}: general.architecture={arch!r} is not supported; supported: llama, qwen2, qwen3")
    if "rope_freqs.weight" in tensors:
        # Llama 3.x: the factors are stored, not the parameters that they come from.
        raise SealError(f"{where}: scaled RoPE in GGUF is not supported; use the model's safetensors folder or hub id")
    if meta("rope.scaling.type", "none") not in ("none", "linear"):
        raise SealError(f"{where}: {arch}.rope.scaling.type={meta('rope.scaling.type')!r} is not supported; supported: none, linear")
    if meta("expert_count", 0):
        raise SealError(f"{where}: mixtures of experts are not supported; use a dense model")
    heads, hidden = meta("attention.head_count"), meta("embedding_length")
    head_dim = meta("attention.key_length", hidden // heads)
    if meta("rope.dimension_count", head_dim) != head_dim:
        raise SealError(
            f"{where}: {arch}.rope.dimension_count={meta('rope.dimension_count')} is not supported; supported: {head_dim}, all of a head"
        )
    linear = meta("rope.scaling.type", "none") == "linear"
    vocab = tensors["token_embd.weight"].shape[1] if "token_embd.weight" in tensors else len(fields["tokenizer.ggml.tokens"])
    config = {
        "model_type": arch,
        "vocab_size": int(vocab),
        "hidden_size": hidden,
        "intermediate_size": meta("feed_forward_length"),
        "num_hidden_layers": meta("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta("attention.head_count_kv", heads),
        "head_dim": head_dim,
        # Stored as float32; the shortest decimal that reads back as the same float32 is what the model's config said.
        "rms_norm_eps": float(str(np.float32(meta("attention.layer_norm_rms_epsilon")))),
        "rope_theta": meta("rope.freq_base", 10000.0),
        "rope_scaling": {"rope_type": "linear", "factor": meta("rope.scaling.factor")} if linear else None,
        "tie_word_embeddings": "output.weight" not in tensors,
        "max_position_embeddings": meta("context_length"),
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }
    return from_hf(config, where)


def _read(leaf: Leaf, spec: DecoderSpec, tensors: dict[str, Any], where: str) -> np.ndarray:
    if not leaf.stacked:
        return _dequantise(leaf, leaf.name, spec, tensors, where)
    out = np.empty(leaf.shape, np.float32)
    for i in range(spec.num_layers):
        out[i] = _dequantise(leaf, leaf.name.format(i), spec, tensors, where)
    return out


def _named(hf_name: str) -> str:
    """What a GGUF file calls a tensor."""
    module, _, kind = hf_name.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{NAMES[module]}.{kind}"
    layer, part = module.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def _dequantise(leaf: Leaf, hf_name: str, spec: DecoderSpec, tensors: dict[str, Any], where: str) -> np.ndarray:
    """One tensor as a float32 array in the decoder's layout, without the axis of layers."""
    name = _named(hf_name)
    if name not in tensors:
        raise SealError(f"{where}: tensor {name} is missing; the file is incomplete or of another architecture")
    tensor = tensors[name]
    shape = leaf.stored_shape
    if tuple(int(n) for n in reversed(tensor.shape)) != shape:
        raise SealError(f"{where}: tensor {name} has shape {[int(n) for n in reversed(tensor.shape)]}; expected {list(shape)}")
    try:
        # Blocks lie one after another whatever the rows are. The package works through 16 rows at a time: longer ones mean fewer calls.
        join = next(n for n in (8, 4, 2, 1) if shape[0] % n == 0)
        array = gguf.dequantize(tensor.data.reshape(shape[0] // join, -1), tensor.tensor_type)
    except (NotImplementedError, ValueError, KeyError) as error:
        raise SealError(f"{where}: tensor {name}: quantisation {tensor.tensor_type.name} cannot be read: {one_line(error)}") from None
    array = array.astype(np.float32, copy=False).reshape(shape)
    if spec.model_type == "llama" and leaf.path[-2] in ("q_proj", "k_proj"):
        # llama.cpp rotates neighbouring pairs, transformers the two halves of a head: its converter interleaves the rows of q and k.
        heads = spec.num_heads if leaf.path[-2] == "q_proj" else spec.num_kv_heads
        array = array.reshape(heads, spec.head_dim // 2, 2, -1).swapaxes(1, 2).reshape(shape)
    return array.T if leaf.transposed else array
