"""What a run's programs take on a GPU that is not there: an estimate that adds up the kernels of the compiled programs.

    python -m benchmarks.kernels configs/knowledge_qwen2.5_7b.yaml --topology h200 --spec qwen2.5-7b

`seal-jax plan` gives the least that a program needs; this adds what XLA made of it: copies, paddings, kernels of their own. Each kernel
counts with the time of its products or of its bytes, whichever is longer, and a start. No measurement: a GPU may do better (kernels side
by side, what stays in its cache) or worse (kernels that XLA would choose by timing them are chosen untimed here).
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from seal_jax import config as config_lib
from seal_jax.errors import SealError
from seal_jax.models import shapes
from seal_jax.parallel import hlo, targets, topology
from seal_jax.parallel import mesh as mesh_lib

PRODUCTS, BYTES, START = 0.8, 0.9, 1.5e-6  # shares of the published rates that a kernel reaches, and seconds to start one
PROGRAMS = ("fit", "prefill", "decode", "write", "m_step")
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast"} | {f"{x}-done" for x in ("fusion", "copy", "async", "call")}
SLICES = ("dynamic-slice", "slice", "gather")
WORKSPACE = "s8"  # the arrays of this type in the programs are a library's scratch room


class Op(NamedTuple):
    """One instruction of XLA's text."""

    name: str
    types: str
    kind: str
    operands: tuple[str, ...]
    line: str
    root: bool


class Kernel(NamedTuple):
    """One kernel and all its runs in a call of the program."""

    name: str
    flops: float  # of one run, as `bytes` and `seconds`
    bytes: float
    seconds: float
    times: float
    source: str  # the operation of the traced program that it is named after


class Program:
    """A program for GPUs, by XLA's text of it."""

    def __init__(self, text: str, rates: tuple[float, float], trips: float = 1):
        """`rates`: operations and bytes a second; `trips`: how often loops run of which the text does not say it."""
        lines, self.entry = hlo.computations(text)
        self.lines, self.rates, self.trips = lines, rates, trips
        self.ops = {name: [op for line in found if (op := _read(line))] for name, found in lines.items()}

    def kernels(self) -> list[Kernel]:
        """All kernels of a call, the longest first."""
        return sorted(self._kernels(self.entry, 1.0), key=lambda k: -k.seconds * k.times)

    def _kernels(self, computation: str, times: float) -> Iterator[Kernel]:
        for op in self.ops[computation]:
            if op.kind in FREE:
                continue
            if loop := hlo.loop(op.line):
                condition, body = loop
                yield from self._kernels(body, times * hlo.trips(op.line, self.lines[condition], self.trips))
            elif op.kind == "conditional":  # the branch that does most, or without products least: greedy choice of a token
                branches = [list(self._kernels(branch, times)) for branch in hlo.called(op.line)]
                yield from min(branches, key=lambda kernels: (-sum(k.flops * k.times for k in kernels), total(kernels)))
            elif op.kind == "call":
                for name in hlo.called(op.line):
                    yield from self._kernels(name, times)
            else:
                yield self._kernel(op, computation, times)

    def _kernel(self, op: Op, computation: str, times: float) -> Kernel:
        fused = op.kind.startswith("fusion")
        if fused:
            (body,) = hlo.called(op.line)
            moved = sum(self._read_of(body, p.name) for p in self.ops[body] if p.kind == "parameter") + self._written_by(body)
        else:
            moved = _size(op.types) + sum(_size(self._types(computation)[name]) for name in op.operands)
        flops = self._flops(op, computation)
        source = re.search(r'op_name="([^"]*)"', op.line)
        seconds = max(flops / self.rates[0], moved / self.rates[1]) + START
        return Kernel(op.name, flops, moved, seconds, times, source[1] if source else "")

    @functools.cache  # noqa: B019, a program lives as long as its estimate
    def _types(self, computation: str) -> dict[str, str]:
        return {op.name: op.types for op in self.ops[computation]}

    def _read_of(self, body: str, name: str) -> float:
        """The bytes that a fusion reads of the array `name` in it: of what is only sliced, the slices; of what is written into, none."""
        users = [op for op in self.ops[body] if name in op.operands]
        whole, found = _size(self._types(body)[name]), 0.0
        for op in users:
            if op.kind in SLICES and op.operands[0] == name:
                found += _size(op.types)
            elif op.kind in ("dynamic-update-slice", "scatter") and op.operands[0] == name:
                continue
            elif op.kind == "bitcast":
                found += self._read_of(body, op.name)
            elif op.kind == "fusion":
                (inner,) = hlo.called(op.line)
                number = op.operands.index(name)
                found += sum(self._read_of(inner, p.name) for p in self.ops[inner] if f"parameter({number})" in p.line)
            else:
                return whole
        return min(found, whole) if users else whole

    def _written_by(self, body: str) -> float:
        """The bytes that a fusion writes."""
        ops = {op.name: op for op in self.ops[body]}

        def written(op: Op) -> float:
            if op.kind == "tuple":
                return sum(written(ops[name]) for name in op.operands)
            if op.kind == "bitcast":
                return written(ops[op.operands[0]])
            if op.kind == "dynamic-update-slice":
                return _size(ops[op.operands[1]].types)
            if op.kind == "scatter":  # reads and writes what it puts there
                return 2 * sum(_size(ops[name].types) for name in op.operands[2:])
            return _size(op.types)

        return sum(written(op) for op in ops.values() if op.root)

    def _flops(self, op: Op, computation: str) -> float:
        """Of the products of an instruction, and of what is fused in it."""
        library = op.kind == "custom-call" and "__cublas" in op.line
        if library or op.kind == "dot":
            form = r'"lhs_contracting_dimensions":\["?([\d",]*)' if library else r"lhs_contracting_dims=\{([\d,]*)"
            axes = [int(n) for n in re.findall(r"\d+", re.search(form, op.line)[1])]  # type: ignore[index]
            _, left = next(hlo.arrays(self._types(computation)[op.operands[0]]))
            _, result = next(hlo.arrays(op.types))
            return 2.0 * math.prod(left[i] for i in axes) * math.prod(result)
        return sum(self._flops(inner, name) for name in hlo.called(op.line) for inner in self.ops.get(name, ()))


def _read(line: str) -> Op | None:
    found = re.match(r"\s+(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(", line)
    if not found:
        return None
    depth, end = 1, found.end()
    while depth and end < len(line):
        depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(line[end], 0)
        end += 1
    return Op(found[2], found[3], found[4], tuple(re.findall(r"%([\w.-]+)", line[found.end() : end])), line, bool(found[1]))


def _size(types: str) -> float:
    return hlo.size(re.sub(rf"\b{WORKSPACE}\[[\d,]*\]", "", types))


def total(kernels: Sequence[Kernel]) -> float:
    """Seconds of a call."""
    return sum(k.seconds * k.times for k in kernels)


def by_name(kernels: Sequence[Kernel]) -> dict[str, float]:
    """Seconds of a call by the name of the kernel, without its number; products together."""
    found: collections.Counter[str] = collections.Counter()
    for k in kernels:
        found["products" if k.flops else re.sub(r"[.\d]+$", "", k.name)] += k.seconds * k.times
    return dict(found.most_common())


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.split("\n", 1)[0])
    p.add_argument("config", help="a config of seal-jax train")
    p.add_argument("overrides", nargs="*", help="settings that differ, as key=value")
    p.add_argument("--topology", default="h200", help=f"{', '.join(targets.GPUS)}, or several of one machine: h200:8")
    p.add_argument("--spec", help="the model's shape, as for seal-jax plan (default: the config's model)")
    p.add_argument("--programs", default=",".join(PROGRAMS), help=f"which (default {','.join(PROGRAMS)})")
    p.add_argument("--slots", type=int, default=64, help="of the fit, a shard")
    p.add_argument("--top", type=int, default=0, help="also the longest kernels, so many")
    p.add_argument("--dump", metavar="FOLDER", help="write XLA's text of each program there")
    args = p.parse_intermixed_args(argv)
    try:
        run(args)
    except SealError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    """Compiles, estimates and prints."""
    config = config_lib.load(args.config, args.overrides)
    target = targets.named(args.topology)
    if target.devices[0].platform not in ("cuda", "gpu"):
        raise SealError(f"--topology {args.topology}: kernels are read of programs for GPUs ({', '.join(targets.GPUS)})")
    spec = shapes.find(args.spec or config.model.name)
    mesh = mesh_lib.make(config.mesh, target.devices)
    programs = topology.Programs(config, spec, mesh, topology.Workload())
    rates = PRODUCTS * target.flops, BYTES * target.bandwidth
    print(f"# kernels at {rates[0] / 1e12:.3g} TFLOP/s or {rates[1] / 1e12:.3g} TB/s, {START * 1e6:g} us to start one: an estimate")
    for name in args.programs.split(","):
        if name not in PROGRAMS:
            raise SealError(f"--programs {name}: not one of {', '.join(PROGRAMS)}")
        case = programs.fit(min(args.slots, programs.edits)) if name == "fit" else getattr(programs, name)()
        _, text = topology.compiled_text(case.trace().lower(), mesh)
        if args.dump:
            with open(f"{args.dump}/{name}.txt", "w", encoding="utf-8") as file:
                file.write(text)
        show(case, Program(text, rates, case.trips).kernels(), rates, args.top)


def show(case: topology.Case, kernels: Sequence[Kernel], rates: tuple[float, float], top: int) -> None:
    """A JSON line for the program, and its longest kernels. `s_an_edit`: without the padding of what differs in length."""
    flops = sum(k.flops * k.times for k in kernels)
    row: dict[str, Any] = {"case": case.name, "shape": case.shape, "ms": _round(1e3 * total(kernels))}
    row |= {"least_ms": _round(1e3 * max(flops / rates[0], case.least / rates[1])), "products_ms": _round(1e3 * flops / rates[0])}
    row |= {"kernels": round(sum(k.times for k in kernels)), "gbytes": _round(sum(k.bytes * k.times for k in kernels) / 1e9)}
    row["s_an_edit"] = _round(case.calls * total(kernels)) if case.calls else None
    row["by_name"] = {name: _round(1e3 * seconds) for name, seconds in list(by_name(kernels).items())[:6]}
    print(json.dumps(row), flush=True)
    for k in kernels[:top]:
        numbers = f"{1e3 * k.seconds * k.times:9.3f} ms {k.times:6.0f} x {k.bytes / 1e6:9.2f} MB {k.flops / 1e9:9.2f} GFLOP"
        print(f"{numbers}  {k.name:40s} {k.source[-70:]}")


def _round(value: float) -> float:
    return float(f"{value:.4g}")


if __name__ == "__main__":
    sys.exit(main())
