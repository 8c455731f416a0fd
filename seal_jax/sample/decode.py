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
    """A x P prefilled prompts, those at an entry A by one adapter. Rows find theirs by its number p = a * P + p', counted in the shard."""

    cache: Cache  # k [N, A, P, G, h, L], v [N, A, P, G, L, h]
    logits: jax.Array  # [A, P, V] float32, after the prompt's last token
    length: jax.Array  # [A, P] int32


class Starts(NamedTuple):
    """Q requests to start for each adapter. Leaves [E, Q, ...]."""

    row: jax.Array  # int32, the row that the request gets; R or more: there is no request. Those that are none come last
    source: jax.Array  # int32, the number of its prompt in the prefix
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
    return jax.jit(lambda: _placed(_rows(decoder, *shape), mesh))  # as `insert` and `decode` place them: to the same program for both


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
def prefill(
    decoder: Decoder, mesh: Mesh, params: Any, lora: Any, tokens: jax.Array, length: jax.Array, places: jax.Array | None = None
) -> Prefix:
    """Prompts `tokens` [A, P, L] int32, right-padded, of `length` [A, P] tokens, read by their adapters: those at `places` [A] int32 of
    `lora` [E, ...] (or None), counted within their shard; without `places`, A = E and each reads its own."""
    shard = functools.partial(_prefill, decoder)
    deal = mesh_lib.over_edits(shard, mesh, (EVERYWHERE, EDITS, EDITS, EDITS, EDITS), PREFIX)
    return _placed(deal(params, lora, tokens, length, places), mesh)


def _prefill(decoder: Decoder, params: Any, lora: Any, tokens: jax.Array, length: jax.Array, places: jax.Array | None) -> Prefix:
    def one(lora: Any, tokens: jax.Array, length: jax.Array) -> tuple[Cache, jax.Array]:
        hidden, entries = decoder.apply(_variables(params, lora), tokens, entries=True)
        last = jnp.take_along_axis(hidden, jnp.maximum(length - 1, 0)[:, None, None], axis=1)[:, 0]
        return filled(entries), logits(params, last)

    if places is not None:
        lora = jax.tree.map(lambda x: x[places], lora)
    cache, last = jax.vmap(one, out_axes=(1, 0))(lora, tokens, length)
    return Prefix(cache, last, length)


def _read(prefix: Prefix, source: jax.Array) -> Cache:
    """The caches of the prompts with the numbers `source` [Q]: k [N, Q, G, h, L], v [N, Q, G, L, h]."""
    a, p = jnp.divmod(source, prefix.length.shape[1])
    return jax.tree.map(lambda x: x[:, a, p], prefix.cache)


@functools.partial(jax.jit, static_argnums=(0,))
def only(mesh: Mesh, prefix: Prefix, source: jax.Array) -> Prefix:
    """A prefix of some of the prompts, those with the numbers `source` [Q] int32, at an entry each."""

    def shard(prefix: Prefix, source: jax.Array) -> Prefix:
        cache = jax.tree.map(lambda x: x[:, :, None], _read(prefix, source))
        return Prefix(
            cache, prefix.logits.reshape(-1, prefix.logits.shape[-1])[source][:, None], prefix.length.reshape(-1)[source][:, None]
        )

    return _placed(mesh_lib.over_edits(shard, mesh, (PREFIX, EDITS), PREFIX)(prefix, source), mesh)


@functools.partial(jax.jit, static_argnums=(0, 1))
def take(mesh: Mesh, dtype: jnp.dtype, lora: Any, index: jax.Array) -> Any:
    """The adapters at `index` [E] int32 of the stacked `lora`, counted within their shard, in the `dtype` of the activations: what each
    product would round them to, but once instead of at every token."""
    one = lambda lora, index: jax.tree.map(lambda x: x[index].astype(dtype), lora)  # noqa: E731
    return _as_adapters(mesh_lib.over_edits(one, mesh, (EDITS, EDITS))(lora, index), mesh)


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(1,))
def exchange(mesh: Mesh, own: Any, lora: Any, index: jax.Array, places: jax.Array) -> Any:
    """What `take` gave, with the adapters at `index` [Q] of `lora` in the `places` [Q] of others; a place of E or more: none."""

    def shard(own: Any, lora: Any, index: jax.Array, places: jax.Array) -> Any:
        return jax.tree.map(lambda x, y: x.at[places].set(y[index].astype(x.dtype), mode="drop"), own, lora)

    return _as_adapters(mesh_lib.over_edits(shard, mesh, (EDITS, EDITS, EDITS, EDITS))(own, lora, index, places), mesh)


def _as_adapters(lora: Any, mesh: Mesh) -> Any:
    """Inside a program: stacked adapters, where they belong."""
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), lora)
    return jax.lax.with_sharding_constraint(lora, mesh_lib.adapter_shardings(mesh, one))


@functools.partial(jax.jit, static_argnums=(0,))
def drawn(mesh: Mesh, out: jax.Array, row: jax.Array) -> jax.Array:
    """Of `Rows.out`, the rows `row` [Q] int32, numbered e * R + r within their shard: [Q, O]."""
    return mesh_lib.over_edits(lambda out, row: out.reshape(-1, out.shape[-1])[row], mesh, (EDITS, EDITS))(out, row)


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
        row, own = starts.row[:, i], _read(prefix, starts.source[:, i])
        return Cache(
            cache.k.at[:, e, row, :, :, :width].set(own.k, mode="drop"),
            cache.v.at[:, e, row, :, :width].set(own.v, mode="drop"),
        )

    most = jnp.max(jnp.sum(starts.row < rows.last.shape[1], axis=1))
    lengths, every = prefix.length.reshape(-1), jax.tree.map(_flat, starts)
    scores = _masked(prefix.logits.reshape(-1, prefix.logits.shape[-1])[every.source], guide, every.state)
    tokens = pick(scores, every.sampling, jnp.zeros_like(every.source)).reshape(starts.source.shape)  # mapped, it would do all it can

    def one(rows: Rows, starts: Starts, token: jax.Array) -> Rows:
        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            return old.at[starts.row].set(new, mode="drop")

        return Rows(
            cache=rows.cache,
            last=put(rows.last, token),
            position=put(rows.position, lengths[starts.source]),
            drawn=put(rows.drawn, jnp.ones_like(token)),
            limit=put(rows.limit, starts.limit),
            done=put(rows.done, _is_stop(token, stop) | (starts.limit <= 1)),
            out=put(rows.out, jnp.zeros((1, rows.out.shape[-1]), jnp.int32)).at[starts.row, 0].set(token, mode="drop"),
            state=put(rows.state, starts.state if guide is None else guide.advance(starts.state, token)),
            sampling=jax.tree.map(put, rows.sampling, starts.sampling),
        )

    cache = jax.lax.fori_loop(0, most, copy, rows.cache)
    return jax.vmap(one)(rows._replace(cache=()), starts, tokens)._replace(cache=cache)


def _flat(x: jax.Array) -> jax.Array:
    """[E, R, ...] as [E * R, ...]."""
    return x.reshape(-1, *x.shape[2:])


def _masked(logits: jax.Array, guide: Guide | None, state: jax.Array) -> jax.Array:
    return logits if guide is None else guide.mask(logits, state)


def _is_stop(token: jax.Array, stop: tuple[int, ...]) -> jax.Array:
    return functools.reduce(jnp.logical_or, [token == s for s in stop], jnp.zeros_like(token, bool))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(5,), compiler_options=compiler.OPTIONS)
def decode(
    decoder: Decoder, stop: tuple[int, ...], mesh: Mesh, params: Any, lora: Any, rows: Rows, steps: jax.Array, guide: Guide | None = None
) -> Rows:
    """At most `steps` (int32 scalar) further tokens for every row that is not done; a shard ends early when all of its rows are, unless
    heads are cut, or a mask meets logits that are: what a device then sends to another may be a matter of all of them, so that the
    shards end together."""
    together = mesh_lib.cuts_heads(mesh, decoder.spec) or (guide is not None and mesh.shape["fsdp"] * mesh.shape["tensor"] > 1)
    shard = functools.partial(_decode, decoder, stop, together, mesh_lib.tiling(mesh) is not None)
    deal = mesh_lib.over_edits(shard, mesh, (EVERYWHERE, EDITS, ROWS, EVERYWHERE, EVERYWHERE), ROWS)
    return _placed(deal(params, lora, rows, steps, guide), mesh)


def _decode(
    decoder: Decoder,
    stop: tuple[int, ...],
    together: bool,
    by_head: bool,
    params: Any,
    lora: Any,
    rows: Rows,
    steps: jax.Array,
    guide: Guide | None,
) -> Rows:
    def one(rows: Rows) -> Rows:
        def hidden_of(lora: Any, last: jax.Array, position: jax.Array, cache: Cache) -> tuple[jax.Array, Entries]:
            hidden, entries = decoder.apply(_variables(params, lora), last[:, None], position[:, None], cache)
            return hidden[:, 0], entries

        hidden, entries = jax.vmap(hidden_of, in_axes=(0, 0, 0, 1), out_axes=(0, 1))(lora, rows.last, rows.position, rows.cache)
        scores = _masked(_flat(logits(params, hidden)), guide, _flat(rows.state))
        token = pick(scores, jax.tree.map(_flat, rows.sampling), _flat(rows.drawn)).reshape(rows.last.shape)
        # A row that is done stays as it is, but for a cache entry that no one reads.
        token = jnp.where(rows.done, rows.last, token)
        e, r = jnp.indices(rows.last.shape)
        place = jnp.where(rows.done, rows.out.shape[-1], rows.drawn)
        live = (~rows.done).astype(jnp.int32)
        return rows._replace(
            cache=written(rows.cache, entries, rows.position, by_head),
            last=token,
            position=rows.position + live,
            drawn=rows.drawn + live,
            done=rows.done | _is_stop(token, stop) | (rows.drawn + live >= rows.limit),
            state=rows.state if guide is None else jnp.where(rows.done, rows.state, guide.advance(rows.state, token)),
            out=rows.out.at[e, r, place].set(token, mode="drop"),
        )

    def body(carry: tuple[jax.Array, Rows]) -> tuple[jax.Array, Rows]:
        return carry[0] + 1, one(carry[1])

    def goes_on(carry: tuple[jax.Array, Rows]) -> jax.Array:
        live = ~jnp.all(carry[1].done)
        return (carry[0] < steps) & (jax.lax.pmax(live.astype(jnp.int32), "edit") > 0 if together else live)

    _, rows = jax.lax.while_loop(goes_on, body, (jnp.int32(0), rows))
    return rows
