"""Writes docs/scale.md: what rounds of ReST-EM would take on TPU slices of 4 to 512 chips, from compiled programs and published rates.

python docs/scale.py             # the page, from the records in docs/scale/; seconds
python docs/scale.py --compile   # first compiles the plans that have no record by the installed versions; minutes each, needs libtpu
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # for `benchmarks`, which is not installed

from benchmarks import workload  # noqa: E402
from seal_jax import config as config_lib  # noqa: E402
from seal_jax.models import shapes  # noqa: E402
from seal_jax.parallel import mesh as mesh_lib  # noqa: E402
from seal_jax.parallel import plan_table, scale, targets, topology  # noqa: E402
from seal_jax.parallel.chips import GIB, TPUS  # noqa: E402

PAGE = HERE / "scale.md"
RECORDS = HERE / "scale"
CONFIG = "configs/knowledge_qwen2.5_7b.yaml"
CHIPS = {chip.name: chip for chip in TPUS.values()}
PARTS = {"v5e": 1, "v5p": 1, "v6e": 1, "tpu7x": 2}  # devices that JAX sees of a chip
MODELS = {"qwen2.5-7b": "Qwen2.5-7B", "llama-3.3-70b": "Llama-3.3-70B"}
FLAT = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
SLICES = {"v5e": FLAT, "v6e": FLAT, "v5p": CUBES, "tpu7x": CUBES}
TOLERANCE = 0.01  # by which a device's bytes, operations and sent bytes may differ between slices
LETTERS = {"compute": "C", "memory bandwidth": "B", "interconnect": "I"}


Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Cell:
    """A plan to compile: the config's, with a model's shape, for a slice, with keys set."""

    model: str
    generation: str
    slice: str
    overrides: tuple[str, ...] = ()

    @property
    def topology(self) -> str:
        return f"{self.generation}:{self.slice}"

    @property
    def name(self) -> str:
        return f"{self.model}_{self.generation}-{self.slice}"

    @property
    def command(self) -> str:
        return " ".join(("seal-jax plan", CONFIG, "--topology", self.topology, "--spec", self.model, *self.overrides))

    def read(self) -> Record | None:
        """Its record; None if there is none, or one of other keys."""
        path = RECORDS / f"{self.name}.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        return found if found and tuple(found["overrides"]) == self.overrides else None


Records = Mapping[Cell, Record]
FULL = ("model.remat=full", "fit.tokens_per_step=512")
# One for each model and generation: a mesh on which a replica fits, on at least two replicas, so that what goes between them is seen.
CELLS = (
    Cell("qwen2.5-7b", "v5e", "2x2", ("mesh.tensor=2", "sample.rows=16", *FULL)),
    Cell("qwen2.5-7b", "v5p", "2x2x1"),
    Cell("qwen2.5-7b", "v6e", "2x2"),
    Cell("qwen2.5-7b", "tpu7x", "2x2x1"),
    Cell(
        "llama-3.3-70b",
        "v5e",
        "8x8",
        ("mesh.tensor=8", "mesh.fsdp=4", "sample.rows=16", "rest_em.group=2", "evaluate.group=1", *FULL),
    ),
    Cell("llama-3.3-70b", "v5p", "2x2x2", ("mesh.tensor=4", "rest_em.group=4", *FULL)),
    Cell("llama-3.3-70b", "v6e", "4x4", ("mesh.tensor=8", "sample.rows=16", "rest_em.group=2", "evaluate.group=1", *FULL)),
    Cell("llama-3.3-70b", "tpu7x", "2x2x2", ("mesh.tensor=4", "mesh.fsdp=2", "rest_em.group=2", *FULL)),
)
# The same replica as the first of CELLS, four times as many of them.
PROOF = Cell("qwen2.5-7b", "v5e", "4x4", ("mesh.tensor=2", "sample.rows=16", "rest_em.group=40", "fit.slots=35", *FULL))

_EDITS = workload.make_round()
WRITTEN = tuple(e.written for e in _EDITS if e.seed == 0)
ROUNDS = (
    scale.Round(workload.CONTEXTS, workload.EDITS, workload.SEEDS, WRITTEN, batch=10, epochs=2),
    scale.Round(50_000, workload.EDITS, workload.SEEDS, WRITTEN, batch=512, epochs=2),
)


# --- Records ---------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}


def record(cell: Cell) -> Record:
    """Compiles a cell's programs; minutes."""
    config = config_lib.load(ROOT / CONFIG, cell.overrides)
    spec, target = shapes.find(cell.model), targets.named(cell.topology)
    plan = topology.make(config, spec, target, lambda text: print(text, file=sys.stderr))
    mesh = mesh_lib.make(config.mesh, target.devices)
    written = topology.build(topology.Programs(config, spec, mesh, plan.workload).write(), mesh)
    made = plan_table.record(plan, config, cell.model)
    made["programs"].append(plan_table.program_record(written, target))
    made["fits"] = made["fits"] and written.work is not None and written.total <= target.limit
    return {"overrides": list(cell.overrides), "versions": versions(), **made}


def write(cell: Cell, found: Record) -> None:
    RECORDS.mkdir(exist_ok=True)
    (RECORDS / f"{cell.name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def read_all() -> Records:
    return {cell: found for cell in (*CELLS, PROOF) if (found := cell.read()) is not None}


def compile_missing() -> None:
    """Each plan in a process of its own, one at a time, with the lowest priority."""
    for cell in (*CELLS, PROOF):
        found = cell.read()
        if found is None or found["versions"] != versions():
            print(cell.command, file=sys.stderr)
            subprocess.run([sys.executable, str(HERE / "scale.py"), "--one", cell.name], check=True)


def compile_one(name: str) -> None:
    os.nice(19)
    autogroup = pathlib.Path("/proc/self/autogroup")  # where the kernel shares the processor by sessions, niceness counts within one only
    if autogroup.exists():
        os.setsid()
        with contextlib.suppress(OSError):
            autogroup.write_text("19")
    cell = next(cell for cell in (*CELLS, PROOF) if cell.name == name)
    write(cell, record(cell))


# --- The page --------------------------------------------------------------------------------------------------------

TEXT = """\
# At scale

What rounds of ReST-EM would take on TPU slices of 4 to 512 chips (v5e and v6e slices end at 256): memory, edits an hour, hours and
chip-hours. Nothing here was measured. This page is written by `python docs/scale.py` (`make scale`) from the records in
[docs/scale/](scale/), in seconds; `python docs/scale.py --compile` first compiles what has no record, minutes each.

## How each number comes about

- **Bytes and operations** are the TPU compiler's (`seal-jax plan`, see [performance.md](performance.md)), for the programs that a run
  would execute: a fit step, the prefill and the decoding of answers, an M-step, and the writing of self-edits. XLA counts a loop's body
  once; what it leaves out is added. The config is `{config}`, with the shape of each model.
- **Bytes sent** are read off the compiled programs: every collective, as often as its loop runs, by the usual algorithms on a ring.
- **Times** are rooflines: of each program the longest of its operations at the chip's published bfloat16 rate, its least memory traffic
  (weights, adapters and caches once) at the published bandwidth, and what it sends over all links of the chip at once. The **first
  bottleneck** is the program that takes the most of a round's time, and which of the three it is; HBM size where the memory allows so few
  edits at once that reading the weights is what a step does. The chips:{chips}
- **A replica** is the `fsdp x tensor` devices that hold the model once. The smallest slice that holds two is compiled (at least 4 chips),
  and all others follow: edits are dealt out over `edit`, and replicas work alone until the M-step ([shown
  below](#why-one-replica-is-enough)).
- **The workload** is the paper's knowledge experiment as `benchmarks/workload.py` draws it: K={edits} self-edits a context (mean {mean:.0f}
  tokens, longest {longest}), S={seeds} seeds; an edit has {sequences} sequences, {tokens:g} tokens an epoch, {epochs} epochs, {questions}
  questions and {answer} tokens an answer.
- **E-step**: writing, fitting and answering, in groups of as many contexts as the replicas hold adapters of. A group's self-edits are
  written until its longest ends (the expected longest of so many); a step fits a sequence each of up to {rows} edits a replica, by chip;
  answers go on to their limit. Fewer edits than that make smaller steps, but no fewer of them: hence 50 contexts gain little from many
  chips. More replicas make larger groups, whose longest self-edit all wait for: hence more chips take more chip-hours. Not counted: the
  prompts' prefill, the unadapted baseline, grading, loading, checkpoints, compilation.
- **M-step**: one kept pair a context, 2 epochs. 50 contexts: the paper's batch of 10, 10 steps. A data shard takes whole pairs, so that at
  most 10 of them work. 50,000 contexts: a batch of 512, 196 steps (assumed for its speed: nobody has tried what it learns). A step adds up
  the adapter's gradients over all replicas. Memory is that of a batch of 10, of which a device has a row at a time.
- **Edits an hour** are fits and answers in full steps, as `seal-jax plan` says, without writing. **K**: edits on all chips at once.

## Caveats

A promise: real programs do not reach their roofline, and by how much they miss it only a measurement tells. Divide the hours of
bandwidth-bound programs by the share of the bandwidth that `python -m benchmarks.sample` measures on the chip in question
(`bandwidth_share`); of compute-bound ones by the share of the operations (`mfu` of `python -m benchmarks.fit`, over 0.7, because a roofline
with `model.remat=full` counts recomputed operations and `mfu` does not). At 40 % of the roofline everything takes 2.5 times as long. Small
steps are worse off, since what a step costs besides does not shrink. Steps that wait for their longest sequence, and hops between
chips that are no neighbours, are not in it; what a tpu7x chip's two devices tell each other counts as sent over links. Chip-hours are hours
times chips; no price is assumed.

## One replica

GiB a device of what programs may take ("of": 90 % of its HBM; a tpu7x chip is two devices), then ms a call with what limits it: C compute,
B memory bandwidth, I interconnect.

{replicas}

The plans are of 2026-11-26. Set are `sample.rows=16`, where 32 self-edits of up to 8192 tokens left no room on 2026-11-23;
`model.remat=full` with steps of 512 tokens for v5e, where that left room for more slots, and for the 70B, for which the config's `auto` and
4,096 were not compiled; `rest_em.group` so that a replica of the 70B holds 15 or 30 adapters in a round; and on v5e and v6e
`evaluate.group`, because the adapters of the largest group lie beside a fit: by the config's own there are 60 of an evaluation, with which
the 70B found no room on v5e (19.3 GiB), nor for answers on v6e (29.5 GiB). Until 2026-11-26 fits with `mesh.fsdp` sent the adapters and
moments of all slots around at each step: the 70B had 5 slots on v5e and 8,719 edits an hour on 32 chips, and 11,429 on four chips of tpu7x.

{models}

## Why one replica is enough

The same replica, compiled for {small} and for {large}: by how much a device's bytes and operations differ (of the M-step, which shares one
batch among all, those of a microbatch), and how many bytes it sends to other replicas in a call.

{proof}

The groups of devices of each collective are read off the compiled programs (`seal_jax.parallel.collectives`). While edits are written,
fitted and answered, a step's losses and flags alone cross `edit`, because every process reads them. The most that any plan here sends
across it in a call: {crossing}. The M-step adds up the adapter's gradients over `edit`.

## The plans

Kept as records because JAX's compilation cache cannot read back programs for devices that are not there.

{plans}
"""
MODEL_TEXT = """\
## {name}

{fits}

Rounds of 50 contexts, then of 50,000. E: E-step, M: M-step; h: hours; chip-h: hours times chips.

{rounds}"""


def rates(generation: str) -> scale.Rates:
    chip, parts = CHIPS[generation], PARTS[generation]
    return scale.Rates(chip.flops / parts, chip.bandwidth / parts, chip.links / parts)


def replica(found: Record) -> int:
    """The devices of one replica."""
    return found["mesh"]["fsdp"] * found["mesh"]["tensor"]


def between(program: Record) -> float:
    """Bytes that a device sends to other replicas in a call."""
    return sum(size for axes, size in program["sent_bytes"].items() if "edit" in axes)


def number(value: float) -> str:
    """Two digits or more, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.{max(0, 1 - math.floor(math.log10(value)))}f}"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (titles, ["---"] * len(titles), *rows))


def replicas_table(records: Records) -> str:
    """What a replica takes: a row a compiled plan."""
    names, rows = [], []
    for cell in CELLS:
        if (found := records.get(cell)) is None:
            continue
        names = [p["name"] for p in found["programs"]]
        sizes = [f"{p['total_bytes'] / GIB:.1f}" for p in found["programs"]]
        calls = [scale.call(p, rates(cell.generation)) if p["compiled"] else None for p in found["programs"]]
        times = [f"{1e3 * c[0]:.3g} {LETTERS[c[1]]}" if c else "-" for c in calls]
        mesh, chips = found["mesh"], replica(found) / PARTS[cell.generation]
        of = f"{found['device_limit'] / GIB:.1f}"
        rows.append([MODELS[cell.model], cell.generation, f"{chips:g}", f"{mesh['fsdp']} x {mesh['tensor']}", *sizes, of])
        rows[-1] += [f"{found['slots']}{'' if found['slots'] == found['edits_per_shard'] else ' (HBM size)'}", *times]
    return table(["model", "TPU", "chips", "fsdp x tensor", *names, "of", "K", *(f"{name}, ms" for name in names)], rows)


def slices(model: str, records: Records) -> Iterator[tuple[Cell, int, Record | None, int]]:
    """(cell, chips, record, replicas) of each slice for a model; one of all chips where nothing was compiled."""
    for cell in (cell for cell in CELLS if cell.model == model):
        if (found := records.get(cell)) is None:
            yield cell, 0, None, 0
            continue
        for chips in SLICES[cell.generation]:
            yield cell, chips, found, chips * PARTS[cell.generation] // replica(found) if found["fits"] else 0


def bottleneck(found: Record, spent: Sequence[scale.Time]) -> str:
    """What takes the most of a round. That weights are read for few edits is the memory's fault where it holds no more."""
    name = max(spent, key=lambda time: time.seconds).bottleneck
    crowded = found["programs"][0]["items"] == found["slots"] < found["edits_per_shard"]
    return "fit: HBM size" if crowded and name == "fit: memory bandwidth" else name


def fits_table(model: str, records: Records) -> str:
    """What fits on which slice."""
    rows = []
    for cell, chips, found, replicas in slices(model, records):
        if found is None:
            rows.append([cell.generation, "all", "-", "not compiled", *["-"] * 3])
            continue
        most, parts = max(found["programs"], key=lambda p: p["total_bytes"]), PARTS[cell.generation]
        gib = f"{most['total_bytes'] * parts / GIB:.1f} of {CHIPS[cell.generation].memory / GIB:.0f}, {most['name']}"
        if not replicas:
            why = f"no, {replica(found) / parts:g} chips do" if found["fits"] else "no"
            rows.append([cell.generation, str(chips), "-", why, "-" if found["fits"] else gib, "-", "-"])
            continue
        mesh = f"{replicas} x {found['mesh']['fsdp']} x {found['mesh']['tensor']}"
        rate = f"{found['edit']['per_hour'] * replicas / found['mesh']['edit']:,.0f}"
        rows.append([cell.generation, str(chips), mesh, "yes", gib, f"{found['slots'] * replicas:,}", rate])
    return table(["TPU", "chips", "edit x fsdp x tensor", "fits", "GiB a chip", "K", "edits an hour"], rows)


def rounds_table(model: str, records: Records) -> str:
    """What a round of each of `ROUNDS` takes."""
    rows = []
    for cell, chips, found, replicas in slices(model, records):
        if found is None or not replicas:
            continue
        row = [cell.generation, str(chips)]
        for what in ROUNDS:
            spent = [step(found, rates(cell.generation), replicas, what) for step in (scale.e_step, scale.m_step)]
            hours = [time.seconds / 3600 for time in spent]
            row += [*map(number, hours), *(number(h * chips) for h in hours), bottleneck(found, spent)]
        rows.append(row)
    each = ["E h", "M h", "E chip-h", "M chip-h", "first bottleneck"]
    return table(
        ["TPU", "chips", *(f"{what.contexts:,}: {each[0]}" if i == 0 else title for what in ROUNDS for i, title in enumerate(each))], rows
    )


def differences(base: Record, larger: Record) -> list[list[float]]:
    """By what shares bytes and FLOP of a device and bytes sent within a replica differ, a program; a program without any: 0.

    The M-step shares one batch among all: of it, the operations and bytes sent are compared a microbatch.
    """
    rows = []
    for a, b in zip(base["programs"], larger["programs"], strict=True):
        inside = [(sum(p["sent_bytes"].values()) - between(p)) / p["items"] for p in (a, b)]
        pairs = ((a["total_bytes"], b["total_bytes"]), (a["flops"] / a["items"], b["flops"] / b["items"]), inside)
        rows.append([y / x - 1 if x else 0.0 for x, y in pairs])
    return rows


def reckoned(base: Record, larger: Record) -> float:
    """What the M-step of `larger` sends between replicas, as the page reckons it from `base`."""
    program = next(p for p in larger["programs"] if p["name"] == "M-step")
    sent = scale.m_step_sent(base, larger["mesh"]["edit"], program["items"])
    return between({"sent_bytes": sent})


def proof_table(base: Record | None, larger: Record | None) -> str:
    if base is None or larger is None:
        return "Not compiled."
    rows = [
        [a["name"], *(f"{100 * share:+.2f} %" for share in shares), f"{between(a):,.0f}", f"{between(b):,.0f}"]
        for a, b, shares in zip(base["programs"], larger["programs"], differences(base, larger), strict=True)
    ]
    titles = ["program", "bytes a device", "operations a device", "sent within a replica"]
    found = table([*titles, f"sent to others, {base['topology']}", f"sent to others, {larger['topology']}"], rows)
    return f"{found}\n\nFor the larger M-step the page reckons {reckoned(base, larger):,.0f} bytes to others."


def crossing(records: Records) -> str:
    """The most bytes that cross `edit`, by program, the M-step left out."""
    sizes: dict[str, float] = {}
    for p in (p for found in records.values() for p in found["programs"] if p["name"] != "M-step"):
        sizes[p["name"]] = max(sizes.get(p["name"], 0.0), between(p))
    return ", ".join(f"{name} {f'{size:,.0f} bytes' if size else 'nothing'}" for name, size in sizes.items())


def render(records: Records) -> str:
    """The page."""
    some = next(iter(records.values()))
    w = some["workload"]
    per_chip = "\n  - {0.name}: {1:,.0f} TFLOP/s, {2:,.0f} GB/s of {3:.0f} GiB, {4:.0f} GB/s to other chips"
    made = {
        cell: ", ".join(map(" ".join, records[cell]["versions"].items())) if cell in records else "not compiled" for cell in (*CELLS, PROOF)
    }
    return TEXT.format(
        config=CONFIG,
        chips="".join(per_chip.format(c, c.flops / 1e12, c.bandwidth / 1e9, c.memory / GIB, c.links / 1e9) for c in CHIPS.values()),
        edits=workload.EDITS,
        seeds=workload.SEEDS,
        mean=sum(WRITTEN) / len(WRITTEN),
        longest=max(WRITTEN),
        answer=w["answer_tokens"],
        rows=" to ".join(str(f({r["programs"][0]["items"] for r in records.values()})) for f in (min, max)),
        replicas=replicas_table(records),
        models="\n\n".join(
            MODEL_TEXT.format(name=name, fits=fits_table(model, records), rounds=rounds_table(model, records))
            for model, name in MODELS.items()
        ),
        small=CELLS[0].topology,
        large=PROOF.topology,
        proof=proof_table(records.get(CELLS[0]), records.get(PROOF)),
        crossing=crossing(records),
        plans="\n".join(f"- `{cell.command}` ({said})" for cell, said in made.items()),
        **{name: w[name] for name in ("sequences", "tokens", "epochs", "questions")},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--compile", action="store_true", help="compile the plans that have no record by the installed versions")
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        compile_one(args.one)
        return
    if args.compile:
        compile_missing()
    PAGE.write_text(render(read_all()), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
