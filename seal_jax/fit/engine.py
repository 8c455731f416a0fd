"""The inner loop for many edits: plans on the host, runs `step` on the mesh, and waits for it only at the end.

Each edit is a `FitJob` with its own data and hyperparameters. They are fitted in `slots` slots a shard of one stacked state; see
`seal_jax.fit.plan` for who trains when and `seal_jax.fit.step` for what a step computes. An edit's result depends on its job alone.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from seal_jax import rng
from seal_jax.config import FitConfig, LoraConfig
from seal_jax.fit import plan
from seal_jax.fit import step as step_lib
from seal_jax.models import lora as lora_lib
from seal_jax.models.decoder import Decoder, packed, packed_shapes
from seal_jax.parallel import compiler
from seal_jax.parallel import mesh as mesh_lib
from seal_jax.parallel.mesh import EDITS, EVERYWHERE

ADMIT = 8  # edits a shard whose initial adapters are made at once
AHEAD = 8  # steps issued beyond the one whose end the host waits for, so that the device never waits for the host
LOSS_POSITIONS = 1024  # positions, over all rows of a step, whose logits are in memory at once
NONE = 1 << 30  # a slot that is nobody's: what is written there is dropped


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A tokenised training sequence: `ids`, with a loss on those from index `loss_from` on (at least 1: nothing predicts the first)."""

    ids: tuple[int, ...]
    loss_from: int = 1


@dataclasses.dataclass(frozen=True)
class FitJob:
    """One edit to fit. `key` names its random draws (`seal_jax.rng`): the initial adapter and the epoch orders.

    `held`: which of the held adapters of `FitEngine.fit` it stands on, where that is given any.
    """

    key: tuple[str | int, ...]
    sequences: tuple[Tokens, ...]
    config: FitConfig
    held: int = 0


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The adapters of J jobs, stacked and on the mesh, with what the fit measured."""

    lora: Any  # leaves [E, ...] float32, E >= J, dealt out over the shards
    places: np.ndarray  # [J] int, where in E each job's adapter is; the other entries are padding
    scale: np.ndarray  # [E] float32, alpha / rank
    held: np.ndarray  # [E] int32, which of its shard's held adapters each stands on
    losses: list[np.ndarray]  # per job, the mean loss over labels in nats of each optimiser step taken, float32
    waste: plan.Waste


# --- Device programs -----------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=(6,), compiler_options=compiler.OPTIONS)
def _step(
    decoder: Decoder, chunk: int, mesh: Mesh, penalised: bool, params: Any, held: Any, state: step_lib.FitState, batch: step_lib.Batch
) -> Any:
    """`step` on every shard. The report is the same everywhere: every process reads all of it."""

    def one(params: Any, held: Any, state: step_lib.FitState, batch: step_lib.Batch) -> Any:
        if mesh_lib.dealt(batch.inputs.size, decoder.spec.hidden_size):
            batch = mesh_lib.deal_rows(batch, mesh)
        return step_lib.step(decoder, chunk, params, state, batch, held, penalised)

    state, report = mesh_lib.over_edits(one, mesh, (EVERYWHERE, EDITS, EDITS, EDITS))(params, held, state, batch)
    return _placed(state, mesh), jax.lax.with_sharding_constraint(report, mesh_lib.everywhere(mesh))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=(4,))
def _admit(
    spec: Any, rank: int, targets: tuple[str, ...], mesh: Mesh, state: step_lib.FitState, slots: Any, keys: Any, active: Any, hyper: Any
) -> step_lib.FitState:
    def one(state: step_lib.FitState, slots: jax.Array, keys: jax.Array, active: jax.Array, hyper: step_lib.Hyper) -> step_lib.FitState:
        fresh = lambda key, used: lora_lib.init(jax.random.wrap_key_data(key, impl=rng.IMPLEMENTATION), spec, rank, targets, used)  # noqa: E731
        lora = jax.vmap(fresh)(keys, active)
        return step_lib.admit(state, slots, lora, hyper)

    return _placed(mesh_lib.over_edits(one, mesh, (EDITS,) * 5)(state, slots, keys, active, hyper), mesh)


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(1,))
def _collect(mesh: Mesh, out: Any, lora: Any, slots: jax.Array, places: jax.Array) -> Any:
    def one(out: Any, lora: Any, slots: jax.Array, places: jax.Array) -> Any:
        return jax.tree.map(lambda o, x: o.at[places].set(jnp.take(x, slots, axis=0, mode="clip"), mode="drop"), out, lora)

    where = mesh_lib.adapter_shardings(mesh, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), out))
    return jax.lax.with_sharding_constraint(mesh_lib.over_edits(one, mesh, (EDITS,) * 4)(out, lora, slots, places), where)


_scaled = jax.jit(jax.vmap(lora_lib.scaled), donate_argnums=(0,))


@functools.partial(jax.jit, static_argnums=(0,))
def _joined(mesh: Mesh, held: Any, lora: Any, index: jax.Array) -> Any:
    def one(held: Any, lora: Any, index: jax.Array) -> Any:
        return lora_lib.concatenate([jax.tree.map(lambda x: jnp.take(x, index, axis=0, mode="clip"), held), lora])

    return mesh_lib.over_edits(one, mesh, (EDITS,) * 3)(held, lora, index)


@functools.cache
def _empty(mesh: Mesh, spec: Any, rank: int, targets: tuple[str, ...], slots: int, room: int) -> Callable[[], Any]:
    """A program that makes the state of `slots` slots and place for `room` adapters, a shard."""
    shapes = adapter_shapes(spec, rank, targets)
    count = mesh_lib.shards(mesh)

    def make() -> Any:
        out = jax.tree.map(lambda x: jnp.zeros((count * room, *x.shape), x.dtype), shapes)
        return step_lib.empty_state(shapes, count * slots), out

    state = state_shardings(mesh, shapes, jax.eval_shape(make)[0])
    return jax.jit(make, out_shardings=(state, mesh_lib.adapter_shardings(mesh, shapes)))


def _placed(state: step_lib.FitState, mesh: Mesh) -> step_lib.FitState:
    """Inside a program: the state where it belongs. Left to itself, the compiler may lay out a result otherwise than it came."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state.lora)
    return jax.lax.with_sharding_constraint(state, state_shardings(mesh, shapes, state))


def adapter_shapes(spec: Any, rank: int, targets: tuple[str, ...]) -> Any:
    """The shapes of one adapter."""
    return jax.eval_shape(functools.partial(lora_lib.init, jax.random.key(0), spec, rank, targets))


def state_shardings(mesh: Mesh, shapes: Any, state: step_lib.FitState) -> step_lib.FitState:
    """Where the state of adapters of `shapes` lies."""
    adapters, edits = mesh_lib.adapter_shardings(mesh, shapes), mesh_lib.edit_sharding(mesh)
    rest = jax.tree.map(lambda _: edits, state)
    return rest._replace(lora=adapters, moments=rest.moments._replace(mu=adapters, nu=adapters))


def _abstract(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


# --- Host side -----------------------------------------------------------------------------------------------------


def epoch_steps(job: FitJob) -> int:
    """The optimiser steps of one epoch of a job."""
    return -(-len(job.sequences) // job.config.batch_size)


def total_steps(job: FitJob) -> int:
    """The optimiser steps of a job that does not end early."""
    steps = job.config.epochs * epoch_steps(job)
    return steps if job.config.max_steps is None else min(steps, job.config.max_steps)


def ends_early(job: FitJob) -> bool:
    """Whether the job's rule may end it before its last step."""
    return job.config.stop.loss > 0 or job.config.stop.gain > 0


def hyper(jobs: Sequence[FitJob]) -> step_lib.Hyper:
    """The jobs' hyperparameters as arrays [J]."""
    c = [job.config for job in jobs]
    f32, i32 = (lambda x: np.asarray(x, np.float32)), (lambda x: np.asarray(x, np.int32))
    return step_lib.Hyper(
        learning_rate=f32([x.learning_rate for x in c]),
        schedule=i32([step_lib.SCHEDULES.index(x.schedule) for x in c]),
        warmup_steps=i32([x.warmup_steps for x in c]),
        total_steps=i32([total_steps(job) for job in jobs]),
        weight_decay=f32([x.weight_decay for x in c]),
        max_grad_norm=f32([x.max_grad_norm for x in c]),
        scale=f32([x.lora.alpha / x.lora.rank for x in c]),
        epoch_steps=i32([epoch_steps(job) for job in jobs]),
        stop_loss=f32([x.stop.loss for x in c]),
        stop_gain=f32([x.stop.gain for x in c]),
        patience=i32([x.stop.patience for x in c]),
        anchor=f32([x.anchor for x in c]),
        orthogonal=f32([x.orthogonal for x in c]),
    )


def collection(fitted: Fitted, mesh: Mesh, held: Any = None) -> Any:
    """The fitted adapters as the decoder applies them, [E, ...]: scale folded in, each with the `held` one (of the same targets) that it
    was fitted on. `fitted.lora` is used up."""
    edits = mesh_lib.edit_sharding(mesh)
    lora = _scaled(fitted.lora, mesh_lib.put(fitted.scale, edits))
    return lora if held is None else _joined(mesh, held, lora, mesh_lib.put(fitted.held, edits))


class FitEngine:
    """Fits jobs with the same LoRA targets, and ranks and batch sizes up to the engine's; all else may differ from job to job.

    `params` are an argument of `fit`, so that one engine serves every policy of a run without compiling again. `slots` and
    `tokens_per_step` are those of one shard of `mesh` (default: one device).
    """

    def __init__(
        self,
        decoder: Decoder,
        lora: LoraConfig,
        *,
        slots: int,
        tokens_per_step: int,
        batch_size: int = 1,
        lengths: Sequence[int] = plan.LENGTHS,
        mesh: Mesh | None = None,
    ):
        self.decoder, self.mesh = decoder, mesh or mesh_lib.single()
        self.rank, self.targets = lora.rank, tuple(lora.targets)
        self.slots, self.tokens_per_step, self.lengths = slots, tokens_per_step, tuple(lengths)
        self.batch_size = batch_size

    def fit(
        self, params: Any, jobs: Sequence[FitJob], *, seed: int = 0, held: Any = None, progress: Callable[..., None] | None = None
    ) -> Fitted:
        """Fits every job from a fresh adapter. `progress` is called with the number of real tokens of each step that ended, and with
        the number of jobs that wait for a slot as `waiting`.

        `held`: adapters stacked [H, ...] with their scale folded in (`models.lora.scaled`), of any rank, dealt out over the shards of the
        mesh; each job is fitted on top of the one that it names, as if that were merged into the weights, and on its shard.
        Raises ValueError for a job without sequences, with other targets or a larger rank or batch size than the engine's, or with tokens
        that the model does not have.
        """
        count = 0 if held is None else jax.tree.leaves(held)[0].shape[0]
        for job in jobs:
            self._check(job)
            if not 0 <= job.held < max(count, 1):
                raise ValueError(f"job {job.key}: held adapter {job.held} of {count}")
        return _Fit(self, params, jobs, seed, held).run(progress)

    def abstract_state(self, slots: int) -> step_lib.FitState:
        """The state of `slots` slots a shard: shapes, dtypes and shardings, no arrays."""
        shapes = adapter_shapes(self.decoder.spec, self.rank, self.targets)
        state = jax.eval_shape(lambda: step_lib.empty_state(shapes, mesh_lib.shards(self.mesh) * slots))
        return jax.tree.map(_abstract, state, state_shardings(self.mesh, shapes, state))

    def shared(self, tokens: int) -> int:
        """The devices of a shard that the rows of a step of so many tokens are dealt out over."""
        return self.mesh.shape["fsdp"] if mesh_lib.dealt(tokens, self.decoder.spec.hidden_size) else 1

    def most_rows(self, length: int, slots: int) -> int:
        """The rows, a shard, of the largest step of `length` tokens with `slots` slots a shard."""
        return plan.row_choices(length, self.batch_size, self.tokens_per_step, slots, self.shared)[-1]

    def abstract_batch(self, length: int, rows: int, held: bool = False, sequences: int | None = None) -> step_lib.Batch:
        """The batch of a step of `rows` rows of `length` tokens a shard, for edits that stand on held adapters or on none.

        `sequences`: of one row; default: the engine's batch size.
        """
        tokens = (mesh_lib.shards(self.mesh) * rows, sequences or self.batch_size, length)
        kinds = ((tokens[:1], jnp.int32), (tokens, jnp.int32), (tokens, jnp.int32), (tokens, jnp.float32))
        kinds += ((tokens[:1], jnp.int32),) if held else ()
        edits = mesh_lib.edit_sharding(self.mesh)
        return step_lib.Batch(*(jax.ShapeDtypeStruct(*kind, sharding=edits) for kind in kinds))

    def trace(self, params: Any, length: int, rows: int, slots: int) -> jax.stages.Traced:
        """The program of a step of `rows` rows of `length` tokens a shard, with `slots` slots a shard, for arrays that need not exist.

        `params`: arrays, or `jax.ShapeDtypeStruct`s with their shardings.
        """
        batch, params = self.abstract_batch(length, rows), packed_shapes(params, self.mesh.devices.flat[0].platform)
        return _step.trace(self.decoder, LOSS_POSITIONS, self.mesh, False, params, None, self.abstract_state(slots), batch)

    def lower(self, params: Any, length: int, rows: int, slots: int) -> jax.stages.Lowered:
        """`trace`, lowered for the devices of the mesh."""
        return self.trace(params, length, rows, slots).lower()

    def _check(self, job: FitJob) -> None:
        c, vocabulary = job.config, self.decoder.spec.vocab_size
        if not job.sequences or not all(sequence.ids for sequence in job.sequences):
            raise ValueError(f"job {job.key}: nothing to train on{', or a sequence without tokens' * bool(job.sequences)}")
        for sequence in job.sequences:
            if not 0 <= min(sequence.ids) <= max(sequence.ids) < vocabulary:
                raise ValueError(f"job {job.key}: tokens {min(sequence.ids)} to {max(sequence.ids)} of a vocabulary of {vocabulary}")
        if tuple(c.lora.targets) != self.targets:
            raise ValueError(f"job {job.key}: lora.targets={list(c.lora.targets)}, the engine has {list(self.targets)}")
        for name, value, most in (("lora.rank", c.lora.rank, self.rank), ("batch_size", c.batch_size, self.batch_size)):
            if value > most:
                raise ValueError(f"job {job.key}: {name}={value}, the engine has room for {most}")
        if c.schedule not in step_lib.SCHEDULES:
            raise ValueError(f"job {job.key}: schedule={c.schedule!r}: expected one of {', '.join(step_lib.SCHEDULES)}")


class _Issued(NamedTuple):
    """A step under way."""

    action: plan.Step
    where: np.ndarray  # the row of each of its edits
    report: step_lib.Report
    real: int  # token slots that are real


class _Fit:
    """One call of `FitEngine.fit`: what is planned, what is on the mesh, and what was issued."""

    def __init__(self, engine: FitEngine, params: Any, jobs: Sequence[FitJob], seed: int, held: Any):
        self.engine, self.params, self.jobs, self.seed, self.held = engine, packed(params), jobs, seed, held
        self.penalised = any(job.config.anchor > 0 or job.config.orthogonal > 0 for job in jobs)
        self.mesh, self.sharding = engine.mesh, mesh_lib.edit_sharding(engine.mesh)
        self.shards = mesh_lib.shards(engine.mesh)
        self.orders = [
            plan.epoch_orders(
                len(job.sequences), job.config.epochs, job.config.batch_size, rng.generator(seed, *job.key, "order"), job.config.max_steps
            )
            for job in jobs
        ]
        most = max((len(step) for order in self.orders for step in order), default=1)
        self.sequences = min(engine.batch_size, 1 << (most - 1).bit_length())  # of a row: a batch may be larger than all that there is
        lengths = [
            [plan.padded_length(max(len(job.sequences[i].ids) - 1 for i in step), engine.lengths) for step in order]
            for job, order in zip(jobs, self.orders, strict=True)
        ]
        self.of_shard = 1 if held is None else jax.tree.leaves(held)[0].shape[0] // self.shards  # held adapters
        shard_of = plan.deal([sum(steps) for steps in lengths], self.shards) if held is None else [j.held // self.of_shard for j in jobs]
        number = [0] * self.shards  # adapters a shard
        self.places = np.zeros(len(jobs), int)
        for job, shard in enumerate(shard_of):
            self.places[job], number[shard] = number[shard], number[shard] + 1
        most = max(number, default=0)
        self.room = -(-most // ADMIT) * ADMIT if most > 1 else 1
        self.places += np.asarray(shard_of, int) * self.room
        self.slots = engine.slots  # however few the jobs: each number of slots is another set of programs
        self._schedule = functools.partial(
            plan.Schedule, lengths, self.slots, self.sequences, engine.tokens_per_step, shard_of, self.shards, engine.shared
        )
        self.schedule = self._schedule()
        self.hyper = hyper(jobs)
        self.waiting = len(jobs)
        self.waste = plan.Waste()
        self.state, self.out = _empty(self.mesh, engine.decoder.spec, engine.rank, engine.targets, self.slots, self.room)()
        self.empty = jax.tree.map(lambda x: _abstract(x, x.sharding), self.state)

    def run(self, progress: Callable[..., None] | None) -> Fitted:
        issued: list[_Issued] = []
        pending: collections.deque[_Issued] = collections.deque()
        early = any(map(ends_early, self.jobs))
        # Steps as they will come, unless edits end early.
        steps = ((step.length, step.rows) for step in self._schedule() if isinstance(step, plan.Step))
        with compiler.Ahead(self._lowered, steps, compiler.threads(self.mesh)) as programs:
            for action in self.schedule:
                if isinstance(action, plan.Admit):
                    self._admit(action)
                    self.waiting -= len(action.edits)
                elif isinstance(action, plan.Retire):
                    self._retire(action)
                else:
                    programs.ready((action.length, action.rows))
                    issued.append(self._step(action))
                    if progress is not None or early:
                        pending.append(issued[-1])
                        if len(pending) > AHEAD:
                            self._look(pending.popleft(), early, progress)
            while pending:
                self._look(pending.popleft(), False, progress)
        scale, held = np.zeros(self.shards * self.room, np.float32), np.zeros(self.shards * self.room, np.int32)
        scale[self.places], held[self.places] = self.hyper.scale, [job.held % self.of_shard for job in self.jobs]
        return Fitted(self.out, self.places, scale, held, self._losses(issued), self.waste)

    def _look(self, step: _Issued, early: bool, progress: Callable[..., None] | None) -> None:
        """Waits for a step. Edits that ended in it leave the schedule: always after the same number of steps, so that runs repeat."""
        step.report.loss.block_until_ready()
        if early:
            for edit, ended in zip(step.action.edits, np.asarray(step.report.ended)[step.where], strict=True):
                if ended:
                    self.schedule.end(edit)
        if progress is not None:
            progress(step.real, waiting=self.waiting)

    def _spread(self, slots: Sequence[int], size: int, per_shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Where in arrays of `per_shard` entries a shard the (global) `slots` come, and [shards x per_shard] slots within the shard."""
        local, taken, where = np.full(self.shards * per_shard, NONE, np.int32), [0] * self.shards, []
        for slot in slots:
            shard = slot // size
            where.append(shard * per_shard + taken[shard])
            local[where[-1]], taken[shard] = slot % size, taken[shard] + 1
        return np.asarray(where, int), local

    def _admit(self, action: plan.Admit) -> None:
        size = min(ADMIT, self.slots)
        by_shard: list[list[tuple[int, int]]] = [[] for _ in range(self.shards)]
        for edit, slot in zip(action.edits, action.slots, strict=True):
            by_shard[slot // self.slots].append((edit, slot))
        for start in range(0, max(map(len, by_shard)), size):
            part = [pair for pairs in by_shard for pair in pairs[start : start + size]]
            where, local = self._spread([slot for _, slot in part], self.slots, size)
            edits = np.full(len(local), part[0][0])
            edits[where] = [edit for edit, _ in part]
            keys = np.stack([rng.words(self.seed, *self.jobs[e].key, "adapter") for e in edits])
            active = np.asarray([self.jobs[e].config.lora.rank for e in edits], np.int32)
            arrays = mesh_lib.put((local, keys, active, jax.tree.map(lambda x, edits=edits: x[edits], self.hyper)), self.sharding)
            engine = self.engine
            self.state = _admit(engine.decoder.spec, engine.rank, engine.targets, self.mesh, self.state, *arrays)

    def _retire(self, action: plan.Retire) -> None:
        where, local = self._spread(action.slots, self.slots, self.slots)
        places = np.full(len(local), NONE, np.int32)
        places[where] = self.places[list(action.edits)] % self.room
        self.out = _collect(self.mesh, self.out, self.state.lora, *mesh_lib.put((local, places), self.sharding))

    def _lowered(self, step: tuple[int, int]) -> jax.stages.Lowered:
        """The program of a step of (length, rows), as `_step` calls it."""
        batch = self.engine.abstract_batch(*step, self.held is not None, self.sequences)
        return _step.lower(self.engine.decoder, LOSS_POSITIONS, self.mesh, self.penalised, self.params, self.held, self.empty, batch)

    def _step(self, action: plan.Step) -> _Issued:
        batch, where, real = self._batch(action)
        self.waste.slots, self.waste.tokens = self.waste.slots + batch.inputs.size, self.waste.tokens + real
        self.waste.steps += 1
        batch = mesh_lib.put(batch, self.sharding)
        self.state, report = _step(
            self.engine.decoder, LOSS_POSITIONS, self.mesh, self.penalised, self.params, self.held, self.state, batch
        )
        return _Issued(action, where, report, real)

    def _batch(self, action: plan.Step) -> tuple[step_lib.Batch, np.ndarray, int]:
        """The step's arrays, the row of each of its edits, and how many of the token slots are real."""
        where, local = self._spread(action.slots, self.slots, action.rows)
        held = None if self.held is None else np.zeros(len(local), np.int32)
        if held is not None:
            held[where] = [self.jobs[edit].held % self.of_shard for edit in action.edits]
        shape = (len(local), self.sequences, action.length)
        inputs, targets, weights = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        real = 0
        for row, edit, number in zip(where, action.edits, action.numbers, strict=True):
            for place, index in enumerate(self.orders[edit][number]):
                sequence = self.jobs[edit].sequences[index]
                ids, count = np.asarray(sequence.ids, np.int32), len(sequence.ids) - 1
                inputs[row, place, :count], targets[row, place, :count] = ids[:-1], ids[1:]
                weights[row, place, max(sequence.loss_from, 1) - 1 : count] = 1.0
                real += count
        return step_lib.Batch(local, inputs, targets, weights, held), where, real

    def _losses(self, issued: Sequence[_Issued]) -> list[np.ndarray]:
        losses = [np.full(len(order), -1.0, np.float32) for order in self.orders]
        values = jax.device_get([step.report.loss for step in issued])
        for step, loss in zip(issued, values, strict=True):
            for edit, number, value in zip(step.action.edits, step.action.numbers, loss[step.where], strict=True):
                losses[edit][number] = value
        # Steps that were issued before the host had seen that the edit had ended, or not at all, stand at -1, which no loss is.
        return [x[x != -1.0] for x in losses]
