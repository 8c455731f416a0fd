"""Prefill, insert, decode: device code. E adapters with R rows each, every row at its own position of its own sequence.

A row's life: its prompt is prefilled (once, for all rows that share it), `insert` copies the prompt's cache into the row and draws the
first token, `decode` draws the others, and when the row is done the host may give it to the next request. A row under a constraint
carries the state of its automaton along. Shapes as in `seal_jax.models.decoder`. The adapters E are dealt out over the mesh's shards, and
each shard decodes for itself: none waits for another's long answers.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from seal_jax.models.decoder import Cache, Decoder, Entries, filled, logits, written
from seal_jax.parallel import compiler
from seal_jax.parallel import mesh as mesh_lib
from seal_jax.parallel.mesh import CACHES, EDITS, EVERYWHERE
from seal_jax.sample.logits import Guide, Sampling, pick


class Rows(NamedTuple):
    """The state of E x R sequences. Leaves are [E, R, ...] but for the cache."""

    cache: Cache  # k [N, E, R, G, h, S], v [N, E, R, G, S, h]
    last: jax.Array  # int32, the newest token, not yet in the cache
    position: jax.Array  # int32, its position
    drawn: jax.Array  # int32, tokens drawn so far
    limit: jax.Array  # int32, tokens that may be drawn
    done: jax.Array  # bool
    out: jax.Array  # [E, R, O] int32, the drawn tokens, the stop token included
    state: jax.Array  # int32, where in its constraint the row stands; 0: none
    sampling: Sampling  # [E, R, ...]


class Prefix(NamedTuple):
    """P prefilled prompts for each of E adapters."""

    cache: Cache  # k [N, E, P, G, h, L], v [N, E, P, G, L, h]
    logits: jax.Array  # [E, P, V] float32, after the prompt's last token
    length: jax.Array  # [E, P] int32


class Starts(NamedTuple):
    """Q requests to start for each adapter. Leaves [E, Q, ...]."""

    row: jax.Array  # int32, the row that the request gets; R or more: there is no request. Those that are none come last
    source: jax.Array  # int32, its prompt in the prefix
    limit: jax.Array  # int32
    state: jax.Array  # int32, the state that its constraint starts in; 0: none
    sampling: Sampling


ROWS = Rows(CACHES, *[EDITS] * (len(Rows._fields) - 1))  # how they are dealt out over the shards
PREFIX = Prefix(CACHES, EDITS, EDITS)


def _variables(params: Any, lora: Any) -> dict[str, Any]:
    return {"params": params} if lora is None else {"params": params, "lora": lora}


def empty(decoder: Decoder, mesh: Mesh, adapters: int, rows: int, length: int, out: int) -> Rows:
    """Rows that are all done, with room for `length` positions and `out` drawn tokens each."""
    return _empty(decoder, mesh, adapters, rows, length, out)()


@functools.cache
def _empty(decoder: Decoder, mesh: Mesh, *shape: int) -> Any:
    make = functools.partial(_rows, decoder, *shape)
    return jax.jit(make, out_shardings=_shardings(jax.eval_shape(make), mesh))


def _shardings(tree: Any, mesh: Mesh) -> Any:
    """Where `Rows` or a `Prefix` lie."""
    cache = mesh_lib.cache_sharding(mesh, tree.cache.k.shape[3])
    return jax.tree.map(lambda _: mesh_lib.edit_sharding(mesh), tree)._replace(cache=Cache(cache, cache))


def _placed(tree: Any, mesh: Mesh) -> Any:
    """Inside a program: the same, where they belong. Left to itself, the compiler may lay out a result otherwise than it came."""
    return jax.lax.with_sharding_constraint(tree, _shardings(tree, mesh))


def _rows(decoder: Decoder, adapters: int, rows: int, length: int, out: int) -> Rows:
    spec, shape = decoder.spec, (adapters, rows)
    cache = (spec.num_layers, *shape, spec.num_kv_heads)
    cache = Cache(*(jnp.zeros((*cache, *last), decoder.dtype) for last in ((spec.head_dim, length), (length, spec.head_dim))))
    zero = jnp.zeros(shape, jnp.int32)
    floats = jnp.zeros(shape, jnp.float32)
    sampling = Sampling(jnp.zeros((*shape, 2), jnp.uint32), floats, floats + 1.0, zero)
    return Rows(cache, zero, zero, zero, zero, zero == 0, jnp.zeros((*shape, out), jnp.int32), zero, sampling)


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=compiler.OPTIONS)
def prefill(decoder: Decoder, mesh: Mesh, params: Any, lora: Any, tokens: jax.Array, length: jax.Array) -> Prefix:
    """Prompts `tokens` [E, P, L] int32, right-padded, of `length` [E, P] tokens, read by their adapters (`lora` [E, ...] or None)."""
    shard = functools.partial(_prefill, decoder)
    deal = mesh_lib.over_edits(shard, mesh, (EVERYWHERE, EDITS, EDITS, EDITS), PREFIX)
    return _placed(deal(params, lora, tokens, length), mesh)


def _prefill(decoder: Decoder, params: Any, lora: Any, tokens: jax.Array, length: jax.Array) -> Prefix:
    def one(lora: Any, tokens: jax.Array, length: jax.Array) -> tuple[Cache, jax.Array]:
        hidden, entries = decoder.apply(_variables(params, lora), tokens, entries=True)
        last = jnp.take_along_axis(hidden, jnp.maximum(length - 1, 0)[:, None, None], axis=1)[:, 0]
        return filled(entries), logits(params, last)

    cache, last = jax.vmap(one, out_axes=(1, 0))(lora, tokens, length)
    return Prefix(cache, last, length)


@functools.partial(jax.jit, static_argnums=(0,))
def only(mesh: Mesh, prefix: Prefix, index: jax.Array) -> Prefix:
    """A prefix of one prompt for each adapter: the one at `index` [E] int32."""

    def shard(prefix: Prefix, index: jax.Array) -> Prefix:
        e = jnp.arange(index.shape[0])
        cache = jax.tree.map(lambda x: x[:, e, index][:, :, None], prefix.cache)
        return Prefix(cache, prefix.logits[e, index][:, None], prefix.length[e, index][:, None])

    return _placed(mesh_lib.over_edits(shard, mesh, (PREFIX, EDITS), PREFIX)(prefix, index), mesh)


@functools.partial(jax.jit, static_argnums=(0, 1))
def take(mesh: Mesh, dtype: jnp.dtype, lora: Any, index: jax.Array) -> Any:
    """The adapters at `index` [E] int32 of the stacked `lora`, counted within their shard, in the `dtype` of the activations: what each
    product would round them to, but once instead of at every token."""
    one = lambda lora, index: jax.tree.map(lambda x: x[index].astype(dtype), lora)  # noqa: E731
    return mesh_lib.over_edits(one, mesh, (EDITS, EDITS))(lora, index)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def resize(mesh: Mesh, axis: int, length: int, cached: jax.Array) -> jax.Array:
    """Keys or values of `Rows` with room for `length` positions, more or fewer, along their `axis` of positions."""
    room = [(0, 0, 0)] * cached.ndim
    room[axis] = (0, length - cached.shape[axis], 0)
    sharding = mesh_lib.cache_sharding(mesh, cached.shape[3])
    return jax.lax.with_sharding_constraint(jax.lax.pad(cached, jnp.zeros((), cached.dtype), room), sharding)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2,))
def insert(stop: tuple[int, ...], mesh: Mesh, rows: Rows, prefix: Prefix, starts: Starts, guide: Guide | None = None) -> Rows:
    """Starts requests: each gets its prompt's cache, and its first token is drawn. `stop` ids end a sequence."""
    shard = functools.partial(_insert, stop)
    deal = mesh_lib.over_edits(shard, mesh, (ROWS, PREFIX, EDITS, EVERYWHERE), ROWS)
    return _placed(deal(rows, prefix, starts, guide), mesh)


def _insert(stop: tuple[int, ...], rows: Rows, prefix: Prefix, starts: Starts, guide: Guide | None) -> Rows:
    e, width = jnp.arange(starts.row.shape[0]), prefix.cache.v.shape[-2]

    def copy(i: jax.Array, cache: Cache) -> Cache:
        """The caches of the i-th request of every adapter: one at a time, so that no second copy of them all is made."""
        row, source = starts.row[:, i], starts.source[:, i]
        return Cache(
            cache.k.at[:, e, row, :, :, :width].set(prefix.cache.k[:, e, source], mode="drop"),
            cache.v.at[:, e, row, :, :width].set(prefix.cache.v[:, e, source], mode="drop"),
        )

    most = jnp.max(jnp.sum(starts.row < rows.last.shape[1], axis=1))

    def one(rows: Rows, prefix: Prefix, starts: Starts) -> Rows:
        token = pick(_masked(prefix.logits[starts.source], guide, starts.state), starts.sampling, jnp.zeros_like(starts.source))

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            return old.at[starts.row].set(new, mode="drop")

        return Rows(
            cache=rows.cache,
            last=put(rows.last, token),
            position=put(rows.position, prefix.length[starts.source]),
            drawn=put(rows.drawn, jnp.ones_like(token)),
            limit=put(rows.limit, starts.limit),
            done=put(rows.done, _is_stop(token, stop) | (starts.limit <= 1)),
            out=put(rows.out, jnp.zeros((1, rows.out.shape[-1]), jnp.int32)).at[starts.row, 0].set(token, mode="drop"),
            state=put(rows.state, starts.state if guide is None else guide.advance(starts.state, token)),
            sampling=jax.tree.map(put, rows.sampling, starts.sampling),
        )

    cache = jax.lax.fori_loop(0, most, copy, rows.cache)
    return jax.vmap(one)(rows._replace(cache=()), prefix._replace(cache=()), starts)._replace(cache=cache)


def _masked(logits: jax.Array, guide: Guide | None, state: jax.Array) -> jax.Array:
    return logits if guide is None else guide.mask(logits, state)


def _is_stop(token: jax.Array, stop: tuple[int, ...]) -> jax.Array:
    return functools.reduce(jnp.logical_or, [token == s for s in stop], jnp.zeros_like(token, bool))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(5,), compiler_options=compiler.OPTIONS)
def decode(
    decoder: Decoder, stop: tuple[int, ...], mesh: Mesh, params: Any, lora: Any, rows: Rows, steps: jax.Array, guide: Guide | None = None
) -> Rows:
    """At most `steps` (int32 scalar) further tokens for every row that is not done; a shard ends early when all of its rows are."""
    shard = functools.partial(_decode, decoder, stop)
    deal = mesh_lib.over_edits(shard, mesh, (EVERYWHERE, EDITS, ROWS, EVERYWHERE, EVERYWHERE), ROWS)
    return _placed(deal(params, lora, rows, steps, guide), mesh)


def _decode(decoder: Decoder, stop: tuple[int, ...], params: Any, lora: Any, rows: Rows, steps: jax.Array, guide: Guide | None) -> Rows:
    def one(rows: Rows) -> Rows:
        def hidden_of(lora: Any, last: jax.Array, position: jax.Array, cache: Cache) -> tuple[jax.Array, Entries]:
            hidden, entries = decoder.apply(_variables(params, lora), last[:, None], position[:, None], cache)
            return hidden[:, 0], entries

        hidden, entries = jax.vmap(hidden_of, in_axes=(0, 0, 0, 1), out_axes=(0, 1))(lora, rows.last, rows.position, rows.cache)
        flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
        scores = _masked(flat(logits(params, hidden)), guide, flat(rows.state))
        token = pick(scores, jax.tree.map(flat, rows.sampling), flat(rows.drawn)).reshape(rows.last.shape)
        # A row that is done stays as it is, but for a cache entry that no one reads.
        token = jnp.where(rows.done, rows.last, token)
        e, r = jnp.indices(rows.last.shape)
        place = jnp.where(rows.done, rows.out.shape[-1], rows.drawn)
        live = (~rows.done).astype(jnp.int32)
        return rows._replace(
            cache=written(rows.cache, entries, rows.position),
            last=token,
            position=rows.position + live,
            drawn=rows.drawn + live,
            done=rows.done | _is_stop(token, stop) | (rows.drawn + live >= rows.limit),
            state=rows.state if guide is None else jnp.where(rows.done, rows.state, guide.advance(rows.state, token)),
            out=rows.out.at[e, r, place].set(token, mode="drop"),
        )

    def body(carry: tuple[jax.Array, Rows]) -> tuple[jax.Array, Rows]:
        return carry[0] + 1, one(carry[1])

    _, rows = jax.lax.while_loop(lambda c: (c[0] < steps) & ~jnp.all(c[1].done), body, (jnp.int32(0), rows))
    return rows
