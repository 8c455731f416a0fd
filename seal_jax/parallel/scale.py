"""From the plan of one replica to a round of ReST-EM on many: arithmetic on records, nothing compiled.

A replica is the `fsdp` x `tensor` devices that hold the model once. While edits are written, fitted and asked, replicas send one another
nothing but a few numbers a step, so that a plan of one says what any number of them does: the edits are dealt out. What is left of a
replica's last, partly filled step is counted: few edits on many replicas take as long as one edit. The M-step trains one model on all
devices, and its collectives along `edit` are made as large as the number of replicas makes them.

All times are rooflines (see `seal_jax.parallel.topology`): the longest of computing, reading memory and sending, at the published rates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Record = Mapping[str, Any]  # of `plan_table.record`, with the program "write" among its programs


@dataclasses.dataclass(frozen=True)
class Round:
    """A round of ReST-EM, in contexts and tokens, and what is trained on of it."""

    contexts: int
    edits: int  # self-edits a context
    seeds: int  # fits of each
    written: Sequence[int]  # lengths in tokens that self-edits have, all as likely
    batch: int  # pairs a step of the M-step, of one kept a context
    epochs: int  # of the M-step


class Rates(NamedTuple):
    """Of one device: FLOP/s, bytes/s of its memory, bytes/s sent."""

    flops: float
    bandwidth: float
    links: float


class Time(NamedTuple):
    """Seconds, by what takes them: `terms` {"program: resource": seconds}, of which each program's longest resource counts."""

    seconds: float
    terms: dict[str, float]

    @property
    def bottleneck(self) -> str:
        """What takes most of the time, say "fit: compute"."""
        return max(self.terms, key=lambda name: self.terms[name])


def call(program: Record, rates: Rates, items: float | None = None) -> tuple[float, str]:
    """Roofline seconds of a call of a program on `items` (default: as many as it was compiled for), and what limits it."""
    full = program["items"]
    items = full if items is None else min(items, full)
    terms = {
        "compute": program["flops"] * items / full / rates.flops,
        "memory bandwidth": (program["least_bytes_accessed"] - (full - items) * program["least_bytes_an_item"]) / rates.bandwidth,
        "interconnect": sum(program["sent_bytes"].values()) * items / full / rates.links,
    }
    limit = max(terms, key=lambda name: terms[name])
    return terms[limit], limit


def longest(lengths: Sequence[int], count: int) -> float:
    """The expected longest of `count` draws from `lengths`."""
    ordered = sorted(lengths)
    share = [((i + 1) / len(ordered)) ** count for i in range(len(ordered))]
    return sum(length * (share[i] - (share[i - 1] if i else 0.0)) for i, length in enumerate(ordered))


def e_step(record: Record, rates: Rates, replicas: int, what: Round) -> Time:
    """Writing, fitting and asking all edits of a round on `replicas`, group of contexts after group.

    A group is as many contexts as the replicas hold fitted adapters of. In it self-edits are written until the longest ends; a step
    fits one sequence of each of some edits; answers are decoded to their limit.
    """
    programs, w = {p["name"]: p for p in record["programs"]}, record["workload"]
    fits = what.edits * what.seeds  # a context
    held = max(1, record["edits_per_shard"] * replicas // fits)  # contexts a group
    sums: dict[str, float] = {}
    for contexts, groups in ((held, what.contexts // held), (what.contexts % held, 1)):
        if not contexts or not groups:
            continue
        here = math.ceil(contexts * fits / replicas)  # edits of the replica that has the most
        sequences = math.ceil(contexts * what.edits / replicas)
        rows, adapters = min(here, programs["fit"]["items"]), min(here, programs["prefill"]["items"])
        tokens = sequences * sum(what.written) / len(what.written) / min(sequences, programs["write"]["items"])
        counts = {
            "write": (max(tokens, longest(what.written, contexts * what.edits)), sequences),
            "fit": (here / rows * w["sequences"] * w["epochs"], rows),
            "prefill": (math.ceil(here / adapters), adapters),
            "decode": (math.ceil(here / adapters) * (w["answer_tokens"] - 1), adapters),
        }
        for name, (calls, items) in counts.items():
            seconds, limit = call(programs[name], rates, items)
            key = f"{name}: {limit}"
            sums[key] = sums.get(key, 0.0) + groups * calls * seconds
    return Time(sum(sums.values()), sums)


def m_step(record: Record, rates: Rates, replicas: int, what: Round) -> Time:
    """Training the policy on one pair a context over all devices. Every data shard has whole rows of one pair; those left over are idle."""
    program, mesh = next(p for p in record["programs"] if p["name"] == "M-step"), record["mesh"]
    shards = replicas * mesh["fsdp"]
    steps = what.epochs * math.ceil(what.contexts / what.batch)
    microbatches = math.ceil(min(what.batch, what.contexts) / shards)
    added = (microbatches - program["items"]) * program["least_bytes_an_item"]
    terms = {
        "compute": program["flops"] * microbatches / program["items"] / rates.flops,
        "memory bandwidth": (program["least_bytes_accessed"] + added) / rates.bandwidth,
        "interconnect": sum(m_step_sent(record, replicas, microbatches).values()) / rates.links,
    }
    limit = max(terms, key=lambda name: terms[name])
    return Time(steps * terms[limit], {f"M-step: {limit}": steps * terms[limit]})


def m_step_sent(record: Record, replicas: int, microbatches: int) -> dict[str, float]:
    """Bytes that a device sends in a step of the M-step of so many microbatches, by axes, from what it sent as compiled.

    Gradients are added up once a microbatch. Along `edit`, of n devices each sends (n - 1) / n of what there is.
    """
    program, mesh = next(p for p in record["programs"] if p["name"] == "M-step"), record["mesh"]
    found = {}
    for axes, size in program["sent_bytes"].items():
        names = axes.split("+")
        before, now = (math.prod(count if axis == "edit" else mesh[axis] for axis in names) for count in (mesh["edit"], replicas))
        found[axes] = size * microbatches / program["items"] * (1 - 1 / now) / (1 - 1 / before)
    return found
