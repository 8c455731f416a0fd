"""Sequences packed into rows: host code, numpy only.

An optimiser step trains some sequences, whose order of a training run is drawn elsewhere. Here they are laid out in rows of one length,
several in a row, so that few token slots are padding; no token sees another sequence than its own. Layout alone: what a step computes does
not depend on it, but for rounding. All steps of a run have the same shape, so that they are one compiled program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from seal_jax.fit.engine import Tokens
from seal_jax.fit.plan import padded_length
from seal_jax.sft.step import Rows


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of every step of a run."""

    microbatches: int
    rows: int  # of a microbatch, over all shards
    length: int


def slots(sequence: Tokens) -> int:
    """The token slots that a sequence takes: each of its tokens but the last is an input."""
    return len(sequence.ids) - 1


def row_length(sequences: Sequence[Tokens], wanted: int | None) -> int:
    """The length of a run's rows: `wanted`, but at least the padded length of the longest sequence, which is also the default."""
    return max(padded_length(max(map(slots, sequences))), wanted or 0)


def fill(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Rows of `length` slots for items of `sizes` slots: first fit, the largest first. Returns the items of each row, by number."""
    rows: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        row = next((r for r, left in enumerate(room) if left >= sizes[item]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(item)
        room[row] -= sizes[item]
    return rows


def shape(sequences: Sequence[Tokens], steps: Sequence[Sequence[int]], length: int, microbatch: int, shards: int) -> Shape:
    """The shape that holds each of `steps` (numbers of sequences): microbatches of at most `microbatch` rows on each of `shards` shards.

    As few microbatches as do, and of those as few rows as do.
    """
    sizes = [slots(s) for s in sequences]
    most = max(len(fill([sizes[i] for i in step], length)) for step in steps)
    microbatches = -(-most // (microbatch * shards))
    return Shape(microbatches, -(-most // (microbatches * shards)) * shards, length)


def rows(sequences: Sequence[Tokens], shape: Shape) -> Rows:
    """The sequences of one step, laid out. Rows that are left over are empty."""
    flat = (shape.microbatches * shape.rows, shape.length)
    inputs, targets, positions = (np.zeros(flat, np.int32) for _ in range(3))
    weights = np.zeros(flat, np.float32)
    first = np.broadcast_to(np.arange(shape.length, dtype=np.int32), flat).copy()
    for row, items in enumerate(fill([slots(s) for s in sequences], shape.length)):
        start = 0
        for item in items:
            sequence = sequences[item]
            ids, count = np.asarray(sequence.ids, np.int32), slots(sequence)
            here = slice(start, start + count)
            inputs[row, here], targets[row, here] = ids[:-1], ids[1:]
            positions[row, here], first[row, here] = np.arange(count), start
            weights[row, start + max(sequence.loss_from, 1) - 1 : start + count] = 1.0
            start += count
    whole = (shape.microbatches, shape.rows, shape.length)
    return Rows(*(x.reshape(whole) for x in (inputs, targets, weights, positions, first)))
