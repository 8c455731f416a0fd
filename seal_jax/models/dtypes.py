"""Which arithmetic a model is kept and computed in."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from seal_jax import cpu


def resolve_dtype(name: str) -> Any:
    """The dtype of the weights: "float32", "bfloat16", or "auto", which is bfloat16 where products of it are fast.

    That is on accelerators, and on CPUs with matrix units for it (Intel's AMX).
    """
    if name == "auto":
        name = "bfloat16" if jax.default_backend() != "cpu" or "amx_bf16" in cpu.features() else "float32"
    return jnp.dtype(name)


def activation_dtype(weights: Any) -> Any:
    """The dtype that a decoder with `weights` of some dtype computes in: the same, but float32 on CPU.

    A CPU has no other arithmetic: bfloat16 activations would be converted to and fro; only products with bfloat16 weights may be fast.
    """
    return jnp.dtype(jnp.float32) if jax.default_backend() == "cpu" else jnp.dtype(weights)
