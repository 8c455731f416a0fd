"""How likely texts are under many adapted models at once, and how far these have moved from what they were.

Forward passes alone. Every model reads the same texts; they are mapped over, so that memory grows with the adapters of a group and
not with the texts.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from seal_jax.fit.loss import cross_entropy
from seal_jax.fit.plan import LENGTHS, padded_length
from seal_jax.models.decoder import Decoder, head, packed
from seal_jax.parallel import compiler
from seal_jax.parallel import mesh as mesh_lib

ADAPTERS = 8  # whose activations are in memory at once, on each shard
TOKENS = 512  # token slots a pass, for each adapter
POSITIONS = 1024  # whose logits are in memory at once, over the adapters of a pass


class Texts(NamedTuple):
    """Texts as C passes of R rows of L tokens."""

    inputs: np.ndarray  # [C, R, L] int32
    targets: np.ndarray  # [C, R, L] int32, the token after each input
    weights: np.ndarray  # [C, R, L] float32, 0: no label here

    @property
    def labels(self) -> int:
        """Tokens that are predicted."""
        return int(self.weights.sum())


def texts_of(sequences: Sequence[Sequence[int]], lengths: Sequence[int] = LENGTHS) -> Texts:
    """Token sequences as `Texts`, padded to one of `lengths`. Raises ValueError if no sequence has two tokens."""
    usable = [s for s in sequences if len(s) > 1]
    if not usable:
        raise ValueError("no text with a token to predict")
    length = padded_length(max(map(len, usable)) - 1, lengths)
    rows = max(1, TOKENS // length)
    shape = (-(-len(usable) // rows) * rows, length)
    inputs, targets, weights = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for row, ids in enumerate(usable):
        count = len(ids) - 1
        inputs[row, :count], targets[row, :count], weights[row, :count] = ids[:-1], ids[1:], 1.0
    return Texts(*(x.reshape(-1, rows, length) for x in (inputs, targets, weights)))


def mean_nll(decoder: Decoder, params: Any, lora: Any, texts: Texts, mesh: Mesh | None = None) -> np.ndarray:
    """The mean negative log likelihood of the texts' tokens, in nats, under each adapted model: [E] float64.

    `lora`: adapters stacked [E, ...] with their scale folded in, dealt out over the shards of `mesh` (default: one device); None: the bare
    model, and E is 1.
    """
    mesh = mesh or mesh_lib.single()
    sums = _nll(decoder, mesh, packed(params), lora, mesh_lib.put(texts, mesh_lib.everywhere(mesh)))
    return np.asarray(mesh_lib.fetch(sums), np.float64) / texts.labels


def divergence(decoder: Decoder, params: Any, before: Any, after: Any, texts: Texts, mesh: Mesh | None = None) -> np.ndarray:
    """The mean over the texts' tokens of KL(before || after) between the predictions of two adapted models, in nats: [E] float64.

    `before` and `after`: adapters as in `mean_nll`, pair by pair.
    """
    mesh = mesh or mesh_lib.single()
    sums = _divergence(decoder, mesh, packed(params), before, after, mesh_lib.put(texts, mesh_lib.everywhere(mesh)))
    return np.asarray(mesh_lib.fetch(sums), np.float64) / texts.labels


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=compiler.OPTIONS)
def _nll(decoder: Decoder, mesh: Mesh, params: Any, lora: Any, texts: Texts) -> jax.Array:
    """[E] float32, summed over the texts."""

    def one(params: Any, lora: Any, texts: Texts) -> jax.Array:
        variables = {"params": params} if lora is None else {"params": params, "lora": lora}

        def add(total: jax.Array, part: Texts) -> tuple[jax.Array, None]:
            hidden, _ = decoder.apply(variables, part.inputs)
            loss = cross_entropy(_flat(hidden), head(params), part.targets.ravel(), part.weights.ravel(), POSITIONS)
            return total + loss, None

        return jax.lax.scan(add, jnp.zeros((), jnp.float32), texts)[0]

    if lora is None:
        return one(params, None, texts)[None]
    return _each(lambda params, texts, lora: one(params, lora, texts), mesh)(params, texts, lora)


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=compiler.OPTIONS)
def _divergence(decoder: Decoder, mesh: Mesh, params: Any, before: Any, after: Any, texts: Texts) -> jax.Array:
    """[E] float32, summed over the texts."""

    def one(params: Any, texts: Texts, pair: tuple[Any, Any]) -> jax.Array:
        def add(total: jax.Array, part: Texts) -> tuple[jax.Array, None]:
            hidden = [_flat(decoder.apply({"params": params, "lora": lora}, part.inputs)[0]) for lora in pair]
            return total + _kl(*hidden, head(params), part.weights.ravel()), None

        return jax.lax.scan(add, jnp.zeros((), jnp.float32), texts)[0]

    return _each(one, mesh)(params, texts, (before, after))


def _each(one: Any, mesh: Mesh) -> Any:
    """`one(params, texts, adapter)` for every adapter of a stack: so many at once on each shard, and one such group after another."""

    def all_here(params: Any, texts: Texts, lora: Any) -> jax.Array:
        return jax.lax.map(lambda adapter: one(params, texts, adapter), lora, batch_size=ADAPTERS)

    return mesh_lib.over_edits(all_here, mesh, (mesh_lib.EVERYWHERE, mesh_lib.EVERYWHERE, mesh_lib.EDITS))


def _flat(hidden: jax.Array) -> jax.Array:
    return hidden.reshape(-1, hidden.shape[-1])


def _kl(before: jax.Array, after: jax.Array, weights_of_head: jax.Array, weights: jax.Array) -> jax.Array:
    """The weighted sum over positions of KL(before || after), for hidden states [T, D], a few positions at a time."""

    def part(x: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits = [jnp.einsum("d,vd->v", h.astype(weights_of_head.dtype), weights_of_head, preferred_element_type=jnp.float32) for h in x]
        old, new = (jax.nn.log_softmax(row) for row in logits)
        return jnp.sum(jnp.exp(old) * (old - new))

    return jnp.sum(weights * jax.lax.map(part, (before, after), batch_size=POSITIONS // ADAPTERS))
