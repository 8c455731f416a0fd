import jax
import jax.numpy as jnp

from seal_jax import cpu
from seal_jax.models import dtypes


def test_auto_dtype_depends_on_the_device(monkeypatch):
    """Weights in bfloat16 where products of it are fast; a CPU computes the rest in float32 in any case."""
    for backend, matrix_units, weights, activations in (
        ("cpu", False, jnp.float32, jnp.float32),
        ("cpu", True, jnp.bfloat16, jnp.float32),
        ("tpu", False, jnp.bfloat16, jnp.bfloat16),
    ):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        monkeypatch.setattr(cpu, "features", lambda has=matrix_units: {"amx_bf16"} if has else set())
        assert dtypes.resolve_dtype("auto") == weights
        assert dtypes.activation_dtype(weights) == activations
        assert dtypes.resolve_dtype("float32") == jnp.float32
