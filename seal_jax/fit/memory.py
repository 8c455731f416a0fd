"""How many edits fit into a device's memory, asked of the compiler: nothing is allocated to find out.

A fit step's memory grows about linearly with its slots (adapters and moments), so that what fits can be reckoned, and a compilation or
two confirm it.
"""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from seal_jax.errors import SealError
from seal_jax.fit.engine import FitEngine
from seal_jax.fit.plan import longest_step
from seal_jax.models.decoder import packed_shapes
from seal_jax.parallel import compiler
from seal_jax.parallel.cost import shard_bytes

SHARE = 0.9  # of a device's memory that programs may take; the rest is the runtime's, and lost between buffers
CPU_SHARE = 0.5  # the same of a machine's main memory, which others use too
CONTAINER = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # where Linux says what a container may have
TRIES = 8  # compilations at most
SET = "set fit.slots to a number, and model.remat to none or full"  # what to do where nobody tells
AUTO = ("none", "full")  # what `model.remat` "auto" is in fits: the faster one where it leaves room for enough slots
# Token slots of a step, at least, for which it pays to make steps smaller rather than recompute: several times as many as a chip computes
# with while it reads the weights (240 to 560 of the chips in `parallel.chips`).
NARROW = 1024


class Bytes(NamedTuple):
    """What a compiled program takes on one device, in bytes."""

    arguments: int
    results: int  # beyond those that take the place of arguments
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        return sum(self)


class Way(NamedTuple):
    """How fits run."""

    remat: str  # what the backward pass recomputes
    tokens: int  # token slots a step


class Fits(NamedTuple):
    """The largest number of slots that fits, and what it takes: bytes a device, confirmed by a compilation."""

    slots: int
    bytes: int


def of_program(compiled: Any) -> Bytes | None:
    """The memory of a compiled program; None where the backend does not tell."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    results = max(0, found.output_size_in_bytes - found.alias_size_in_bytes)
    return Bytes(found.argument_size_in_bytes, results, found.temp_size_in_bytes, found.generated_code_size_in_bytes)


def refused_bytes(error: Exception) -> float | None:
    """What a program would take that the compiler refused for want of memory; inf if it does not say, None for another error."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    # The compiler's total in both, arguments included; the second, of libtpu 0.0.52, calls it temporaries.
    found = re.search(r"Used ([\d.]+)([KMGT]?) of", text) or re.search(r"required for [\w ]+ \(([\d.]+)([KMGT]?)\) exceeds", text)
    return float(found[1]) * 1024.0 ** " KMGT".index(found[2] or " ") if found else math.inf


def most_near(
    bytes_of: Callable[[int], float], limit: float, most: int, slope: float, given: int | None = None, least: int = 1
) -> Fits | None:
    """The largest K in [least, most] for which `bytes_of(K)`, about linear in K, is at most `limit`; or `given`, if it is one such. None:
    there is none.

    `bytes_of` is dear (it compiles): `most` is asked first, which is often enough, then `least`, if that is more than 1, then what follows
    from `slope`, a guess of what one more takes, or from a line through the last two points. What is returned has been asked for.
    """
    if given is not None:
        return Fits(given, int(used)) if (used := bytes_of(given)) <= limit else None
    good, bad, k, before, asked = Fits(least - 1, 0), most + 1, most, None, 0
    while good.slots < k < bad and asked < TRIES:
        used, asked = bytes_of(k), asked + 1
        if used <= limit:
            good = Fits(k, int(used))
        else:
            bad = k
        if math.isfinite(used):
            if before is not None and used != before[1]:
                slope = (used - before[1]) / (k - before[0])
            before = k, used
        told = math.isfinite(used) and slope > 0
        near = k + math.floor((limit - used) / slope) if told else (good.slots + bad) // 2
        # Whether the least fits is worth knowing first: often nothing that would be of use does.
        k = least if bad == most and not good.bytes and least > 1 else min(bad - 1, max(least, near))
    return good if good.bytes else None


def largest_steps(engine: FitEngine, length: int, slots: int) -> list[int]:
    """Of the padded lengths up to `length`, those whose steps may be the largest with `slots` slots a shard, the likeliest first."""
    rows = {each: engine.most_rows(each, slots) for each in {length, *(each for each in engine.lengths if each < length)}}
    fullest = max(rows, key=lambda each: (each * rows[each], rows[each]))  # few long rows may be fewer tokens than many short ones
    most = max(rows, key=lambda each: (rows[each], each))  # and each row has a copy of its adapter, and gradients
    return list(dict.fromkeys((fullest, length, most)))


def step_bytes(engine: FitEngine, params: Any, length: int, slots: int) -> float:
    """Bytes a device of fit steps of up to `length` tokens with `slots` slots a shard; inf where the compiler refuses for want of memory.

    `params`: arrays, or `jax.ShapeDtypeStruct`s with their shardings. Raises `SealError` where the backend does not tell.
    """
    asked = largest_steps(engine, length, slots)
    with ThreadPoolExecutor(max(1, compiler.threads(engine.mesh)), "compile") as pool:
        return max(pool.map(lambda each: _step_bytes(engine, params, each, slots), asked))


def _step_bytes(engine: FitEngine, params: Any, length: int, slots: int) -> float:
    try:
        found = of_program(engine.lower(params, length, engine.most_rows(length, slots), slots).compile())
    except jax.errors.JaxRuntimeError as error:
        if (used := refused_bytes(error)) is None:
            raise
        return used
    if found is None:
        raise SealError(f"this backend does not tell what a program takes; {SET}")
    return float(found.total) + _kept_as_loaded(engine, params)


def _kept_as_loaded(engine: FitEngine, params: Any) -> int:
    """Bytes a device of weights that are there beside those that a step reads (`seal_jax.models.decoder.packed`)."""
    read = jax.tree.leaves(packed_shapes(params, engine.mesh.devices.flat[0].platform))
    return shard_bytes([x for x, other in zip(jax.tree.leaves(params), read, strict=True) if x.dtype != other.dtype])


def adapter_bytes(engine: FitEngine) -> int:
    """Bytes a device of one fitted adapter."""
    return shard_bytes(engine.abstract_state(1).lora)


def device_limit(mesh: Mesh) -> float:
    """Bytes that programs may take on each device of `mesh`.

    Raises `SealError` where neither the device nor the machine tells.
    """
    device = next(d for d in mesh.devices.flat if d.process_index == jax.process_index())
    if device.platform == "cpu":
        return CPU_SHARE * _main_memory() / len(mesh.local_devices)
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        raise SealError(f"{device.device_kind} does not tell how much memory it has; {SET}")
    return SHARE * stats["bytes_limit"]


def _main_memory() -> int:
    """Bytes of main memory that this process may have: the machine's, or its container's."""
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        raise SealError(f"this machine does not tell how much memory it has; {SET}") from None
    for limit in CONTAINER:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            found = min(found, int(pathlib.Path(limit).read_text()))
    return found


def remats(remat: str) -> tuple[str, ...]:
    """What the backward pass of a fit may recompute by the config's `model.remat`, the fastest first."""
    return AUTO if remat == "auto" else (remat,)


def ways(remat: str, tokens: int) -> tuple[Way, ...]:
    """How fits may run by the config's `model.remat` and `fit.tokens_per_step`, the fastest first: of "auto" without recomputing, in steps
    as large, half or a quarter as large, and only then with it."""
    if remat != "auto":
        return (Way(remat, tokens),)
    return *(Way(AUTO[0], tokens // part) for part in (1, 2, 4) if part == 1 or tokens // part >= NARROW), Way(AUTO[-1], tokens)


def enough_slots(engine: FitEngine, edits: int) -> int:
    """The slots a shard without which steps would be too small for what not recomputing saves: a quarter of a full step's rows."""
    return max(1, engine.most_rows(min(engine.lengths), edits) // 4)


def slots_that_fit(
    engine: FitEngine, params: Any, length: int, edits: int, *, most: int | None = None, held: int = 0, limit: float | None = None
) -> int:
    """How many slots a shard, `most` (default: `edits`) at most, an engine may have to fit `edits` edits a shard, sequences padded to at
    most `length` tokens.

    `held`: bytes a device that are neither the weights nor the engine's while it fits. `limit`: bytes a device, default
    `device_limit`. The adapters that come of the `edits` are counted. Raises `SealError` if not even one slot fits.
    """
    limit = device_limit(engine.mesh) if limit is None else limit
    bytes_of = _beside(engine, params, length, edits, held)
    found = most_near(bytes_of, limit, edits if most is None else min(most, edits), 3 * adapter_bytes(engine))
    if found is None:
        takes = f"{used / 2**30:.1f} GiB a device" if math.isfinite(used := bytes_of(1)) else "more than the compiler allows"
        raise SealError(
            f"one edit of {length} tokens takes {takes}, {limit / 2**30:.1f} GiB are to be had; "
            "share the model (mesh.fsdp, mesh.tensor), model.remat=full, or model.max_length lower"
        )
    return found.slots


def settle(
    engines: Sequence[FitEngine], params: Any, longest: int, edits: int, slots: int | None, *, held: int = 0
) -> tuple[FitEngine, int]:
    """Of `engines` that need ever less memory, the first that has room for enough slots, and how many: `slots`, or as many as fit.

    `longest`: tokens of the longest sequence. The rest as for `slots_that_fit`. The last of them need not have room for enough, nor for
    `slots`, which then are the caller's word.
    """
    limit = device_limit(engines[0].mesh)
    for engine in engines[:-1]:
        bytes_of = _beside(engine, params, _length(engine, longest), edits, held)
        least = min(edits, enough_slots(engine, edits))
        if found := most_near(bytes_of, limit, edits, 3 * adapter_bytes(engine), slots, least):
            return engine, found.slots
    return engines[-1], slots or slots_that_fit(engines[-1], params, _length(engines[-1], longest), edits, held=held)


def _length(engine: FitEngine, longest: int) -> int:
    return longest_step(longest, engine.lengths, engine.tokens_per_step, engine.batch_size)


def _beside(engine: FitEngine, params: Any, length: int, edits: int, held: int) -> Callable[[int], float]:
    """Bytes a device by slots: of the step, of what is `held`, and of the adapters that come of the `edits`."""
    return lambda slots: held + edits * adapter_bytes(engine) + step_bytes(engine, params, length, slots)
