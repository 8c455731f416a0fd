"""Every random draw is a function of (seed, round, context, candidate, purpose), never of batching, order or the clock."""

from __future__ import annotations

import hashlib

import numpy as np

# Of JAX's keys, whatever `jax_default_prng_impl` says. Draws on devices are those of JAX's other defaults (`jax_threefry_partitionable`,
# 32 bits): a process that changes these draws otherwise.
IMPLEMENTATION = "threefry2x32"


def words(seed: int, *parts: str | int) -> np.ndarray:
    """Two uint32 words that stand for `seed` and `parts`: a raw threefry key, or the entropy of a numpy generator."""
    digest = hashlib.blake2b("\x1f".join([str(seed), *map(str, parts)]).encode(), digest_size=8).digest()
    return np.frombuffer(digest, dtype="<u4").astype(np.uint32)


def generator(seed: int, *parts: str | int) -> np.random.Generator:
    """A numpy generator for `seed` and `parts`."""
    return np.random.default_rng(words(seed, *parts))
