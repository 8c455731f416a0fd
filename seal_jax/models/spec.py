"""What a decoder looks like, read from and written to the `config.json` of transformers.

One decoder covers Llama 2 and 3.x, SmolLM and SmolLM2 (which are Llamas), Qwen2, Qwen2.5 and Qwen3; they differ only in the fields below.
Whatever a config asks for that is not here is refused by name, because a model that loads and computes something else is worse.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from seal_jax.errors import SealError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# What transformers' config classes assume where a config.json is silent.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": None},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched to a longer context.

    "linear" divides all of them by `factor`. "llama3" divides those whose wavelength exceeds `original_max_position / low_freq_factor`,
    keeps those below `original_max_position / high_freq_factor`, and blends in between (the other fields are for it alone).
    """

    kind: str  # "linear" or "llama3"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclasses.dataclass(frozen=True)
class DecoderSpec:
    """The shape of a decoder-only model. Hashable, so that it can be a static argument of `jit`."""

    model_type: str  # "llama", "qwen2" or "qwen3"
    vocab_size: int  # rows of the embedding; may exceed the tokenizer's size
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_embeddings: bool  # logits are taken with the embedding matrix itself
    qkv_bias: bool  # Qwen2: biases on q, k and v, none on o
    qk_norm: bool  # Qwen3: RMSNorm over head_dim on q and k, before RoPE
    max_positions: int
    eos_ids: tuple[int, ...]
    bos_id: int | None
    pad_id: int | None


def from_hf(config: Mapping[str, Any], where: str = "config.json") -> DecoderSpec:
    """The spec that a transformers `config.json` describes, in the style of transformers 4 or 5; `where` names it in errors.

    Raises `SealError` for a missing or malformed key, and for anything that this decoder does not compute.
    """
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise SealError(f"{where}: model_type={kind!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    _refuse_unsupported(config, kind, where)

    def integer(key: str, default: Any = ...) -> int:
        default = DEFAULTS[kind].get(key, default)
        value = default if config.get(key) is None else config[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise SealError(f"{where}: {key}={config.get(key)!r}: expected a whole number above 0")
        return value

    hidden, heads = integer("hidden_size"), integer("num_attention_heads")
    kv_heads = integer("num_key_value_heads") if config.get("num_key_value_heads", DEFAULTS[kind]["num_key_value_heads"]) else heads
    if config.get("head_dim") is None and "head_dim" not in DEFAULTS[kind] and hidden % heads:
        raise SealError(f"{where}: hidden_size={hidden} is not a multiple of num_attention_heads={heads}, and head_dim is not given")
    if heads % kv_heads:
        raise SealError(f"{where}: num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
    head_dim = integer("head_dim", hidden // heads)
    if head_dim % 2:
        raise SealError(f"{where}: head_dim={head_dim}: rotary embeddings need an even number")
    theta, scaling = _rope(config, where)
    return DecoderSpec(
        model_type=kind,
        vocab_size=integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=integer("intermediate_size"),
        num_layers=integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=_number(config.get("rms_norm_eps", 1e-6), "rms_norm_eps", where),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        max_positions=integer("max_position_embeddings"),
        eos_ids=token_ids(config.get("eos_token_id", DEFAULTS[kind].get("eos_token_id")), "eos_token_id", where),
        bos_id=_token_id(config.get("bos_token_id", DEFAULTS[kind].get("bos_token_id")), "bos_token_id", where),
        pad_id=_token_id(config.get("pad_token_id"), "pad_token_id", where),
    )


def to_hf(spec: DecoderSpec, dtype: str = "float32") -> dict[str, Any]:
    """A `config.json` for `spec` that transformers 4 and 5 both load (the older keys, which the newer version still reads)."""
    scaling = None
    if spec.rope_scaling is not None:
        scaling = {"rope_type": spec.rope_scaling.kind, "factor": spec.rope_scaling.factor}
        if spec.rope_scaling.kind == "llama3":
            scaling |= {
                "low_freq_factor": spec.rope_scaling.low_freq_factor,
                "high_freq_factor": spec.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": spec.rope_scaling.original_max_position,
            }
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[spec.model_type]],
        "model_type": spec.model_type,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": spec.tie_embeddings,
        "max_position_embeddings": spec.max_positions,
        "eos_token_id": spec.eos_ids[0] if len(spec.eos_ids) == 1 else list(spec.eos_ids) or None,
        "bos_token_id": spec.bos_id,
        "pad_token_id": spec.pad_id,
        "torch_dtype": dtype,
    }
    if spec.model_type == "llama":
        config |= {"attention_bias": False, "mlp_bias": False}
    else:
        config |= {"use_sliding_window": False}
    return config


def token_ids(value: Any, key: str, where: str) -> tuple[int, ...]:
    """A token id, a list of them or None, as a tuple."""
    if value is None:
        return ()
    values = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise SealError(f"{where}: {key}={value!r}: expected a token id or a list of them")
    return tuple(dict.fromkeys(v for v in values if v >= 0))


def _token_id(value: Any, key: str, where: str) -> int | None:
    ids = token_ids(value, key, where)
    return ids[0] if ids else None


def _number(value: Any, key: str, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise SealError(f"{where}: {key}={value!r}: expected a number above 0")
    return float(value)


def _refuse_unsupported(config: Mapping[str, Any], kind: str, where: str) -> None:
    # Qwen2 has its biases built in and ignores `attention_bias`; in the others the key would add one to o_proj as well.
    flags = {"llama": ("attention_bias", "mlp_bias", "rope_interleaved"), "qwen2": (), "qwen3": ("attention_bias",)}[kind]
    for key in flags:
        if config.get(key):
            raise SealError(f"{where}: {key}={config[key]!r} is not supported for {kind}; supported: false")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise SealError(f"{where}: hidden_act={config['hidden_act']!r} is not supported; supported: silu")
    if (config.get("pretraining_tp") or 1) != 1:
        raise SealError(f"{where}: pretraining_tp={config['pretraining_tp']!r} is not supported; supported: 1")
    if "quantization_config" in config:
        raise SealError(f"{where}: quantization_config is not supported; use the unquantised checkpoint, or a GGUF file")
    if kind == "llama":
        return
    types = config.get("layer_types")
    if types is None and config.get("use_sliding_window") and config.get("sliding_window", 4096) is not None:
        # Layers from max_window_layers on would slide; at or above the number of layers, none does.
        layers, first = config.get("num_hidden_layers"), config.get("max_window_layers", 28)
        if isinstance(layers, int) and isinstance(first, int) and first < layers:
            raise SealError(f"{where}: use_sliding_window=True is not supported (layers from {first} on would use it); supported: false")
    if types is not None and any(t != "full_attention" for t in types):
        raise SealError(f"{where}: layer_types={sorted(set(map(str, types)))} is not supported; supported: full_attention")


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
    """What a mapping says of the scaling: without theta, and the type by its newer name."""
    return {("rope_type" if key == "type" else key): value for key, value in rope.items() if key != "rope_theta"}


def _rope(config: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from `rope_theta` and `rope_scaling` (transformers 4), or `rope_parameters`, which holds both (5)."""
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    if isinstance(new, Mapping) and isinstance(old, Mapping) and _scaling(new) != _scaling(old):  # of which transformers takes the older
        raise SealError(f"{where}: rope_parameters={new!r}, rope_scaling={old!r}: they say different things; leave one out")
    key = "rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling"
    rope = config.get(key) or {}
    if not isinstance(rope, Mapping):
        raise SealError(f"{where}: {key}={rope!r}: expected a mapping")
    theta = rope.get("rope_theta")
    theta = config.get("rope_theta") if theta is None else theta
    theta = _number(10000.0 if theta is None else theta, "rope_theta", where)
    for source in (config, rope):
        if source.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise SealError(f"{where}: partial_rotary_factor={source['partial_rotary_factor']!r} is not supported; supported: 1.0")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise SealError(f"{where}: {key} of type {kind!r} is not supported; supported: default, linear, llama3")
    needed = ["factor"] + (["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"] if kind == "llama3" else [])
    values = [_number(rope.get(name), f"{key}.{name}", where) for name in needed]
    if kind == "linear":
        return theta, RopeScaling("linear", values[0])
    above = config.get("original_max_position_embeddings")
    if above is not None and above != values[3]:
        said = f"original_max_position_embeddings={above!r}, and {values[3]:g} in {key}"
        raise SealError(f"{where}: {said}: they say different things; leave one out")
    return theta, RopeScaling("llama3", *values[:3], original_max_position=int(values[3]))
