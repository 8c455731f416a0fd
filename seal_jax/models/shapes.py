"""The shapes of models without their weights, for planning and measuring: published ones by name, or what a config.json says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from seal_jax.errors import SealError
from seal_jax.models.folder import one_line, read_json
from seal_jax.models.spec import DecoderSpec, from_hf

SECONDS = 10.0  # for the hub to answer

_QWEN: dict[str, Any] = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "eos_token_id": 151643}
_LLAMA3: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "max_position_embeddings": 131072,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def _shape(base: dict[str, Any], hidden: int, inner: int, layers: int, heads: int, groups: int, tied: bool = False, **more: Any) -> Any:
    return {
        **base,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "tie_word_embeddings": tied,
        **more,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "embedded": _shape(  # SmolLM2-135M-Instruct
        {"model_type": "llama", "vocab_size": 49152, "rms_norm_eps": 1e-5, "rope_theta": 1e5, "max_position_embeddings": 8192},
        *(576, 1536, 30, 9, 3, True),
        bos_token_id=1,
        eos_token_id=2,
    ),
    "qwen2.5-0.5b": _shape(_QWEN, 896, 4864, 24, 14, 2, True, vocab_size=151936),
    "qwen2.5-1.5b": _shape(_QWEN, 1536, 8960, 28, 12, 2, True, vocab_size=151936),
    "qwen2.5-7b": _shape(_QWEN, 3584, 18944, 28, 28, 4, vocab_size=152064),
    "llama-3.2-1b": _shape(
        {**_LLAMA3, "rope_scaling": {**_LLAMA3["rope_scaling"], "factor": 32.0}}, 2048, 8192, 16, 32, 8, True, head_dim=64
    ),
    "llama-3.1-8b": _shape(_LLAMA3, 4096, 14336, 32, 32, 8),
    "llama-3.1-70b": _shape(_LLAMA3, 8192, 28672, 80, 64, 8),
    "llama-3.3-70b": _shape(_LLAMA3, 8192, 28672, 80, 64, 8),
}


def published(name: str) -> DecoderSpec:
    """The shape `name`, one of `CONFIGS`. Raises KeyError for another."""
    return from_hf(CONFIGS[name], name)


def find(name: str) -> DecoderSpec:
    """The shape that `name` means: one of `CONFIGS`, a model folder or its config.json, or a hub id, of which only config.json is fetched.

    Raises `SealError` if there is none such, or the hub cannot be reached.
    """
    known = {key.lower(): key for key in CONFIGS}
    if name.lower() in known:
        return published(known[name.lower()])
    path = Path(name).expanduser()
    if path.exists():
        path = path / "config.json" if path.is_dir() else path
        if path.suffix != ".json":
            raise SealError(f"{name}: the shape is read from a config.json; or name one: --spec {', '.join(CONFIGS)}")
        return from_hf(read_json(path), str(path))
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise SealError(f"{name!r}: no such folder, not a hub id (owner/name), and not one of {', '.join(CONFIGS)}")
    from huggingface_hub import hf_hub_download

    try:
        found = hf_hub_download(name, "config.json", etag_timeout=SECONDS)
    except Exception as error:  # of whichever HTTP library the hub's client uses
        hint = f"give a folder, or --spec with one of {', '.join(CONFIGS)}"
        raise SealError(f"{name}: its config.json cannot be had from the hub ({one_line(error, 120)}); {hint}") from None
    return from_hf(read_json(Path(found)), f"{name}/config.json")
