"""Prefill, insert, decode: device code. E adapters with R rows each, every row at its own position of its own sequence.

A row's life: its prompt is prefilled (once, for all rows that share it), `insert` copies the prompt's cache into the row and draws the
first token, `decode` draws the others, and when the row is done the host may give it to the next request. Shapes as in
`seal_jax.models.decoder`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seal_jax.models.decoder import Cache, Decoder, empty_cache, logits
from seal_jax.sample.logits import Sampling, pick


class Rows(NamedTuple):
    """The state of E x R sequences. Leaves are [E, R, ...] but for the cache."""

    cache: Cache  # k [E, N, R, G, h, S], v [E, N, R, G, S, h]
    last: jax.Array  # int32, the newest token, not yet in the cache
    position: jax.Array  # int32, its position
    drawn: jax.Array  # int32, tokens drawn so far
    limit: jax.Array  # int32, tokens that may be drawn
    done: jax.Array  # bool
    out: jax.Array  # [E, R, O] int32, the drawn tokens, the stop token included
    sampling: Sampling  # [E, R, ...]


class Prefix(NamedTuple):
    """P prefilled prompts for each of E adapters."""

    cache: Cache  # k [E, N, P, G, h, L], v [E, N, P, G, L, h]
    logits: jax.Array  # [E, P, V] float32, after the prompt's last token
    length: jax.Array  # [E, P] int32


def _variables(params: Any, lora: Any) -> dict[str, Any]:
    return {"params": params} if lora is None else {"params": params, "lora": lora}


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def empty(decoder: Decoder, adapters: int, rows: int, length: int, out: int) -> Rows:
    """Rows that are all done, with room for `length` positions and `out` drawn tokens each."""
    shape = (adapters, rows)
    cache = jax.tree.map(lambda x: jnp.zeros((adapters, *x.shape), x.dtype), empty_cache(decoder.spec, rows, length, decoder.dtype))
    zero = jnp.zeros(shape, jnp.int32)
    floats = jnp.zeros(shape, jnp.float32)
    sampling = Sampling(jnp.zeros((*shape, 2), jnp.uint32), floats, floats + 1.0, zero)
    return Rows(cache, zero, zero, zero, zero, zero == 0, jnp.zeros((*shape, out), jnp.int32), sampling)


@functools.partial(jax.jit, static_argnums=(0,))
def prefill(decoder: Decoder, params: Any, lora: Any, tokens: jax.Array, length: jax.Array) -> Prefix:
    """Prompts `tokens` [E, P, L] int32, right-padded, of `length` [E, P] tokens, read by their adapters (`lora` [E, ...] or None)."""

    def one(lora: Any, tokens: jax.Array, length: jax.Array) -> tuple[Cache, jax.Array]:
        cache = empty_cache(decoder.spec, tokens.shape[0], tokens.shape[1], decoder.dtype)
        hidden, cache = decoder.apply(_variables(params, lora), tokens, None, cache)
        last = jnp.take_along_axis(hidden, jnp.maximum(length - 1, 0)[:, None, None], axis=1)[:, 0]
        return cache, logits(params, last)

    cache, last = jax.vmap(one)(lora, tokens, length)
    return Prefix(cache, last, length)


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(1,))
def insert(
    stop: tuple[int, ...], rows: Rows, prefix: Prefix, row: jax.Array, source: jax.Array, limit: jax.Array, sampling: Sampling
) -> Rows:
    """Starts requests: for each adapter, prompt `source` [E, Q] of the prefix goes to row `row` [E, Q] (an index >= R is dropped).

    `limit` and `sampling` are [E, Q, ...]. The first token of each is drawn here. `stop` ids end a sequence.
    """

    def one(rows: Rows, prefix: Prefix, row: jax.Array, source: jax.Array, limit: jax.Array, sampling: Sampling) -> Rows:
        token = pick(prefix.logits[source], sampling, jnp.zeros_like(source))
        width = prefix.cache.v.shape[-2]

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            return old.at[row].set(new, mode="drop")

        cache = Cache(
            rows.cache.k.at[:, row, :, :, :width].set(prefix.cache.k[:, source], mode="drop"),
            rows.cache.v.at[:, row, :, :width].set(prefix.cache.v[:, source], mode="drop"),
        )
        out = rows.out.at[row].set(0, mode="drop").at[row, 0].set(token, mode="drop")
        return Rows(
            cache=cache,
            last=put(rows.last, token),
            position=put(rows.position, prefix.length[source]),
            drawn=put(rows.drawn, jnp.ones_like(token)),
            limit=put(rows.limit, limit),
            done=put(rows.done, _is_stop(token, stop) | (limit <= 1)),
            out=out,
            sampling=jax.tree.map(put, rows.sampling, sampling),
        )

    return jax.vmap(one)(rows, prefix, row, source, limit, sampling)


def _is_stop(token: jax.Array, stop: tuple[int, ...]) -> jax.Array:
    return functools.reduce(jnp.logical_or, [token == s for s in stop], jnp.zeros_like(token, bool))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(4,))
def decode(decoder: Decoder, stop: tuple[int, ...], params: Any, lora: Any, rows: Rows, steps: jax.Array) -> Rows:
    """At most `steps` (int32 scalar) further tokens for every row that is not done; ends early when all are."""

    def one(rows: Rows) -> Rows:
        def hidden_of(lora: Any, last: jax.Array, position: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
            hidden, cache = decoder.apply(_variables(params, lora), last[:, None], position[:, None], cache)
            return hidden[:, 0], cache

        hidden, cache = jax.vmap(hidden_of)(lora, rows.last, rows.position, rows.cache)
        flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
        token = pick(flat(logits(params, hidden)), jax.tree.map(flat, rows.sampling), flat(rows.drawn)).reshape(rows.last.shape)
        # A row that is done stays as it is, but for a cache entry that no one reads.
        token = jnp.where(rows.done, rows.last, token)
        e, r = jnp.indices(rows.last.shape)
        place = jnp.where(rows.done, rows.out.shape[-1], rows.drawn)
        live = (~rows.done).astype(jnp.int32)
        return rows._replace(
            cache=cache,
            last=token,
            position=rows.position + live,
            drawn=rows.drawn + live,
            done=rows.done | _is_stop(token, stop) | (rows.drawn + live >= rows.limit),
            out=rows.out.at[e, r, place].set(token, mode="drop"),
        )

    def body(carry: tuple[jax.Array, Rows]) -> tuple[jax.Array, Rows]:
        return carry[0] + 1, one(carry[1])

    _, rows = jax.lax.while_loop(lambda c: (c[0] < steps) & ~jnp.all(c[1].done), body, (jnp.int32(0), rows))
    return rows
