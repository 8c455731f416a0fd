"""The device mesh, and which array lies where on it: all rules in one place.

Three axes. `edit`: edits (slots, adapters, rows of answers) are dealt out over it, so that K grows with the devices; nothing crosses it
while an edit is fitted. `fsdp` and `tensor` share what is too large for one device: every kernel is cut along both (the embeddings over
the vocabulary alone), and the compiler puts in the communication. Rows of a step with many tokens are dealt out over `fsdp` as well.

The engines of many edits run their programs under `jax.shard_map` over `edit` alone: inside, a device sees the edits of its own shard, and
indices count within it. The other two axes stay the compiler's. Where one model is trained (`seal_jax.sft`) there are no edits: its rows
are dealt out over `edit` and `fsdp` together, and all axes are the compiler's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from seal_jax.config import MeshConfig
from seal_jax.errors import SealError
from seal_jax.models.spec import DecoderSpec

AXES = ("edit", "fsdp", "tensor")
SHARED = ("tensor", "fsdp")  # what shares a model too large for one device
EDITS = P("edit")  # a leading axis dealt out over the shards
CACHES = P(None, "edit")  # caches [N, E, ...]
EVERYWHERE = P()
# How the matrix units of a chip read arrays in bfloat16, where that is not how XLA lays them out by itself: it would lay all kernels, and
# caches, out anew, beside the old, in every call (seen with libtpu 0.0.52).
TILINGS: dict[str, tuple[tuple[int, ...], ...]] = {"TPU7x": ((16, 128), (2, 1))}

# A kernel [N, in, out] by what its projection reads and writes; biases [N, out] follow the last axis.
COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # the outputs (heads, features) are cut over `tensor`
ROW = ("o_proj", "down_proj")  # the inputs are, and the partial products are added up


def make(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that `config` asks for, over `devices` (default: all). Raises `SealError` if they cannot be laid out so."""
    devices = list(jax.devices() if devices is None else devices)
    rest = config.fsdp * config.tensor
    if config.edit == -1 and len(devices) % rest:
        raise SealError(f"mesh: fsdp={config.fsdp} x tensor={config.tensor} does not divide the {len(devices)} devices")
    edit = len(devices) // rest if config.edit == -1 else config.edit
    if edit * rest > len(devices):
        raise SealError(
            f"mesh: edit={edit} x fsdp={config.fsdp} x tensor={config.tensor} needs {edit * rest} devices, there are {len(devices)}"
        )
    if edit * rest < len(devices) and jax.process_count() > 1:
        raise SealError(f"mesh: edit={edit} x fsdp={config.fsdp} x tensor={config.tensor} leaves devices out, and with them processes")
    shape = (edit, config.fsdp, config.tensor)
    return Mesh(np.asarray(devices[: edit * rest]).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)


@functools.cache
def single() -> Mesh:
    """The mesh of the first local device alone."""
    return Mesh(np.asarray(jax.local_devices()[:1]).reshape(1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3)


def shards(mesh: Mesh) -> int:
    """How many shards edits are dealt out to."""
    return mesh.shape["edit"]


# --- Where arrays lie ----------------------------------------------------------------------------------------------


def parameter_spec(path: Sequence[str], shape: Sequence[int], mesh: Mesh) -> P:
    """How the parameter (or adapter leaf without its axis of edits) at `path` is cut. An axis that does not divide is not cut."""
    name, owner = path[-1], path[-2] if len(path) > 1 else ""
    if name == "embedding" or owner == "lm_head":
        # Both axes along the vocabulary: with one axis each way, or one alone, XLA's partitioner aborts on the gather of an embedding (seen
        # with jaxlib 0.10.2 and 0.11.2).
        wanted = (SHARED,) if name == "embedding" else (None, SHARED)
    elif owner in COLUMN:
        wanted = {"kernel": (None, "fsdp", "tensor"), "bias": (None, "tensor"), "a": (), "b": (None, None, "tensor")}[name]
    elif owner in ROW:
        wanted = {"kernel": (None, "tensor", "fsdp"), "bias": (), "a": (None, "tensor"), "b": ()}[name]
    else:
        wanted = ()

    def parts(axes: str | tuple[str, ...]) -> int:
        return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))

    return P(*(axes if axes and not size % parts(axes) else None for axes, size in zip(wanted, shape, strict=False)))


def parameter_sharding(mesh: Mesh) -> Callable[[tuple[str, ...], tuple[int, ...]], NamedSharding]:
    """`(path, shape) -> sharding` for loading a model's parameters straight to where they belong."""
    return lambda path, shape: NamedSharding(mesh, parameter_spec(path, shape, mesh))


def parameter_shardings(mesh: Mesh, tree: Any) -> Any:
    """The shardings of a tree of parameters, or of one adapter that every shard of edits has: of arrays, or of their shapes."""
    return jax.tree_util.tree_map_with_path(lambda path, x: parameter_sharding(mesh)(tuple(k.key for k in path), x.shape), tree)


def tiling(mesh: Mesh) -> tuple[tuple[int, ...], ...] | None:
    """How large arrays in bfloat16 are tiled in the memory of the devices of `mesh`; None: as XLA does by itself."""
    return TILINGS.get(mesh.devices.flat[0].device_kind)


def laid_out(params: Any, mesh: Mesh) -> Any:
    """The parameters (consumed), or their shapes, with the kernels in memory as the devices of `mesh` read them. A model shared by several
    devices stays as it is: XLA's partitioner drops the layout of what it cuts."""
    shared = any(mesh.shape[axis] > 1 for axis in SHARED)
    tiles = None if shared else tiling(mesh)

    def one(path: tuple[Any, ...], x: Any) -> Any:
        if tiles is None or path[-1].key != "kernel" or x.dtype != jnp.bfloat16:
            return x
        where = Format(Layout(tuple(range(x.ndim)), tiles), x.sharding)
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
        return jax.device_put(x, where, donate=True)

    return jax.tree_util.tree_map_with_path(one, params)


def adapter_shardings(mesh: Mesh, shapes: Any) -> Any:
    """The shardings of stacked adapters, for `shapes` of one adapter (without the leading axis of edits)."""

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, P("edit", *parameter_spec([k.key for k in path], leaf.shape, mesh)))

    return jax.tree_util.tree_map_with_path(one, shapes)


def edit_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose leading axis counts edits, slots or rows."""
    return NamedSharding(mesh, EDITS)


def cache_sharding(mesh: Mesh, kv_heads: int) -> NamedSharding:
    """The sharding of stacked caches [N, E, B, G, ...] with `kv_heads` G."""
    return NamedSharding(mesh, P(*CACHES, None, None if kv_heads % mesh.shape["tensor"] else "tensor"))


def cuts_heads(mesh: Mesh, spec: DecoderSpec) -> bool:
    """Whether `tensor` cuts projections within a head of attention, the two halves of which rotary embedding then brings together."""
    return bool(spec.num_heads % mesh.shape["tensor"] or spec.num_kv_heads % mesh.shape["tensor"])


def data_shards(mesh: Mesh) -> int:
    """How many shards the rows of one model's training step are dealt out to."""
    return mesh.shape["edit"] * mesh.shape["fsdp"]


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of one model's training rows [A, R, ...]: A microbatches after one another, of R rows dealt out over the data shards."""
    return NamedSharding(mesh, P(None, ("edit", "fsdp")))


def hidden_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of the hidden states [R, T, D] of such rows."""
    return NamedSharding(mesh, P(("edit", "fsdp")))


def everywhere(mesh: Mesh) -> NamedSharding:
    """The sharding of small arrays that every device has whole."""
    return NamedSharding(mesh, EVERYWHERE)


# --- Crossing the border -------------------------------------------------------------------------------------------


def put(tree: Any, sharding: NamedSharding) -> Any:
    """Host arrays on the mesh. In a run of several processes each has the whole of them and places its own part."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree)


def fetch(tree: Any) -> Any:
    """The arrays of `tree` as numpy arrays, whole, on every process."""
    local = [x.is_fully_addressable or x.is_fully_replicated for x in jax.tree.leaves(tree)]
    return jax.device_get(tree) if all(local) else multihost_utils.process_allgather(tree, tiled=True)


def over_edits(function: Callable[..., Any], mesh: Mesh, arguments: Sequence[Any], results: Any = EDITS) -> Callable[..., Any]:
    """`function` run once a shard. `arguments` and `results` say of each how it is dealt out over `edit`: `EDITS`, `CACHES`, `EVERYWHERE`,
    or a tree of them. Within it, arrays hold the shard's part.
    """
    return jax.shard_map(function, mesh=mesh, in_specs=tuple(arguments), out_specs=results, axis_names={"edit"}, check_vma=False)


def dealt(tokens: int, width: int) -> bool:
    """Whether the rows of a fit step of so many tokens, of a model of hidden size `width`, are dealt out over `fsdp`.

    Then every device needs all of each layer's kernels, sent to it. Where they are not, it computes with its own part of the kernels, and
    partial products are sent, which is less for few tokens: of a step of five sequences of 48 tokens of a 70B, fsdp=4 x tensor=8, 3 GB
    instead of 27 (compiled for a v5e). Reckoned from the sizes of its kernels, the two are equal at about 0.4 times the width.
    """
    return 2 * tokens >= width


def deal_rows(tree: Any, mesh: Mesh) -> Any:
    """Inside `over_edits`: the leading axis of the leaves, rows of a step, dealt out over `fsdp` where it divides."""
    size = mesh.shape["fsdp"]
    if size == 1:
        return tree
    here = NamedSharding(jax.sharding.get_abstract_mesh(), P("fsdp"))
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, here) if x.ndim and not x.shape[0] % size else x, tree)


def gathered(tree: Any) -> Any:
    """Inside `over_edits`: what `deal_rows` dealt out, whole on every device of the shard again."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.shape.get("fsdp", 1) == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, EVERYWHERE))


def gathered_rows(tree: Any) -> Any:
    """The same of the leading axis alone; how the others are cut stays the compiler's."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.shape.get("fsdp", 1) == 1:
        return tree
    where = lambda x: NamedSharding(mesh, P(None, *[P.UNCONSTRAINED] * (x.ndim - 1)))  # noqa: E731
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, where(x)), tree)


def as_adapters(tree: Any) -> Any:
    """Inside `over_edits`: stacked adapters, and what is of their form, cut as `adapter_shardings` has them between calls.

    Said of gradients and of what a loop carries. Left to the partitioner, one gradient that came out cut another way had the adapters and
    moments of all slots cut like it, and sent around to be put together again at each step.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if all(mesh.shape.get(axis, 1) == 1 for axis in SHARED):
        return tree

    def one(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        where = NamedSharding(mesh, P(None, *parameter_spec([k.key for k in path if hasattr(k, "key")], x.shape[1:], mesh)))
        return jax.lax.with_sharding_constraint(x, where)

    return jax.tree_util.tree_map_with_path(one, tree)
