"""What the benchmarks share: options, the measured ceilings of the machine, timing, JSON lines and the table."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

# Both sides share one GPU; JAX would take three quarters of it at its first array.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")

import jax
import jax.numpy as jnp

from benchmarks import shapes
from seal_jax import cpu
from seal_jax.config import LoraConfig
from seal_jax.models.decoder import Decoder
from seal_jax.models.dtypes import activation_dtype, resolve_dtype
from seal_jax.models.spec import DecoderSpec

KEYS = ("case", "device", "model", "k", "edits_per_s", "tokens_per_s", "mfu", "peer", "ratio")


@dataclasses.dataclass(frozen=True)
class Bench:
    """A model on a machine whose ceilings were measured."""

    args: argparse.Namespace
    device: str
    dtype: jnp.dtype
    spec: DecoderSpec
    params: Any
    decoder: Decoder
    lora: LoraConfig
    flops: float  # a second, of a large matrix product in `dtype`
    bandwidth: float  # bytes a second, of a large copy: read and written
    started: float
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def on_cpu(self) -> bool:
        return jax.default_backend() == "cpu"

    def until(self, share: float) -> float:
        """The clock's reading when `share` of the time that `--minutes` allows is over."""
        return self.started + 60 * self.args.minutes * share

    def add(
        self, case: str, *, k: int | None = None, tokens_per_s: float | None = None, edits_per_s: float | None = None, **more: Any
    ) -> None:
        """One finished case: a JSON line now, a row of the table at the end."""
        row = {"case": case, "device": self.device, "model": self.args.model, "k": k, "edits_per_s": edits_per_s}
        row |= {"tokens_per_s": tokens_per_s, "mfu": None, "peer": None, "ratio": None, **more}
        row = {key: _round(value) for key, value in row.items()}
        self.rows.append(row)
        line = json.dumps(row)
        print(line, flush=True)
        if self.args.json:
            with open(self.args.json, "a", encoding="utf-8") as file:
                file.write(line + "\n")

    def finish(self) -> int:
        """Prints the table; the exit code is 1 if a check failed or no case was measured, and 0 if some were left out."""
        if not self.rows:
            print("no case was measured", file=sys.stderr)
            return 1
        print("\n" + table(self.rows))
        failed = [row["case"] for row in self.rows if row.get("check") == "failed"]
        if failed:
            print(f"the numbers differ from the peer's by more than the stated tolerance: {', '.join(failed)}", file=sys.stderr)
        return 1 if failed else 0


def parser(name: str, about: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    p = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=about)
    p.add_argument("--model", help=f"embedded (default on a CPU), {', '.join(shapes.SHAPES)} (random weights; 7b: default elsewhere)")
    p.add_argument("--dtype", help="float32, bfloat16 or, the default, what the library takes here")
    p.add_argument("--rank", type=int, default=32, help="of the adapters, on q and v, as in the paper")
    p.add_argument("--remat", default="none", help="what the backward pass recomputes: none, dots, full")
    p.add_argument("--repeats", type=int, default=3, help="timed repeats of each case, after a warm-up")
    p.add_argument("--minutes", type=float, default=8.0, help="repeats, then cases, are left out beyond this")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--json", metavar="FILE", help="append the JSON lines here too")
    p.add_argument("--no-peer", action="store_true", help="measure our side alone")
    p.add_argument("--tiny", action="store_true", help="a tiny random model and little work: whether it runs, in seconds")
    return p


def default(args: argparse.Namespace, name: str, tiny: Any, cpu: Any, other: Any) -> None:
    """Sets an option that was not given, by the kind of run."""
    if getattr(args, name) is None:
        setattr(args, name, tiny if args.tiny else cpu if jax.default_backend() == "cpu" else other)


def start(args: argparse.Namespace) -> Bench:
    """Loads the model, measures the machine, and prints what the run is made on."""
    started = time.monotonic()
    default(args, "model", "tiny", "embedded", "qwen2.5-7b")
    default(args, "dtype", "float32", "auto", "auto")
    dtype = resolve_dtype(args.dtype)
    args.dtype = str(dtype)
    spec, params = shapes.load(args.model, dtype, args.seed)
    jax.block_until_ready(params)
    device = jax.devices()[0].device_kind if jax.default_backend() != "cpu" else _processor()
    if args.tiny and (torch := _torch()) is not None:
        torch.set_num_threads(1)  # more only get in each other's way with a model of this size
    flops, bandwidth = ceilings(dtype, args.tiny)
    versions = {name: _version(name) for name in ("jax", "flax", "torch", "transformers", "peft", "vllm")}
    print(f"# {time.strftime('%Y-%m-%d')}, {device}: {flops / 1e12:.3g} TFLOP/s in {dtype}, {bandwidth / 1e9:.3g} GB/s, both measured")
    print("# " + ", ".join(f"{name} {version}" for name, version in versions.items() if version))
    decoder = Decoder(spec, activation_dtype(dtype), args.remat)
    lora = LoraConfig(args.rank, 2.0 * args.rank)
    return Bench(args, device, dtype, spec, params, decoder, lora, flops, bandwidth, started)


def ceilings(dtype: jnp.dtype, tiny: bool = False) -> tuple[float, float]:
    """(FLOP a second of a large matrix product of random numbers, bytes a second of a large copy), medians, of the better library."""
    cpu = jax.default_backend() == "cpu"
    size, count = (256, 1 << 20) if tiny else (2048, 1 << 26) if cpu else (8192, 1 << 29)
    a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
    product = jax.jit(jnp.matmul)
    seconds = [timed(lambda: product(a, b).block_until_ready())]
    x = jnp.arange(count, dtype=jnp.float32)
    bump = jax.jit(lambda x: x + 1, donate_argnums=0)

    def copy() -> None:
        nonlocal x
        x = bump(x).block_until_ready()

    moved = timed(copy)
    torch = _torch()
    if torch is not None and (cpu or torch.cuda.is_available()):
        where, kind = "cpu" if cpu else "cuda", getattr(torch, str(dtype))
        c, d = (torch.randn(size, size, device=where, dtype=kind) for _ in range(2))

        def other() -> None:
            torch.mm(c, d)
            if not cpu:
                torch.cuda.synchronize()

        seconds.append(timed(other))
    return 2 * size**3 / min(seconds), 2 * x.nbytes / moved


def timed(run: Callable[[], Any], repeats: int = 7) -> float:
    """Median seconds of `run`, which waits for its own end, after two warm-ups."""
    for _ in range(2):
        run()
    return statistics.median(seconds(run) for _ in range(repeats))


def seconds(run: Callable[[], Any]) -> float:
    """How long `run` takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def out_of_memory(error: Exception) -> bool:
    """Whether a device had no room, as XLA, torch and cuBLAS say it."""
    return isinstance(error, RuntimeError) and any(w in str(error) for w in ("RESOURCE_EXHAUSTED", "out of memory", "ALLOC_FAILED"))


@contextlib.contextmanager
def within_memory(name: str) -> Iterator[None]:
    """A block that is left, and said so in a line, where a device has no room for it: what was measured before shall not be lost."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        print(f"left out, no room on the device: {name}", file=sys.stderr)
    gc.collect()  # what the fault still held


def in_time(name: str, until: float) -> bool:
    """Whether it is before `until` yet; said in a line if not."""
    if time.monotonic() <= until:
        return True
    print(f"left out, no time: {name}", file=sys.stderr)
    return False


def interleave(cases: Mapping[str, Callable[[], Any]], repeats: int, until: float, warm: Sequence[str] = ()) -> dict[str, list[float]]:
    """Seconds of each case by repeat, all cases once a repeat, so that what drifts drifts for all.

    Each case runs once before, untimed, unless `warm` names it. No repeat is begun that would end after `until` by the last one's
    measure, but one is always made; cases whose warm-up would begin after `until` are left out, and so are those that the device
    has no room for, and said so.
    """
    kept: dict[str, Callable[[], Any]] = {}
    for name, run in cases.items():
        if kept and name not in warm and not in_time(name, until):
            continue
        with within_memory(name):
            if name not in warm:
                print(f"warming up: {name} ({seconds(run):.1f} s)", file=sys.stderr)
            kept[name] = run
    found: dict[str, list[float]] = {name: [] for name in kept}
    for repeat in range(repeats):
        if repeat and time.monotonic() + sum(took[-1] for took in found.values()) > until:
            break
        for name, took in list(found.items()):
            with within_memory(name):
                took.append(seconds(kept[name]))
            if len(took) == repeat:
                del found[name]
    if found:
        print("timed: " + ", ".join(f"{name} {' '.join(f'{s:.2f}' for s in took)} s" for name, took in found.items()), file=sys.stderr)
    return found


def figures(took: Sequence[float]) -> dict[str, Any]:
    """What a row says of its repeats: the median, their spread (largest less smallest, over the median), and how many."""
    median = statistics.median(took)
    return {"seconds": median, "spread": (max(took) - min(took)) / median, "repeats": len(took)}


COLUMNS = (
    "case",
    "k",
    "edits_per_s",
    "tokens_per_s",
    "mfu",
    "bandwidth_share",
    "padding",
    "over_k1",
    "spread",
    "repeats",
    "peer",
    "ratio",
    "check",
)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table of the columns that any of them fills, aligned for reading as it is."""
    names = [c for c in COLUMNS if any(row.get(c) is not None for row in rows)]
    cells = [names, *[[_cell(row.get(name)) for name in names] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = ["| " + " | ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) and abs(value) < 100 else str(value)


def _round(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _processor() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {cpu.name() or platform.processor() or platform.machine()}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _torch() -> Any:
    try:
        import torch
    except ImportError:
        return None
    return torch
