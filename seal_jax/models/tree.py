"""The decoder's parameter tree, leaf by leaf, and where each leaf stands in a transformers checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from seal_jax.models.lora import GROUPS, dimensions
from seal_jax.models.spec import DecoderSpec

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the tree. Under "layers" the tensors of all layers are stacked on axis 0."""

    path: Path  # ("layers", "attn", "q_proj", "kernel")
    name: str  # of the tensor in a checkpoint, with {} for the layer
    shape: tuple[int, ...]  # [layers, in, out] for a stacked kernel
    transposed: bool = False  # checkpoints hold kernels as [out, in]

    @property
    def stacked(self) -> bool:
        return self.path[0] == "layers"

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of (each of) its tensors in a checkpoint."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape

    def names(self, spec: DecoderSpec) -> list[str]:
        """Its tensors in a checkpoint, in the order in which they are stacked."""
        return [self.name.format(i) for i in range(spec.num_layers)] if self.stacked else [self.name]


HF_GROUP = {"attn": "self_attn", "mlp": "mlp"}  # what transformers calls the two parts of a block


def leaves(spec: DecoderSpec) -> list[Leaf]:
    """All leaves of the parameters of a model."""
    n, d, block = spec.num_layers, spec.hidden_size, "model.layers.{}"
    out = [
        Leaf(("embed", "embedding"), "model.embed_tokens.weight", (spec.vocab_size, d)),
        Leaf(("final_norm", "scale"), "model.norm.weight", (d,)),
        Leaf(("layers", "input_norm", "scale"), f"{block}.input_layernorm.weight", (n, d)),
        Leaf(("layers", "post_norm", "scale"), f"{block}.post_attention_layernorm.weight", (n, d)),
    ]
    if not spec.tie_embeddings:
        out.append(Leaf(("lm_head", "kernel"), "lm_head.weight", (d, spec.vocab_size), True))
    for name, group in GROUPS.items():
        inputs, outputs = dimensions(spec, name)
        prefix = f"{block}.{HF_GROUP[group]}.{name}"
        out.append(Leaf(("layers", group, name, "kernel"), f"{prefix}.weight", (n, inputs, outputs), True))
        if spec.qkv_bias and name in ("q_proj", "k_proj", "v_proj"):
            out.append(Leaf(("layers", group, name, "bias"), f"{prefix}.bias", (n, outputs)))
    if spec.qk_norm:
        for name in ("q_norm", "k_norm"):
            out.append(Leaf(("layers", "attn", name, "scale"), f"{block}.self_attn.{name}.weight", (n, spec.head_dim)))
    return out


def abstract(spec: DecoderSpec, dtype: Any, sharding: Callable[[Path, tuple[int, ...]], Any]) -> dict[str, Any]:
    """The parameters of a model as `jax.ShapeDtypeStruct`s, with their shardings by path and shape."""
    return nest({leaf.path: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding(leaf.path, leaf.shape)) for leaf in leaves(spec)})


def nest(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """A tree from its leaves by path."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def get(tree: Mapping[str, Any], path: Path) -> Any:
    """The leaf at `path`; `KeyError` if there is none."""
    for key in path:
        tree = tree[key]
    return tree
