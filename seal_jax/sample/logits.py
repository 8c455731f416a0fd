"""From logits to a token: device code, pure, row by row.

The nucleus and the top k are cut by a threshold on the probability itself, found by bisection over the bit patterns of float32, which
order as the numbers do. That is exact (ties at the threshold are all kept) and needs no sort over the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax import rng


class Sampling(NamedTuple):
    """How each row's tokens are drawn. Leaves [R]."""

    key: jax.Array  # [R, 2] uint32, raw threefry keys
    temperature: jax.Array  # float32, finite; 0: greedy
    top_p: jax.Array  # float32 in (0, 1]
    top_k: jax.Array  # int32; 0: all


class Guide(NamedTuple):
    """What constrained rows may draw: an automaton over tokens (`seal_jax.sample.constraint`), shared by all rows.

    A row is in some state; state 0 allows everything and stays. Bit t // W of word t % W says whether token t is allowed: thus unpacking
    moves no data between lanes, and a row of the mask is one contiguous read.
    """

    allowed: jax.Array  # [S, W] uint32
    following: jax.Array  # [S, C] int32: the state after a token of class c, if that is allowed
    class_of: jax.Array  # [V] int32

    @staticmethod
    def pack(allowed: np.ndarray) -> np.ndarray:
        """[S, V] bool as the bits of `allowed`; W is a multiple of 128, an accelerator's lanes."""
        states, size = allowed.shape
        width = -(-size // (32 * 128)) * 128
        words = np.zeros((states, width), np.uint32)
        for bit, begin in enumerate(range(0, size, width)):
            part = allowed[:, begin : begin + width]
            words[:, : part.shape[1]] |= part.astype(np.uint32) << np.uint32(bit)
        return words

    def mask(self, logits: jax.Array, state: jax.Array) -> jax.Array:
        """`logits` [R, V] with those of tokens that `state` [R] does not allow at -inf."""
        bits = self.allowed[state][:, None, :] >> jnp.arange(32, dtype=jnp.uint32)[:, None] & 1
        return jnp.where(bits.reshape(len(state), -1)[:, : logits.shape[-1]] == 1, logits, -jnp.inf)

    def advance(self, state: jax.Array, token: jax.Array) -> jax.Array:
        """The state of each row, of any shape, after it has drawn `token`, which it was allowed to."""
        return self.following[state, self.class_of[token]]


def _largest_threshold(weights: jax.Array, values: jax.Array, enough: jax.Array) -> jax.Array:
    """The largest float32 t >= 0 for which the sum of `values` [V] where `weights` [V] >= t is at least `enough`."""

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # the answer is in [low, high)
        middle = low + (high - low) // 2
        total = jnp.sum(jnp.where(weights >= jax.lax.bitcast_convert_type(middle, jnp.float32), values, 0.0))
        return jax.tree.map(lambda a, b: jnp.where(total >= enough, a, b), (middle, high), (low, middle))

    one = jax.lax.bitcast_convert_type(jnp.float32(1.0), jnp.int32) + 1
    low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.int32(0), one))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def keep(probabilities: jax.Array, top_p: jax.Array, top_k: jax.Array) -> jax.Array:
    """Which tokens of each row [R, V] may be drawn: the `top_k` likeliest, and of those the smallest set of mass at least `top_p`.

    At least one token of a row stays. As in transformers, top k is cut first and the mass is taken over what it leaves.
    """
    size = probabilities.shape[-1]
    scaled = probabilities / jnp.max(probabilities, axis=-1, keepdims=True)  # in [0, 1], so that the bisection's range is fixed
    everything = (top_k <= 0) | (top_k >= size)
    count = jnp.where(everything, size, top_k).astype(jnp.float32)
    threshold = jax.vmap(_largest_threshold)
    least = jax.lax.cond(jnp.all(everything), lambda: jnp.zeros_like(top_p), lambda: threshold(scaled, jnp.ones_like(scaled), count))
    kept = scaled >= least[:, None]
    mass = jnp.where(kept, scaled, 0.0)
    # A hair under the exact mass, or rounding in the sums could make "all of it" unreachable.
    enough = jnp.minimum(top_p, 1.0 - 1e-6) * jnp.sum(mass, axis=-1)
    least = jax.lax.cond(jnp.all(top_p >= 1.0), lambda: jnp.zeros_like(top_p), lambda: threshold(mass, mass, enough))
    least = jnp.where(top_p >= 1.0, 0.0, least)  # so that a row without a nucleus is the same beside one that has it
    return kept & (scaled >= least[:, None])


def pick(logits: jax.Array, sampling: Sampling, step: jax.Array) -> jax.Array:
    """The next token [R] int32 for `logits` [R, V] float32; `step` [R] int32 is each row's own count of tokens drawn before.

    A draw depends on the row's key and step alone. Greedy rows take the first of the largest logits, and so do rows from whose logits
    nothing can be drawn (those of a model that diverged).
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def noise(key: jax.Array, count: jax.Array) -> jax.Array:
        drawn = jax.random.fold_in(jax.random.wrap_key_data(key, impl=rng.IMPLEMENTATION), count)
        return jax.random.gumbel(drawn, logits.shape[-1:], jnp.float32)

    def drawn() -> jax.Array:
        # Less the largest, which thus stays finite at any temperature.
        warm = (logits - jnp.max(logits, axis=-1, keepdims=True)) / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None]
        allowed = keep(jax.nn.softmax(warm), sampling.top_p, sampling.top_k)
        token = jnp.argmax(jnp.where(allowed, warm + jax.vmap(noise)(sampling.key, step), -jnp.inf), axis=-1)
        return jnp.where((sampling.temperature > 0) & jnp.any(allowed, axis=-1), token.astype(jnp.int32), greedy)

    return jax.lax.cond(jnp.any(sampling.temperature > 0), drawn, lambda: greedy)
