"""Supervised fine-tuning of one model over the whole mesh: plans on the host, runs `step`, and waits for it only some steps behind.

Rows are dealt out over the mesh's axes `edit` and `fsdp`; parameters, adapters and their moments are cut as `seal_jax.parallel.mesh` says,
and the compiler puts in the communication. What comes of it depends on the sequences, the key and the hyperparameters, and but for rounding
on nothing else: not on the packing, the microbatches or the devices.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from seal_jax import rng
from seal_jax.config import FitConfig, SftConfig
from seal_jax.errors import SealError
from seal_jax.fit import engine as fit
from seal_jax.fit import plan
from seal_jax.fit.step import Hyper
from seal_jax.models import lora as lora_lib
from seal_jax.models.decoder import Decoder, packed
from seal_jax.parallel import compiler
from seal_jax.parallel import mesh as mesh_lib
from seal_jax.sft import pack
from seal_jax.sft import step as step_lib

Key = tuple[str | int, ...]
Saved = Mapping[str, Any]  # nested dicts of numpy arrays, see `SftEngine.tune`


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What came of a run, with what it measured."""

    weights: Any  # float32, on the mesh: the adapter, without its scale; or all parameters of the model
    losses: np.ndarray  # [steps] float32, the mean loss over labels in nats of each optimiser step
    waste: plan.Waste  # of the steps that were taken in this call


# --- Device programs -------------------------------------------------------------------------------------------------


def _placed(state: step_lib.SftState, mesh: Mesh) -> step_lib.SftState:
    """Inside a program: the state where it belongs."""
    return jax.lax.with_sharding_constraint(state, state_shardings(mesh, state))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=(5,), compiler_options=compiler.OPTIONS)
def _step(
    decoder: Decoder,
    chunk: int,
    mesh: Mesh,
    dtype: jnp.dtype | None,
    frozen: Any,
    state: step_lib.SftState,
    hyper: Hyper,
    rows: step_lib.Rows,
) -> tuple[step_lib.SftState, jax.Array]:
    state, loss = step_lib.step(decoder, chunk, mesh_lib.data_shards(mesh), dtype, frozen, state, hyper, rows)
    return _placed(state, mesh), jax.lax.with_sharding_constraint(loss, mesh_lib.everywhere(mesh))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _adapter(mesh: Mesh, spec: Any, rank: int, targets: tuple[str, ...], key: jax.Array) -> step_lib.SftState:
    return _placed(step_lib.start(lora_lib.init(jax.random.wrap_key_data(key, impl=rng.IMPLEMENTATION), spec, rank, targets)), mesh)


@functools.partial(jax.jit, static_argnums=(0,))
def _masters(mesh: Mesh, params: Any) -> step_lib.SftState:
    return _placed(step_lib.start(jax.tree.map(lambda x: x.astype(jnp.float32), params)), mesh)


def state_shardings(mesh: Mesh, state: step_lib.SftState) -> step_lib.SftState:
    """Where a state lies, given it or its shapes: moments as what they belong to."""
    weights = mesh_lib.parameter_shardings(mesh, state.weights)
    return step_lib.SftState(weights, optax.ScaleByAdamState(mesh_lib.everywhere(mesh), weights, weights))


# --- Host side -------------------------------------------------------------------------------------------------------


class SftEngine:
    """Trains as `config` says: an adapter of the model, or all its weights. `mesh`: default one device."""

    def __init__(self, decoder: Decoder, config: SftConfig, mesh: Mesh | None = None):
        self.config, self.mesh = config, mesh or mesh_lib.single()
        self.decoder = decoder.clone(rows=mesh_lib.hidden_sharding(self.mesh))
        self.full = config.weights == "full"

    def tune(
        self,
        params: Any,
        sequences: Sequence[fit.Tokens],
        key: Key,
        *,
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
        resume: Saved | None = None,
        save: Callable[[Saved], None] | None = None,
        checkpoint_every: int | None = None,
        save_now: Callable[[], bool] | None = None,
    ) -> Tuned:
        """Trains on `sequences`; `params` stay as they are. `key` names the random draws: the initial adapter and the epoch orders.

        `progress` is called with the number of real tokens of each step that ended. `save` is called after every `checkpoint_every` steps
        but the last, and after any for which `save_now`, asked after each, says so, with the whole state as nested dicts of numpy arrays:
        "weights", "mu", "nu" (float32), and "losses" [steps taken].
        Given as `resume` to a call that is otherwise the same, the run goes on from there and ends as if it had not stopped. In a run of
        several processes all of them save, and all must resume from the same.

        Raises ValueError where there is nothing to train on, and `SealError` for a `resume` of another model, adapter or run.
        """
        if not sequences:
            raise ValueError(f"{key}: nothing to train on")
        job = self._job(sequences, key)
        steps = plan.epoch_orders(len(sequences), self.config.epochs, self.config.batch_size, rng.generator(seed, *key, "order"))
        length = pack.row_length(sequences, self.config.row_length)
        shape = pack.shape(sequences, steps, length, self.config.microbatch, mesh_lib.data_shards(self.mesh))
        everywhere, where = mesh_lib.everywhere(self.mesh), mesh_lib.rows_sharding(self.mesh)
        hyper = mesh_lib.put(jax.tree.map(lambda x: x[0], fit.hyper([job])), everywhere)
        dtype, frozen = self._model(params)
        if resume is None:
            state, losses = self._start(params, mesh_lib.put(rng.words(seed, *key, "adapter"), everywhere)), []
        else:
            state, losses = self._restore(params, resume, len(steps))
        waste, pending = plan.Waste(), collections.deque()
        for number in range(len(losses), len(steps)):
            batch = [sequences[i] for i in steps[number]]
            rows = mesh_lib.put(pack.rows(batch, shape), where)
            state, loss = _step(self.decoder, fit.LOSS_POSITIONS, self.mesh, dtype, frozen, state, hyper, rows)
            losses.append(loss)
            real = sum(map(pack.slots, batch))
            waste = plan.Waste(waste.slots + rows.inputs.size, waste.tokens + real, waste.steps + 1)
            pending.append((loss, real))
            while len(pending) > (fit.AHEAD if number + 1 < len(steps) else 0):
                done, real = pending.popleft()
                done.block_until_ready()
                if progress is not None:
                    progress(real)
            regular = checkpoint_every and (number + 1) % checkpoint_every == 0 and number + 1 < len(steps)
            if save is not None and ((save_now is not None and save_now()) or regular):
                save(_saved(state, losses))
        return Tuned(state.weights, _values(losses), waste)

    def abstract_state(self, params: Any) -> step_lib.SftState:
        """The state of a run: shapes, dtypes and shardings, no arrays. `params`: arrays or their shapes."""
        made = jax.eval_shape(lambda: step_lib.start(self._shapes(params)))
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), made, state_shardings(self.mesh, made))

    def trace(self, params: Any, shape: pack.Shape) -> jax.stages.Traced:
        """The program of a step of `shape`, for arrays that need not exist.

        `params`: arrays, or `jax.ShapeDtypeStruct`s with their shardings.
        """
        rows, everywhere = mesh_lib.rows_sharding(self.mesh), mesh_lib.everywhere(self.mesh)
        slots = (shape.microbatches, shape.rows, shape.length)
        kinds = {name: jnp.float32 if name == "weights" else jnp.int32 for name in step_lib.Rows._fields}
        batch = step_lib.Rows(**{name: jax.ShapeDtypeStruct(slots, kind, sharding=rows) for name, kind in kinds.items()})
        hyper = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((), x.dtype, sharding=everywhere), fit.hyper([self._job((fit.Tokens((0, 0)),), ())])
        )
        dtype, frozen = self._model(params)
        return _step.trace(self.decoder, fit.LOSS_POSITIONS, self.mesh, dtype, frozen, self.abstract_state(params), hyper, batch)

    def lower(self, params: Any, shape: pack.Shape) -> jax.stages.Lowered:
        """`trace`, lowered for the devices of the mesh."""
        return self.trace(params, shape).lower()

    def _job(self, sequences: Sequence[fit.Tokens], key: Key) -> fit.FitJob:
        """The run as a job of the inner loop, which has the same hyperparameters."""
        c = self.config
        rates = (c.learning_rate, c.schedule, c.warmup_steps, c.weight_decay, c.max_grad_norm)
        return fit.FitJob(key, tuple(sequences), FitConfig(c.lora, *rates, c.epochs, c.batch_size))

    def _model(self, params: Any) -> tuple[jnp.dtype | None, Any]:
        """What the program needs of the model besides the state: the dtype of its products, or its frozen parameters."""
        if self.full:
            return jnp.dtype(jax.tree.leaves(params)[0].dtype), None
        abstract = isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct)
        return None, params if abstract else packed(params)

    def _shapes(self, params: Any) -> Any:
        """Zeros of the shapes of what trains."""
        shapes = params if self.full else fit.adapter_shapes(self.decoder.spec, self.config.lora.rank, tuple(self.config.lora.targets))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)

    def _start(self, params: Any, key: jax.Array) -> step_lib.SftState:
        if self.full:
            return _masters(self.mesh, params)
        return _adapter(self.mesh, self.decoder.spec, self.config.lora.rank, tuple(self.config.lora.targets), key)

    def _restore(self, params: Any, saved: Saved, steps: int) -> tuple[step_lib.SftState, list[Any]]:
        """The state, and the losses of the steps so far."""
        wanted, losses = self.abstract_state(params), np.asarray(saved["losses"], np.float32)
        moments = optax.ScaleByAdamState(np.asarray(len(losses), np.int32), saved["mu"], saved["nu"])
        found = step_lib.SftState(saved["weights"], moments)
        told = [jax.tree_util.tree_map(lambda x: (tuple(x.shape), jnp.dtype(x.dtype).name), tree) for tree in (found, wanted)]
        if told[0] != told[1] or len(losses) > steps:
            raise SealError("the saved state of the training is of another model, adapter or number of steps; delete it to start anew")
        return jax.tree.map(lambda x, s: mesh_lib.put(x, s.sharding), found, wanted), list(losses)


def _saved(state: step_lib.SftState, losses: Sequence[Any]) -> Saved:
    host = mesh_lib.fetch({"weights": state.weights, "mu": state.moments.mu, "nu": state.moments.nu})
    return {**host, "losses": _values(losses)}


def _values(losses: Sequence[Any]) -> np.ndarray:
    return np.asarray(jax.device_get(list(losses)), np.float32)
