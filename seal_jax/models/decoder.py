"""The decoder of Llama 2/3, SmolLM2, Qwen2/2.5 and Qwen3 as pure Flax Linen modules.

Variable collections: `params` is frozen and shared by every edit; `lora` holds an adapter, and only the projections that it names
get one (`seal_jax.models.lora`); `held`, where there is one, an adapter of the same kind that came before and stays as it is. Many
adapters at once are a `jax.vmap` over `lora`, `held`, tokens and cache with `params` unmapped: the frozen products then merge the edits
into rows, and only the low-rank products stay batched.

Device code: arrays in, arrays out. Shapes: B rows, T tokens, D hidden, V vocabulary, N layers, H heads, G key-value heads, h head width,
S cache positions.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from seal_jax.models.spec import DecoderSpec

PROJECTED = "projected"  # results of projections that the backward pass needs again
REMAT = {
    "dots": jax.checkpoint_policies.save_only_these_names(PROJECTED),
    "full": jax.checkpoint_policies.nothing_saveable,
}


QUERIES = 512  # tokens that attend at once in rows of twice as many or more: their square is never in memory, forward or backward
PACKED = jnp.uint16  # see `packed`
LANES = 128  # of a TPU: the length of an axis of a cache should be a multiple of them
HIDDEN = float(np.finfo(np.float32).min)  # the logit of a key that is not seen


class Cache(NamedTuple):
    """Keys and values of every layer, the layers first: a loop over layers reads each where it lies. Those of several adapters have the
    adapters as a second axis. A row's entry at position p is valid once p has been written."""

    k: jax.Array  # [N, (E,) B, G, h, S]; positions last: a query's products with all keys then run along memory
    v: jax.Array  # [N, (E,) B, G, S, h]


class Entries(NamedTuple):
    """What a call of the decoder adds to a cache: keys and values of its tokens, finite ones (see `finite`)."""

    k: jax.Array  # [N, B, T, G, h]
    v: jax.Array  # [N, B, T, G, h]


def finite(entries: Entries) -> Entries:
    """`entries` with zeros for what is not a number or infinite. A row keeps what an earlier sequence left in it, unseen: weighted with
    zero, which would make NaN of a model's that diverged."""
    return jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), entries)


def empty_cache(spec: DecoderSpec, rows: int, length: int, dtype: jnp.dtype) -> Cache:
    """A cache of zeros for `rows` rows of at most `length` positions."""
    shape, h = (spec.num_layers, rows, spec.num_kv_heads), spec.head_dim
    return Cache(jnp.zeros((*shape, h, length), dtype), jnp.zeros((*shape, length, h), dtype))


def filled(entries: Entries) -> Cache:
    """The cache that holds just `entries`, those of tokens at positions 0 .. T-1."""
    return Cache(entries.k.transpose(0, 1, 3, 4, 2), entries.v.swapaxes(2, 3))


def written(cache: Cache, entries: Entries, positions: jax.Array, by_head: bool = False) -> Cache:
    """`cache` [N, E, B, ...] with the `entries` [N, E, B, 1, G, h] of one token a row, at `positions` [E, B].

    A position past the cache's end is that of a row that is done, whose entries no one reads: none is written, or its last one. `by_head`:
    see `_as_it_lies`.
    """
    by_rows = functools.partial(_written_by_rows, by_head)
    return jax.lax.platform_dependent(cache, entries, positions, tpu=by_rows, default=_written_at_once)


def _written_at_once(cache: Cache, entries: Entries, positions: jax.Array) -> Cache:
    e, b = jnp.indices(positions.shape)
    once: dict[str, Any] = {"mode": "drop", "unique_indices": True}
    last = lambda x: jnp.moveaxis(x[:, :, :, 0], 0, 2)  # noqa: E731, [E, B, N, G, h]: what is indexed comes first
    return Cache(
        cache.k.at[:, e, b, :, :, positions].set(last(entries.k).astype(cache.k.dtype), **once),
        cache.v.at[:, e, b, :, positions].set(last(entries.v).astype(cache.v.dtype), **once),
    )


def _written_by_rows(by_head: bool, cache: Cache, entries: Entries, positions: jax.Array) -> Cache:
    """Row by row. For one scatter of them all XLA for TPUs lays the whole cache out anew, and back, and then copies each layer's part out
    of it before it can read that: of 14 GiB of caches it held two, and moved each token three times what it read.
    """

    def one(i: jax.Array, cache: Cache) -> Cache:
        e, b = i // positions.shape[1], i % positions.shape[1]
        own = lambda x, c: jax.lax.dynamic_slice(x, (0, e, b, 0, 0, 0), (x.shape[0], 1, 1, *x.shape[3:])).astype(c.dtype)  # noqa: E731
        k, v = own(entries.k, cache.k).transpose(0, 1, 2, 4, 5, 3), own(entries.v, cache.v).swapaxes(3, 4)
        k = jax.lax.dynamic_update_slice(cache.k, k, (0, e, b, 0, 0, positions[e, b]))
        v = jax.lax.dynamic_update_slice(cache.v, v, (0, e, b, 0, positions[e, b], 0))
        return _as_it_lies(Cache(k, v), by_head)

    return jax.lax.fori_loop(0, positions.size, one, _as_it_lies(cache, by_head))


def _as_it_lies(cache: Cache, by_head: bool) -> Cache:
    """A cache kept to the layout that a TPU gives it: of the last two axes of keys or values, the one that fills its lanes last.

    `by_head`: that of a head's numbers, if it does, of keys as of values. Some TPUs write along the lanes in tiles of another size than
    they read, and would lay all keys out anew, and back, for each row's token; so they do once a call.
    """

    def one(x: jax.Array, head: int) -> jax.Array:
        order = tuple(range(x.ndim))
        last = head if by_head and x.shape[head] % LANES == 0 else -1 if x.shape[-1] % LANES == 0 else -2
        return with_layout_constraint(x, Layout(order if last == -1 else (*order[:-2], order[-1], order[-2])))

    return Cache(one(cache.k, -2), one(cache.v, -1))


def rope_frequencies(spec: DecoderSpec) -> np.ndarray:
    """The inverse frequencies [h/2] of rotary position embedding, scaled as the model's config says (Llama 3.1's rule, or linear)."""
    frequencies = 1.0 / spec.rope_theta ** (np.arange(0, spec.head_dim, 2, dtype=np.float64) / spec.head_dim)
    scaling = spec.rope_scaling
    if scaling is None:
        return frequencies.astype(np.float32)
    if scaling.kind == "linear":
        return (frequencies / scaling.factor).astype(np.float32)
    wavelength = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((scaling.original_max_position / wavelength - low) / (high - low), 0.0, 1.0)
    return ((1 - smooth) * frequencies / scaling.factor + smooth * frequencies).astype(np.float32)


def rope_tables(spec: DecoderSpec, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, 1, h/2] float32 for `positions` [B, T]."""
    angles = positions[..., None, None].astype(jnp.float32) * rope_frequencies(spec)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding of `x` [B, T, heads, h], halves paired as in the Hugging Face weight layout."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, first: jax.Array | None = None) -> jax.Array:
    """Causal attention of `q` [B, T, H, h] at `positions` [B, T] over keys [B, G, h, S] and values [B, G, S, h] at positions 0 .. S-1.

    A key is seen by the queries at its own and later positions. With `first` [B, T], a query sees no key before that position. Softmax in
    float32. Returns [B, T, H, h].
    """
    rows, count, heads, width = q.shape
    if count >= 2 * QUERIES:
        rest = -count % QUERIES  # queries of zeros at position 0, which see one key, and are cut off again

        def parts(x: jax.Array) -> jax.Array:
            x = jnp.pad(x, [(0, 0), (0, rest), *[(0, 0)] * (x.ndim - 2)])
            return x.reshape(rows, -1, QUERIES, *x.shape[2:]).swapaxes(0, 1)

        one = jax.checkpoint(lambda part: attend(part[0], k, v, *part[1:]), prevent_cse=False)
        out = jax.lax.map(one, jax.tree.map(parts, (q, positions, first))).swapaxes(0, 1)
        return out.reshape(rows, count + rest, heads, width)[:, :count]
    groups, length = k.shape[1], k.shape[3]
    visible = jnp.arange(length)[None, None, :] <= positions[:, :, None]
    if first is not None:
        visible &= jnp.arange(length)[None, None, :] >= first[:, :, None]
    # One axis for all queries of a group: products of bfloat16 into float32 exist on every backend in this plain form alone.
    q = q.reshape(rows, count, groups, heads // groups, width).transpose(0, 2, 3, 1, 4).reshape(rows, groups, -1, width)
    logits = jnp.einsum("bgqh,bghs->bgqs", q, k, preferred_element_type=jnp.float32) * (1.0 / math.sqrt(width))
    logits = jnp.where(visible[:, None, None], logits.reshape(rows, groups, heads // groups, count, length), HIDDEN)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bgrts,bgsh->btgrh", weights, v).reshape(rows, count, heads, width)


def attend_one(q: jax.Array, k: jax.Array, v: jax.Array, cached: Cache, positions: jax.Array) -> jax.Array:
    """Attention of one token a row, `q` [B, H, h] at `positions` [B], to what its row has `cached` (k [B, G, h, S], v [B, G, S, h]) before
    that position, and to itself, `k` and `v` [B, G, h]. Softmax in float32. Returns [B, H, h].

    The token's own entry comes apart, so that the cache is only read here: written first, XLA for GPUs would copy each layer's out of it.
    """
    rows, heads, width = q.shape
    groups = k.shape[1]
    q = q.reshape(rows, groups, heads // groups, width)
    scale = 1.0 / math.sqrt(width)
    before = (jnp.arange(cached.k.shape[3])[None, :] < positions[:, None])[:, None, None]

    def products(q: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        logits = jnp.einsum("bgrh,bghs->bgrs", q, keys, preferred_element_type=jnp.float32) * scale
        top, weights = shares(logits)
        seen = jnp.einsum("bgrs,bgsh->bgrh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return together(top, weights, seen)

    def sums(q: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        logits = jnp.sum(q.astype(jnp.float32)[..., None] * keys[:, :, None].astype(jnp.float32), axis=-2) * scale
        top, weights = shares(logits)
        return together(top, weights, jnp.sum(weights[..., None] * values[:, :, None].astype(jnp.float32), axis=-2))

    own = jnp.sum(q.astype(jnp.float32) * k[:, :, None].astype(jnp.float32), axis=-1, keepdims=True) * scale  # [B, G, H/G, 1]

    def shares(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = jnp.where(before, logits, HIDDEN)
        top = jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), own)
        return top, jnp.where(before, jnp.exp(logits - top), 0.0)

    def together(top: jax.Array, weights: jax.Array, seen: jax.Array) -> jax.Array:
        mine = jnp.exp(own - top)
        return (seen + mine * v[:, :, None].astype(jnp.float32)) / (jnp.sum(weights, axis=-1, keepdims=True) + mine)

    # On a CPU sums, which fuse into one pass over the cache; as many tiny matrix products it is several times slower. An accelerator
    # would read the cache once for each query of a group.
    out = jax.lax.platform_dependent(q, *cached, cpu=sums, default=products)
    return out.astype(v.dtype).reshape(rows, heads, width)


class RMSNorm(nn.Module):
    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return (y * scale.astype(jnp.float32)).astype(x.dtype)


def packed(params: Any) -> Any:
    """The parameters as a CPU is fast with them: kernels of the layers in bfloat16 as integers of the same bits, all else as it is.

    A CPU knows bfloat16 in products alone. A loop over layers that carries an array of it would carry the array converted to float32, made
    anew at every step, and convert each layer's part back; integers are carried as they are.
    """
    return {**params, "layers": _pack(params["layers"])} if _packs(params, jax.default_backend()) else params


def packed_shapes(params: Any, platform: str) -> Any:
    """The shapes of `packed` on a device of `platform`; where nothing is packed, the parameters as they are. Arrays, or their shapes."""
    if not _packs(params, platform):
        return params
    bits = lambda x: jax.ShapeDtypeStruct(x.shape, PACKED, sharding=x.sharding)  # noqa: E731
    layers = jax.tree_util.tree_map_with_path(lambda path, x: bits(x) if path[-1].key == "kernel" else x, params["layers"])
    return {**params, "layers": layers}


def _packs(params: Any, platform: str) -> bool:
    return platform == "cpu" and params["layers"]["attn"]["q_proj"]["kernel"].dtype == jnp.bfloat16


@jax.jit
def _pack(layers: Any) -> Any:
    bits = lambda path, x: jax.lax.bitcast_convert_type(x, PACKED) if path[-1].key == "kernel" else x  # noqa: E731
    return jax.tree_util.tree_map_with_path(bits, layers)


def product(x: jax.Array, kernel: jax.Array, axis: int = 0) -> jax.Array:
    """x @ kernel, over the kernel's `axis`, with operands in the kernel's dtype; in the dtype of `x`."""
    if kernel.dtype == PACKED:
        kernel = jax.lax.bitcast_convert_type(kernel, jnp.bfloat16)
    return jax.lax.dot_general(x.astype(kernel.dtype), kernel, (((x.ndim - 1,), (axis,)), ((), ())), preferred_element_type=x.dtype)


@jax.custom_vjp
def projected(x: jax.Array, kernel: jax.Array, adapter: tuple[jax.Array, jax.Array] | None) -> jax.Array:
    """x @ kernel (+ x @ a @ b), for `x` [..., in], and the `adapter`'s `a` [in, r] and `b` [r, out] in the dtype of `x`."""
    return _projected(x, kernel, adapter)[0]


def _projected(x: jax.Array, kernel: jax.Array, adapter: tuple[jax.Array, jax.Array] | None) -> tuple[jax.Array, Any]:
    if adapter is None:
        return product(x, kernel), (x, kernel, None, None)
    low = x @ adapter[0]
    return product(x, kernel) + low @ adapter[1], (x, kernel, adapter, low)


def _projected_backward(saved: Any, slope: jax.Array) -> tuple[Any, ...]:
    """Automatic differentiation gives the same sums, but in an order for which the compiler makes `slope`, which is as large as the
    activations, three times over, once of them transposed. It would also keep the kernel unpacked, as if that were not a parameter."""
    x, kernel, adapter, low = saved
    slope = jax.lax.optimization_barrier(slope)
    flat = lambda y: y.reshape(-1, y.shape[-1])  # noqa: E731
    over_rows = (((0,), (0,)), ((), ()))
    kernel_slope = None  # of a packed kernel, which is frozen
    if kernel.dtype != PACKED:
        kernel_slope = jax.lax.dot_general(flat(x), flat(slope), over_rows, preferred_element_type=jnp.float32).astype(kernel.dtype)
    if adapter is None:
        return product(slope, kernel, 1), kernel_slope, None
    a, b = adapter
    low_slope = product(slope, b, 1)
    a_slope, b_slope = (jax.lax.dot_general(flat(y), flat(z), over_rows) for y, z in ((x, low_slope), (low, slope)))
    return product(slope, kernel, 1) + product(low_slope, a, 1), kernel_slope, (a_slope, b_slope)


projected.defvjp(_projected, _projected_backward)


def kept(x: jax.Array) -> jax.Array:
    """What a projection gave, for a backward pass that needs it again. An array of its own: XLA for GPUs writes a product that is kept
    straight to where those of all layers are, and computes it once more for whoever else uses it."""
    return checkpoint_name(jax.lax.optimization_barrier(x), PROJECTED)


class Linear(nn.Module):
    """x @ kernel (+ bias) (+ x @ a @ b, if the collection `lora` has this projection, and again for `held`). Compute dtype: that of `x`."""

    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.normal(0.02), (x.shape[-1], self.features))
        adapter = None
        if self.has_variable("lora", "a"):
            adapter = self.get_variable("lora", "a").astype(x.dtype), self.get_variable("lora", "b").astype(x.dtype)
        y = projected(x, kernel, adapter)
        if self.has_variable("held", "a"):
            y = y + (x @ self.get_variable("held", "a").astype(x.dtype)) @ self.get_variable("held", "b").astype(x.dtype)
        if self.use_bias:
            y = jax.lax.optimization_barrier(y) + self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return y


class Attention(nn.Module):
    spec: DecoderSpec

    @nn.compact
    def __call__(
        self, x: jax.Array, positions: jax.Array, first: jax.Array | None, cached: Cache | None, entries: bool
    ) -> tuple[jax.Array, Entries | None]:
        s = self.spec
        rows, count, _ = x.shape

        def heads(name: str, number: int) -> jax.Array:
            y = Linear(number * s.head_dim, s.qkv_bias, name=name)(x)
            return (y if entries else kept(y)).reshape(rows, count, number, s.head_dim)

        q, k, v = heads("q_proj", s.num_heads), heads("k_proj", s.num_kv_heads), heads("v_proj", s.num_kv_heads)
        if s.qk_norm:
            q, k = RMSNorm(s.norm_eps, name="q_norm")(q), RMSNorm(s.norm_eps, name="k_norm")(k)
        cos, sin = rope_tables(s, positions)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        with jax.named_scope("attend"):
            if cached is not None:
                cached = jax.tree.map(lambda c: c.astype(x.dtype), cached)
                out = attend_one(q[:, 0], k[:, 0], v[:, 0], cached, positions[:, 0])
            else:
                places = positions if first is None else jnp.broadcast_to(jnp.arange(count), (rows, count))
                out = jax.checkpoint(attend, prevent_cse=False)(q, k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), places, first)
        out = Linear(x.shape[-1], name="o_proj")(out.reshape(rows, count, s.num_heads * s.head_dim))
        return out, finite(Entries(k, v)) if entries else None


class Mlp(nn.Module):
    spec: DecoderSpec

    @nn.compact
    def __call__(self, x: jax.Array, keep: bool) -> jax.Array:
        gate, up = (Linear(self.spec.intermediate_size, name=name)(x) for name in ("gate_proj", "up_proj"))
        if keep:
            gate, up = kept(gate), kept(up)
        hidden = jax.checkpoint(lambda gate, up: jax.nn.silu(gate) * up, prevent_cse=False)(gate, up)
        return Linear(x.shape[-1], name="down_proj")(hidden)


class Block(nn.Module):
    """One layer, in the form that `nn.scan` wants: carry -> carry, with the layer's part of the cache as the scanned input and its entries
    as the scanned output."""

    spec: DecoderSpec
    entries: bool
    rows: jax.sharding.NamedSharding | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, positions: jax.Array, first: jax.Array | None, cached: Cache | None
    ) -> tuple[jax.Array, Entries | None]:
        x = x if self.rows is None else jax.lax.with_sharding_constraint(x, self.rows)
        normed = RMSNorm(self.spec.norm_eps, name="input_norm")(x)
        attended, entries = Attention(self.spec, name="attn")(normed, positions, first, cached, self.entries)
        x = x + attended
        x = x + Mlp(self.spec, name="mlp")(RMSNorm(self.spec.norm_eps, name="post_norm")(x), not self.entries)
        return x, entries


class Embed(nn.Module):
    spec: DecoderSpec

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        table = self.param("embedding", nn.initializers.normal(0.02), (self.spec.vocab_size, self.spec.hidden_size))
        return jnp.take(table, tokens, axis=0)


class Decoder(nn.Module):
    """Tokens to hidden states. The head is `logits`, apart, so that a loss can take it in chunks and decoding only at the last token.

    `rows`: where hidden states [B, T, D] lie between layers. Left to the compiler, they may go to where the kernels are, cut along D.
    """

    spec: DecoderSpec
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    rows: jax.sharding.NamedSharding | None = None

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
        first: jax.Array | None = None,
        entries: bool = False,
    ) -> tuple[jax.Array, Entries | None]:
        """Hidden states [B, T, D] after the last norm, for `tokens` [B, T] int32 at `positions` [B, T] (default 0 .. T-1), and with
        `entries` what they add to a cache.

        Without a cache, tokens see the earlier ones of their row. With one there is one token a row (T = 1), which sees itself and what the
        cache holds before its position; its entries are returned, and not yet in the cache (`written`).

        Rows of several sequences (without a cache): `first` [B, T] int32 is the index in the row of the first token of each token's own
        sequence, which is all that the token sees; `positions` then count from each sequence's beginning.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        block = Block if self.remat == "none" else nn.remat(Block, policy=REMAT[self.remat], prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0, "held": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),
            length=self.spec.num_layers,
        )
        x = Embed(self.spec, name="embed")(tokens).astype(self.dtype)
        entries = entries or cache is not None
        x, made = layers(self.spec, entries, self.rows, name="layers")(x, positions, first, cache)
        x = RMSNorm(self.spec.norm_eps, name="final_norm")(x)
        if self.is_initializing() and not self.spec.tie_embeddings:
            Linear(self.spec.vocab_size, name="lm_head")(x)
        return x, made


def head(params: Any) -> jax.Array:
    """The output embedding [V, D]: the token embedding itself where the model ties them."""
    return params["lm_head"]["kernel"].T if "lm_head" in params else params["embed"]["embedding"]


def logits(params: Any, hidden: jax.Array) -> jax.Array:
    """Logits [..., V] float32 of hidden states [..., D]."""
    weights = head(params)
    return jnp.einsum("...d,vd->...v", hidden.astype(weights.dtype), weights, preferred_element_type=jnp.float32)
