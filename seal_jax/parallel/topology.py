"""`seal-jax plan`: what a config would take on devices that are not there. The real programs, compiled for them; nothing allocated.

The fit step, the prefill of questions, the decoding of answers and the M-step are compiled for every device of a topology, with abstract
arrays laid out as a run would lay them out. Of fit steps there is the usual one, whose time counts, and those that may take the most
memory: how many slots fit is found as a run finds it (`seal_jax.fit.memory`). The compiler says what each takes, computes and sends; the
time is a roofline: the longest of computing at the chip's peak, of reading once what must be read, and of sending over all of the chip's
links at once. A real run is slower, by a factor that only a measurement tells.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from seal_jax.config import RunConfig
from seal_jax.fit import memory, plan
from seal_jax.fit.engine import LOSS_POSITIONS, FitEngine, Tokens
from seal_jax.models.decoder import Decoder
from seal_jax.models.dtypes import activation_dtype, resolve_dtype
from seal_jax.models.spec import DecoderSpec
from seal_jax.models.tree import abstract, leaves
from seal_jax.parallel import collectives, cost
from seal_jax.parallel import mesh as mesh_lib
from seal_jax.parallel.targets import Target
from seal_jax.sample import decode
from seal_jax.sample.engine import cache_length
from seal_jax.sft import pack
from seal_jax.sft.engine import SftEngine
from seal_jax.words import counted


@dataclasses.dataclass(frozen=True)
class Workload:
    """What an edit is taken to be: the means of the original's knowledge experiment (one round, in tokens of a 49k vocabulary)."""

    sequences: float = 8.3  # an edit
    tokens: float = 365.0  # an edit's epoch
    questions: float = 4.9  # an edit
    question: int = 34  # tokens of a question with its instruction
    prompt: int = 164  # tokens of the prompt for a self-edit
    pair: int = 380  # tokens of a prompt and the self-edit written to it, for the M-step


@dataclasses.dataclass(frozen=True)
class Case:
    """A program to compile. Bytes are a device's."""

    name: str
    shape: str  # in words
    trace: Callable[[], Any]
    kinds: dict[str, float]  # bytes that lie there while it runs, by kind: its arguments, and what else is held
    arguments: float  # bytes of `kinds` that are its arguments
    made: float  # bytes of `kinds` that are its results
    least: float  # bytes that a call cannot but move
    calls: float  # an edit, with all shards at work; 0: not part of an edit
    items: int  # edits, adapters, sequences or microbatches that a call works on, a shard
    an_item: float  # bytes of `least` for each of them
    trips: int = 1  # of its loops of unknown length
    devices: int | None = None  # that share what the traced program shows; None: those of one shard of edits


@dataclasses.dataclass(frozen=True)
class Program:
    """A case, compiled. `bytes` by kind, on one device; `work` of one call on one device, None where the compiler refused it; `sent`:
    bytes that a device sends in a call, by the axes of the mesh that they go along; `largest`: the shape of the program that takes `bytes`,
    where it is a larger one of the kind."""

    case: Case
    bytes: dict[str, float]
    work: cost.Work | None
    sent: dict[str, float] = dataclasses.field(default_factory=dict)
    largest: str | None = None

    @property
    def total(self) -> float:
        return sum(self.bytes.values())

    def seconds(self, target: Target) -> float | None:
        """The roofline time of a call."""
        if self.work is None or not target.flops or not target.bandwidth or not target.links:
            return None
        sent = sum(self.sent.values())
        return max(self.work.flops / target.flops, self.case.least / target.bandwidth, sent / target.links)


# --- Programs --------------------------------------------------------------------------------------------------------


class Programs:
    """The programs of a run of `config` with a model of `spec`, on `mesh`; what they hold, and how often an edit needs them.

    `way`: how fits run (default: as the config says, of "auto" the fastest).
    """

    def __init__(self, config: RunConfig, spec: DecoderSpec, mesh: Mesh, workload: Workload, way: memory.Way | None = None):
        self.config, self.spec, self.mesh, self.workload = config, spec, mesh, workload
        self.shards = mesh_lib.shards(mesh)
        elsewhere = mesh.devices.flat[0].platform != "cpu"
        weights = jnp.dtype("bfloat16") if elsewhere and config.model.dtype == "auto" else resolve_dtype(config.model.dtype)
        self.way = way or memory.ways(config.model.remat, config.fit.tokens_per_step)[0]
        self.decoder = Decoder(spec, weights if elsewhere else activation_dtype(weights), memory.remats(config.model.remat)[-1])
        self.params = mesh_lib.laid_out(abstract(spec, weights, mesh_lib.parameter_sharding(mesh)), mesh)
        self.weights = cost.shard_bytes(self.params)
        f = config.fit
        options = {"tokens_per_step": self.way.tokens, "batch_size": f.batch_size, "lengths": f.lengths, "mesh": mesh}
        self.fit_engine = FitEngine(self.decoder.clone(remat=self.way.remat), f.lora, slots=1, **options)
        self.adapter = memory.adapter_bytes(self.fit_engine)
        self.answering = self.adapter * self.decoder.dtype.itemsize / 4  # bytes of an adapter while it answers
        r = config.rest_em
        self.edits = -(-min(r.group, r.contexts) * r.edits * r.seeds // self.shards)  # that a shard fits in one go
        self.fitted = -(-config.largest_group // self.shards)  # the most adapters that it has at once, of an evaluation perhaps
        self.fit_length = plan.padded_length(math.ceil(workload.tokens / workload.sequences), f.lengths)
        self.longest = plan.longest_step(1, f.lengths, self.way.tokens, f.batch_size)

    def fit(self, slots: int, length: int | None = None) -> Case:
        """A step of sequences of the usual length, or padded to `length` tokens."""
        f, w = self.config.fit, self.workload
        length = length or self.fit_length
        rows = self.fit_engine.most_rows(length, slots)
        filled = min(rows, slots)
        kinds = {"weights": self.weights, "adapters": (3 * slots + self.fitted) * self.adapter}  # with moments; results without
        return Case(
            name="fit",
            shape=f"{counted(slots, 'slot')}, steps of {rows} x {f.batch_size} x {length} tokens",
            trace=lambda: self.fit_engine.trace(self.params, length, rows, slots),
            kinds=kinds,
            arguments=self.weights + 3 * slots * self.adapter,
            made=0,
            least=_passes(self.fit_engine.decoder) * self.weights + 6 * rows * self.adapter,
            calls=w.sequences * f.epochs / (filled * f.batch_size * self.shards),
            items=filled,
            an_item=6 * self.adapter,
            trips=-(-rows * f.batch_size * length // LOSS_POSITIONS),
        )

    def _answers(self) -> tuple[int, int, int, Any, Any]:
        """Adapters a shard at once, rows of each, prompt length, the adapters, their rows."""
        a = self.config.answer
        each = min(a.rows, math.ceil(self.workload.questions))
        adapters = min(max(1, a.rows // each), self.edits)
        length = plan.padded_length(self.workload.question)
        room = cache_length(self.workload.question, self.workload.question + a.max_tokens)
        out = 1 << (a.max_tokens - 1).bit_length()
        abstract = lambda x: jax.ShapeDtypeStruct(x.shape, self.decoder.dtype, sharding=x.sharding)  # noqa: E731
        lora = jax.tree.map(abstract, self.fit_engine.abstract_state(adapters).lora)
        return adapters, each, length, lora, self._rows(adapters, each, room, out)

    def _rows(self, adapters: int, each: int, positions: int, out: int) -> decode.Rows:
        """The abstract state of `each` sequences of `adapters` adapters a shard."""
        rows = jax.eval_shape(lambda: decode.empty(self.decoder, self.mesh, self.shards * adapters, each, positions, out))
        edits, cache = mesh_lib.edit_sharding(self.mesh), mesh_lib.cache_sharding(self.mesh, self.spec.num_kv_heads)
        abstract = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)  # noqa: E731
        caches = jax.tree.map(lambda x: abstract(x, cache), rows.cache)
        return jax.tree.map(lambda x: abstract(x, edits), rows)._replace(cache=caches)

    def prefill(self) -> Case:
        adapters, each, length, lora, rows = self._answers()
        shape = (self.shards * adapters, each)
        edits = mesh_lib.edit_sharding(self.mesh)
        tokens = jax.ShapeDtypeStruct((*shape, length), jnp.int32, sharding=edits)
        lengths = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=edits)
        caches = cost.shard_bytes(rows.cache)
        positions = rows.cache.v.shape[-2]
        made = caches * length / positions
        return Case(
            name="prefill",
            shape=f"{adapters} x {each} questions of {length} tokens",
            trace=lambda: decode.prefill.trace(self.decoder, self.mesh, self.params, lora, tokens, lengths),
            kinds={
                "weights": self.weights,
                "adapters": self.fitted * self.adapter + adapters * self.answering,
                "caches": caches + made,
            },
            arguments=self.weights + adapters * self.answering,
            made=made,
            least=self.weights + adapters * self.answering + made,
            calls=1 / (adapters * self.shards),
            items=adapters,
            an_item=self.answering + made / adapters,
        )

    def decode(self) -> Case:
        adapters, each, length, lora, rows = self._answers()
        caches = cost.shard_bytes(rows.cache)
        positions = rows.cache.v.shape[-2]
        steps = jax.ShapeDtypeStruct((), jnp.int32, sharding=mesh_lib.everywhere(self.mesh))
        prefix = caches * length / positions
        return Case(
            name="decode",
            shape=f"a token of {adapters} x {each} answers, {positions} positions",
            trace=lambda: decode.decode.trace(self.decoder, self.spec.eos_ids, self.mesh, self.params, lora, rows, steps),
            # All that were fitted, and those that answer now.
            kinds={
                "weights": self.weights,
                "adapters": self.fitted * self.adapter + adapters * self.answering,
                "caches": caches + prefix,
            },
            arguments=self.weights + adapters * self.answering + caches,
            made=0,
            least=self._read() + adapters * self.answering + caches / 2,
            calls=(self.config.answer.max_tokens - 1) / (adapters * self.shards),
            items=adapters,
            an_item=self.answering + caches / 2 / adapters,
        )

    def _read(self) -> float:
        """Bytes of the weights that a decoded token needs: an embedding apart from the head is read in a few rows only."""
        head = self.spec.vocab_size * self.spec.hidden_size
        return self.weights * (1 if self.spec.tie_embeddings else 1 - head / sum(math.prod(x.shape) for x in jax.tree.leaves(self.params)))

    def write(self) -> Case:
        """The decoding of self-edits by the bare model, with caches grown to the longest that the config allows."""
        s, prompt = self.config.sample, self.workload.prompt
        tokens = min(s.max_tokens, self.config.model.max_length - prompt)
        rows = self._rows(1, s.rows, cache_length(prompt, prompt + tokens), 1 << (tokens - 1).bit_length())
        steps = jax.ShapeDtypeStruct((), jnp.int32, sharding=mesh_lib.everywhere(self.mesh))
        caches = cost.shard_bytes(rows.cache)
        return Case(
            name="write",
            shape=f"a token of {s.rows} self-edits, {rows.cache.v.shape[-2]} positions",
            trace=lambda: decode.decode.trace(self.decoder, self.spec.eos_ids, self.mesh, self.params, None, rows, steps),
            kinds={"weights": self.weights, "caches": caches},  # while it grows a quarter of them more, and nothing else
            arguments=self.weights + caches,
            made=0,
            least=self._read() + caches,  # of every position that a row may have, used or not
            calls=0,
            items=s.rows,
            an_item=caches / s.rows,
        )

    def m_step(self) -> Case:
        m, r = self.config.m_step, self.config.rest_em
        engine = SftEngine(self.decoder, m, self.mesh)
        pair = Tokens((0,) * (min(self.workload.pair, self.config.model.max_length) + 1))
        pairs = [pair] * min(m.batch_size, r.contexts)
        groups = mesh_lib.data_shards(self.mesh)
        shape = pack.shape(pairs, [range(len(pairs))], pack.row_length([pair], m.row_length), m.microbatch, groups)
        adapter = cost.shard_bytes(engine.abstract_state(self.params).weights)
        return Case(
            name="M-step",
            shape=f"{counted(len(pairs), 'pair')} in {shape.microbatches} x {shape.rows} rows of {shape.length} tokens",
            trace=lambda: engine.trace(self.params, shape),
            kinds={"weights": self.weights, "adapters": 3 * adapter},
            arguments=self.weights + 3 * adapter,
            made=0,
            least=shape.microbatches * _passes(self.decoder) * self.weights + 6 * adapter,
            calls=0,
            items=shape.microbatches,
            an_item=_passes(self.decoder) * self.weights,
            trips=-(-shape.rows // groups * shape.length // LOSS_POSITIONS),
            devices=self.mesh.size,
        )


def _passes(decoder: Decoder) -> int:
    """Over the weights, forward and backward."""
    return 3 if decoder.remat == "full" else 2


def build(case: Case, mesh: Mesh) -> Program:
    """Compiles a case for the devices of `mesh`."""
    traced = case.trace()
    try:
        compiled, text = compiled_text(traced.lower(), mesh)
    except jax.errors.JaxRuntimeError as error:
        used = memory.refused_bytes(error)
        if used is None:
            raise
        return Program(case, {**case.kinds, "temporaries": max(0.0, used - case.arguments)}, None)
    found = memory.of_program(compiled)
    rest = 0.0 if found is None else max(0.0, found.total - case.arguments - case.made)
    work = cost.of_program(traced, compiled, case.trips, case.devices or mesh.size // mesh_lib.shards(mesh))
    sent = collectives.by_axes(collectives.of_text(text, mesh.shape, case.trips))
    return Program(case, {**case.kinds, "temporaries": rest}, work, sent)


def compiled_text(lowered: jax.stages.Lowered, mesh: Mesh) -> tuple[jax.stages.Compiled, str]:
    """A program, compiled, and XLA's text of it."""
    platform = mesh.devices.flat[0].platform
    with contextlib.nullcontext() if platform == "cpu" else _uncached():
        if platform != "tpu":
            compiled = lowered.compile()
            return compiled, compiled.as_text()
        # From the compiler's own dump: `as_text` fails on some asynchronous instructions of libtpu's compiler (seen with jaxlib 0.10.2).
        with tempfile.TemporaryDirectory() as folder:
            compiled = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
            (written,) = pathlib.Path(folder).glob("*.after_optimizations.txt")
            return compiled, written.read_text(encoding="utf-8")


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Without the compilation cache: JAX writes programs for devices that are not there, but cannot read them back."""
    before = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # it has remembered whether it is in use
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


# --- The plan --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was found; `programs` are fit, prefill, decode and M-step."""

    target: Target
    workload: Workload
    mesh: dict[str, int]
    parameters: int
    dtype: str  # of the weights
    way: memory.Way  # how fits run: as the config says, or what "auto" is here
    slots: int  # a shard: fit.slots, or the most that fit; 0: not even one
    edits: int  # that a shard fits in one go: no more slots are of use
    programs: tuple[Program, ...]

    @property
    def fits(self) -> bool:
        return self.slots > 0 and all(p.work is not None and p.total <= self.target.limit for p in self.programs)

    def an_edit(self) -> dict[str, float | None]:
        """FLOP and bytes on all devices, and roofline seconds of all devices, an edit; None where it does not fit or is unknown."""
        parts = [p for p in self.programs if p.case.calls]
        if not self.fits:
            return dict.fromkeys(("flops", "bytes", "seconds", "per_hour"))
        devices = math.prod(self.mesh.values())
        seconds = [p.seconds(self.target) for p in parts]
        total = None if None in seconds else sum(p.case.calls * s for p, s in zip(parts, seconds, strict=True) if s)
        return {
            "flops": devices * sum(p.case.calls * p.work.flops for p in parts if p.work),
            "bytes": devices * sum(p.case.calls * p.work.bytes for p in parts if p.work),
            "seconds": total,
            "per_hour": 3600 / total if total else None,
        }


def make(config: RunConfig, spec: DecoderSpec, target: Target, say: Callable[[str], None] = lambda text: None) -> Plan:
    """Compiles what a run of `config` with a model of `spec` needs on `target`, with its `model.remat` and `fit.slots`, or what
    follows from the memory where these leave it open.

    Raises `SealError` for a mesh that does not fit the target.
    """
    mesh, workload = mesh_lib.make(config.mesh, target.devices), Workload()
    *others, last = memory.ways(config.model.remat, config.fit.tokens_per_step)
    for way in (*others, last):
        programs = Programs(config, spec, mesh, workload, way)
        least = 1 if way is last else min(programs.edits, memory.enough_slots(programs.fit_engine, programs.edits))
        found, fit = _fit_within(programs, target.limit, least, say)
        if found:
            break
    done = [fit]
    for case in (programs.prefill(), programs.decode(), programs.m_step()):
        say(f"compiling {case.name}: {case.shape}")
        done.append(build(case, mesh))
    count = sum(math.prod(leaf.shape) for leaf in leaves(spec))
    dtype = str(jax.tree.leaves(programs.params)[0].dtype)
    slots = found.slots if found else 0
    return Plan(target, workload, dict(mesh.shape), count, dtype, programs.way, slots, programs.edits, tuple(done))


def _fit_within(programs: Programs, limit: float, least: int, say: Callable[[str], None]) -> tuple[memory.Fits | None, Program]:
    """How many slots fit, `least` or more, and the usual step with so many, with the bytes of the largest; where none do, that with the
    fewest tried."""
    built: dict[int, dict[int, Program]] = {}  # by slots and length

    def bytes_of(slots: int) -> float:
        way = programs.way
        say(f"compiling fit with {counted(slots, 'slot')} a shard, steps of {way.tokens} tokens, remat {way.remat}")
        here = built[slots] = {}
        for length in memory.largest_steps(programs.fit_engine, programs.longest, slots):
            here[length] = build(programs.fit(slots, length), programs.mesh)
            if here[length].total > limit:
                break
        return max(program.total for program in here.values())

    most, slots = programs.edits, programs.config.fit.slots
    found = memory.most_near(bytes_of, limit, most, 3 * programs.adapter, None if slots is None else min(slots, most), least)
    slots = found.slots if found else min(built)
    largest = max(built[slots].values(), key=lambda program: program.total)
    if largest.work is None:
        return found, largest
    usual = built[slots].get(programs.fit_length) or build(programs.fit(slots), programs.mesh)
    return found, dataclasses.replace(usual, bytes=largest.bytes, largest=None if largest is usual else largest.case.shape)
