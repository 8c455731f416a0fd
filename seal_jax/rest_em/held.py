"""What lanes have learnt so far: one adapter a lane, the edits' ranks side by side. Kept on the host, placed on the mesh when changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from seal_jax.fit.engine import Fitted, adapter_shapes
from seal_jax.parallel import mesh as mesh_lib
from seal_jax.rest_em.policy import Policy


class Held:
    """Adapters of `lanes` lanes with room for `edits` edits each, at first all zero. Scales are folded in."""

    def __init__(self, policy: Policy, lanes: int, edits: int):
        lora = policy.config.fit.lora
        self.policy, self.rank, self.lanes = policy, lora.rank, lanes
        self.shapes = adapter_shapes(policy.decoder.spec, lora.rank * edits, tuple(lora.targets))
        self.count = -(-lanes // mesh_lib.shards(policy.mesh)) * mesh_lib.shards(policy.mesh)  # as many on each shard
        self._tree = jax.tree.map(lambda x: np.zeros((self.count, *x.shape), np.float32), self.shapes)
        self._placed: Any = None

    def placed(self) -> Any:
        """The adapters on the mesh: [E, ...], lane i at place i."""
        if self._placed is None:
            self._placed = self.place(self._tree)
        return self._placed

    def place(self, tree: Any) -> Any:
        """Host adapters of this form, [E, ...], on the mesh. E must divide over the shards."""
        return jax.tree.map(mesh_lib.put, tree, mesh_lib.adapter_shardings(self.policy.mesh, self.shapes))

    def fresh(self, fitted: Fitted, lanes: Sequence[int]) -> Any:
        """Fitted adapters of the lanes `lanes`, in their order, as host arrays [L, ...] for all lanes; zero for the others."""
        lora = mesh_lib.fetch(fitted.lora)
        scale = fitted.scale[fitted.places]

        def spread(path: tuple[Any, ...], x: np.ndarray) -> np.ndarray:
            out = np.zeros((self.lanes, *x.shape[1:]), np.float32)
            own = x[fitted.places]
            out[list(lanes)] = own * scale[:, None, None, None] if path[-1].key == "b" else own
            return out

        return jax.tree_util.tree_map_with_path(spread, lora)

    def of(self, lanes: Sequence[int]) -> Any:
        """Copies of the adapters of `lanes`, in their order, on the host."""
        return jax.tree.map(lambda x: x[list(lanes)], self._tree)

    def with_edit(self, lanes: Sequence[int], number: int, new: Any, scales: Sequence[float]) -> Any:
        """`of(lanes)` with their part of `new` (all lanes', [L, ...]) as edit `number`, each scaled by its own of the `scales` [L]."""
        tree = self.of(lanes)
        self._write(tree, number, jax.tree.map(lambda x: x[list(lanes)], new), [scales[i] for i in lanes])
        return tree

    def keep(self, number: int, new: Any, scales: Sequence[float]) -> None:
        """Makes `new` [L, ...] the lanes' edit `number`, each scaled: 0 leaves a lane as it was."""
        self._write(self._tree, number, new, scales)
        self._placed = None

    def _write(self, tree: Any, number: int, new: Any, scales: Sequence[float]) -> None:
        """Writes scaled edits into the first adapters of `tree`, as many as there are."""
        count = len(scales)
        by = np.asarray(scales, np.float32)[:, None, None, None]
        columns = slice(number * self.rank, (number + 1) * self.rank)

        def write(path: tuple[Any, ...], x: np.ndarray, part: np.ndarray) -> None:
            if path[-1].key == "a":
                x[:count, ..., columns] = np.where(by > 0, part, 0.0)
            else:
                x[:count, :, columns] = np.where(by > 0, part * by, 0.0)  # what was refused may be NaN

        jax.tree_util.tree_map_with_path(write, tree, new)

    def part(self, number: int) -> Any:
        """The lanes' edit `number` as it is held: [L, ...]."""
        columns = slice(number * self.rank, (number + 1) * self.rank)
        pick = lambda path, x: x[: self.lanes, ..., columns] if path[-1].key == "a" else x[: self.lanes, :, columns]  # noqa: E731
        return jax.tree_util.tree_map_with_path(pick, self._tree)

    def saved(self, number: int, lanes: int) -> Any:
        """The edit `number` of the first `lanes` lanes, to be kept as a checkpoint."""
        return jax.tree.map(lambda x: x[:lanes], self.part(number))

    def load(self, part: Any, number: int) -> None:
        """Takes the lanes' edit `number` from a checkpoint of all lanes, or of one that all are like."""
        part = jax.tree.map(lambda x: np.broadcast_to(x, (self.lanes, *x.shape[1:])), part)
        self.keep(number, part, [1.0] * self.lanes)
