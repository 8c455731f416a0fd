"""What `seal-jax plan` prints: a plan as a table to read, and as plain data."""

from __future__ import annotations

import dataclasses
from typing import Any

from seal_jax.config import RunConfig
from seal_jax.parallel.chips import GIB
from seal_jax.parallel.targets import Target
from seal_jax.parallel.topology import Plan, Program
from seal_jax.words import counted

KINDS = ("weights", "adapters", "caches", "temporaries")


def record(plan: Plan, config: RunConfig, model: str) -> dict[str, Any]:
    """The plan as JSON data. Bytes, FLOP and seconds; those of a program are of one call on one device, those of an edit of all."""
    target = plan.target
    return {
        "model": model,
        "parameters": plan.parameters,
        "dtype": plan.dtype,
        "topology": target.name,
        "devices": len(target.devices),
        "devices_per_chip": target.per_chip,
        "mesh": plan.mesh,
        "device_memory": target.memory,
        "device_limit": target.limit,
        "fits": plan.fits,
        "remat": plan.way.remat,
        "slots": plan.slots,
        "slots_set": config.fit.slots is not None,
        "edits_per_shard": plan.edits,
        "programs": [program_record(p, target) for p in plan.programs],
        "edit": plan.an_edit(),
        "workload": dataclasses.asdict(plan.workload)
        | {"epochs": config.fit.epochs, "answer_tokens": config.answer.max_tokens, "tokens_per_step": plan.way.tokens},
    }


def program_record(program: Program, target: Target) -> dict[str, Any]:
    """One program of a plan as JSON data: bytes, FLOP and seconds of one call on one device."""
    work = program.work
    return {
        "name": program.case.name,
        "shape": program.case.shape,
        "compiled": work is not None,
        "bytes": {**dict.fromkeys(KINDS, 0.0), **program.bytes},
        "total_bytes": program.total,
        "bytes_of": program.largest or program.case.shape,
        "flops": work.flops if work else None,
        "bytes_accessed": work.bytes if work else None,
        "least_bytes_accessed": program.case.least,
        "sent_bytes": program.sent,
        "seconds": program.seconds(target),
        "calls_per_edit": program.case.calls,
        "items": program.case.items,
        "least_bytes_an_item": program.case.an_item,
    }


def table(found: dict[str, Any]) -> str:
    """A `record` for people."""
    w, mesh = found["workload"], " x ".join(f"{axis}={size}" for axis, size in found["mesh"].items())
    part = "" if found["devices_per_chip"] == 1 else f", {found['devices_per_chip']} per chip"
    lines = [
        f"{found['model']}: {found['parameters'] / 1e9:.2f} B parameters, {found['dtype']}",
        f"{found['topology']}: {found['devices']} devices{part}, mesh {mesh}",
        f"an edit, assumed: {w['sequences']:g} sequences and {w['tokens']:g} tokens per epoch, {w['epochs']} epochs; "
        f"{w['questions']:g} questions of {w['question']} tokens, {w['answer_tokens']} tokens an answer",
        "",
        f"GiB per device, of {found['device_memory'] / GIB:.1f}, of which {found['device_limit'] / GIB:.1f} for programs:",
        f"{'':10}" + "".join(f"{name:>13}" for name in (*KINDS, "total")),
    ]
    for p in found["programs"]:
        sizes = [*(p["bytes"][kind] for kind in KINDS), p["total_bytes"]]
        fits = p["compiled"] and p["total_bytes"] <= found["device_limit"]
        of = "" if p["bytes_of"] == p["shape"] else f"  {p['bytes_of']}"
        lines.append(f"{p['name']:10}" + "".join(f"{size / GIB:13.2f}" for size in sizes) + of + ("" if fits else "  does not fit"))
    titles = f"{'':10}{'TFLOP':>10}{'GB':>10}{'GB, least':>11}{'GB, sent':>10}{'ms, roofline':>14}{'calls per edit':>15}"
    lines += ["", "per call, on one device:", titles]
    for p in found["programs"]:
        moved = (p["bytes_accessed"], p["least_bytes_accessed"], sum(p["sent_bytes"].values()))
        cells = (_number(p["flops"], 1e-12), *(_number(size, 1e-9) for size in moved))
        calls = f"{p['calls_per_edit']:.3f}" if p["calls_per_edit"] else "-"
        row = f"{cells[0]:>10}{cells[1]:>10}{cells[2]:>11}{cells[3]:>10}{_number(p['seconds'], 1e3):>14}{calls:>15}"
        lines.append(f"{p['name']:10}{row}  {p['shape']}")
    return "\n".join([*lines, "", *_summary(found)])


def _number(value: float | None, factor: float) -> str:
    return "-" if value is None else f"{value * factor:.3g}" if value * factor < 1000 else f"{value * factor:.0f}"


def _summary(found: dict[str, Any]) -> list[str]:
    if not found["fits"]:
        missing = [p["name"] for p in found["programs"] if not p["compiled"] or p["total_bytes"] > found["device_limit"]]
        return [f"fits: no ({', '.join(missing)}); share the model over mesh.fsdp or mesh.tensor, or set model.remat=full"]
    edit, slots = found["edit"], found["slots"]
    why = "fit.slots" if found["slots_set"] else "as many as the memory holds"
    why = "every edit of a group" if slots == found["edits_per_shard"] else why
    lines = [
        "fits: yes",
        f"best K: {counted(slots, 'slot')} a shard ({why}), {slots * found['mesh']['edit']} in all: "
        f"fit.slots={slots} fit.tokens_per_step={found['workload']['tokens_per_step']} model.remat={found['remat']}",
        f"an edit: {edit['flops']:.3g} FLOP, {edit['bytes']:.3g} bytes as the compiler counts them, on all devices",
    ]
    if edit["seconds"] is None:
        return [*lines, "roofline: the peak rates of these devices are not known"]
    rates = f"{edit['seconds']:.4f} s per edit, {edit['per_hour']:,.0f} edits per hour"
    return [*lines, f"roofline: {rates}, self-edits not written and answers not graded; a run is slower"]
