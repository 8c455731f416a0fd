"""Adapters in PEFT's folders: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors then reads
import numpy as np

from seal_jax.errors import SealError
from seal_jax.models.folder import new_folder, open_safetensors, read_json, save_safetensors, write_json
from seal_jax.models.lora import GROUPS, dimensions
from seal_jax.models.spec import DecoderSpec
from seal_jax.models.tree import HF_GROUP

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = "base_model.model.model.layers.{layer}.{group}.{target}.lora_{part}.weight"
PATTERN = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+_proj)\.lora_([AB])\.weight")
# Features of PEFT that change what an adapter computes, and the values under which they are off. What leaves traces among the tensors
# (biases, whole modules) is found there too, but is named more clearly here.
OFF: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
}
# These start from a changed base model, which the folder does not hold.
CHANGED_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


def save_adapter(folder: str | os.PathLike[str], lora: Mapping[str, Any], rank: int, alpha: float, base_name: str) -> None:
    """Write one adapter (the tree of `lora.py`, without an axis of edits) so that `peft` loads it.

    Only the first `rank` columns are written; any further ones must be padding, all zero in `a` or in `b`. `base_name` is the model that
    it adapts, a hub id or folder. Raises `SealError` if `folder` holds something already or cannot be written.
    """
    tensors, targets = {}, []
    for group, members in lora["layers"].items():
        for target, leaf in members.items():
            a, b = np.asarray(leaf["a"], np.float32), np.asarray(leaf["b"], np.float32)
            if a.ndim != 3 or b.ndim != 3 or a.shape[2] != b.shape[1] or a.shape[0] != b.shape[0]:
                raise ValueError(f"{target}: expected a [layers, in, rank] and b [layers, rank, out], found {a.shape} and {b.shape}")
            if rank > a.shape[2] or (a[:, :, rank:].any() and b[:, rank:].any()):
                raise ValueError(f"{target}: the adapter has {a.shape[2]} columns and does not fit in rank {rank}")
            targets.append(target)
            for layer in range(a.shape[0]):
                names = {part: KEY.format(layer=layer, group=HF_GROUP[group], target=target, part=part) for part in "AB"}
                tensors[names["A"]] = np.ascontiguousarray(a[layer, :, :rank].T)
                tensors[names["B"]] = np.ascontiguousarray(b[layer, :rank].T)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        # Whole numbers as PEFT writes them.
        "lora_alpha": int(alpha) if float(alpha).is_integer() else float(alpha),
        "target_modules": sorted(targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
    }
    with new_folder(folder) as tmp:
        save_safetensors(tensors, tmp / WEIGHTS)
        write_json(tmp / CONFIG, config)


def load_adapter(folder: str | os.PathLike[str], spec: DecoderSpec) -> tuple[dict[str, Any], int, float]:
    """(lora, rank, alpha) of an adapter that `peft` or `save_adapter` wrote for a model of this spec; float32 numpy leaves.

    With rank-stabilised LoRA the scale is alpha / sqrt(rank); alpha is returned such that alpha / rank is the same. Raises `SealError` for
    what is missing, does not fit the model, or is not plain LoRA on linear layers of the blocks.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG, "PEFT adapter")
    rank, alpha = _check(config, folder / CONFIG)
    path = folder / WEIGHTS
    with open_safetensors(path, "save the adapter with safe_serialization=True") as file:
        found = set(file.keys())
        targets: dict[str, str] = {}
        for name in sorted(found):
            match = PATTERN.fullmatch(name)
            if match is None or match[3] not in GROUPS or HF_GROUP[GROUPS[match[3]]] != match[2] or int(match[1]) >= spec.num_layers:
                raise SealError(f"{path}: tensor {name} has no place in this model ({spec.num_layers} layers; {', '.join(GROUPS)})")
            targets[match[3]] = GROUPS[match[3]]
        if not targets:
            raise SealError(f"{path}: no LoRA tensors in it")
        lora: dict[str, Any] = {"layers": {}}
        for target in (t for t in GROUPS if t in targets):
            inputs, outputs = dimensions(spec, target)
            leaf = {"a": np.empty((spec.num_layers, inputs, rank), np.float32), "b": np.empty((spec.num_layers, rank, outputs), np.float32)}
            for layer in range(spec.num_layers):
                for part, out in (("A", leaf["a"]), ("B", leaf["b"])):
                    name = KEY.format(layer=layer, group=HF_GROUP[targets[target]], target=target, part=part)
                    if name not in found:
                        raise SealError(f"{path}: tensor {name} is missing; an adapter of some layers only is not supported")
                    array = file.get_tensor(name)
                    if array.shape != out.shape[:0:-1]:
                        raise SealError(f"{path}: tensor {name} has shape {list(array.shape)}; expected {list(out.shape[:0:-1])}")
                    out[layer] = array.T
            lora["layers"].setdefault(targets[target], {})[target] = leaf
    return lora, rank, alpha


def _check(config: Mapping[str, Any], where: Path) -> tuple[int, float]:
    """(rank, alpha) of an adapter config, if it is plain LoRA."""
    if config.get("peft_type") != "LORA":
        raise SealError(f"{where}: peft_type={config.get('peft_type')!r} is not supported; supported: LORA")
    for key, off in OFF.items():
        if key in config and config[key] not in off:
            raise SealError(f"{where}: {key}={config[key]!r} is not supported; supported: {off[0]!r}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASE):
        raise SealError(f"{where}: init_lora_weights={start!r} changes the base model; convert the adapter to plain LoRA with peft")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise SealError(f"{where}: r={rank!r}: expected a whole number above 0")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise SealError(f"{where}: lora_alpha={alpha!r}: expected a number")
    return rank, float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)
