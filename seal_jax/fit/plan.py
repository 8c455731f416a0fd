"""What the inner loop does next: host code, numpy only.

Edits differ in how many sequences they have and how long those are. Two rules keep the device busy on real tokens while each edit's
own course stays exactly "every sequence once an epoch, in a random order of its own, `batch_size` at a time":

- A device step trains rows of one padded length. The rows come from whichever edits stand before a sequence of about that length; the
  others wait. Long rows are few and short rows many, so that a step holds about the same number of token slots (`tokens_per_step`).
- There are more edits on the device (slots) than rows in a step, and a finished edit's slot takes the next one.

Which edits share a step changes nothing in their results, only in the time that it takes.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from seal_jax.config import LENGTHS


def padded_length(length: int, lengths: Sequence[int] = LENGTHS) -> int:
    """The smallest of `lengths` (ascending) that holds `length` tokens; beyond the last, the next power of two."""
    if length <= lengths[-1]:
        return lengths[bisect.bisect_left(lengths, length)]
    return 1 << (length - 1).bit_length()


def epoch_orders(count: int, epochs: int, batch_size: int, rng: np.random.Generator, max_steps: int | None = None) -> list[list[int]]:
    """The sequences of each optimiser step: every one once an epoch, in a fresh random order, `batch_size` at a time.

    The last step of an epoch takes what is left. `max_steps` cuts the whole.
    """
    steps = []
    for _ in range(epochs):
        order = rng.permutation(count).tolist()
        steps += [order[i : i + batch_size] for i in range(0, count, batch_size)]
    return steps if max_steps is None else steps[:max_steps]


@dataclasses.dataclass(frozen=True)
class Admit:
    """Edit `edits[i]` starts in slot `slots[i]`."""

    edits: tuple[int, ...]
    slots: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Step:
    """One optimiser step of the edits `edits[i]` (their step number `numbers[i]`), in `slots[i]`, in `rows` rows of `length` tokens."""

    length: int
    rows: int
    edits: tuple[int, ...]
    slots: tuple[int, ...]
    numbers: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Retire:
    """The edits `edits[i]` in `slots[i]` are done."""

    edits: tuple[int, ...]
    slots: tuple[int, ...]


def row_choices(length: int, batch_size: int, tokens_per_step: int, slots: int) -> tuple[int, ...]:
    """The numbers of rows that a step of `length` may have: as many as fill `tokens_per_step`, and a quarter and a sixteenth of it.

    Few, because each is a compilation; more than one, because a step whose rows are mostly idle is waste.
    """
    full = max(1, min(slots, tokens_per_step // (length * batch_size)))
    return tuple(sorted({full, max(1, full // 4), max(1, full // 16)}))


def schedule(lengths: Sequence[Sequence[int]], slots: int, batch_size: int, tokens_per_step: int) -> Iterator[Admit | Step | Retire]:
    """The actions that fit all edits; `lengths[e][s]` is the padded length of edit e's optimiser step s.

    Deterministic. Each edit's steps come once and in order; a slot holds one edit at a time. An edit without steps is admitted and
    retired. Chosen greedily: the step that trains the most tokens for its cost, where the cost of a step is its token slots and a
    fixed overhead; in it the edits with the most left to do. Rows that would stay idle are lent to edits whose next sequence is shorter.
    """
    waiting = list(range(len(lengths)))[::-1]
    free = list(range(slots))[::-1]
    slot_of: dict[int, int] = {}
    done = [0] * len(lengths)
    remaining = [sum(steps) for steps in lengths]
    while waiting or slot_of:
        if free and waiting:
            batch = [(waiting.pop(), free.pop()) for _ in range(min(len(free), len(waiting)))]
            slot_of.update(batch)
            yield Admit(*zip(*batch, strict=True))
        finished = [(e, s) for e, s in slot_of.items() if done[e] == len(lengths[e])]
        if finished:
            yield Retire(*zip(*finished, strict=True))
            for edit, slot in finished:
                del slot_of[edit]
                free.append(slot)
            free.sort(reverse=True)
            continue
        length, rows, chosen = _best_step(lengths, done, remaining, list(slot_of), slots, batch_size, tokens_per_step)
        numbers = tuple(done[e] for e in chosen)
        yield Step(length, rows, tuple(chosen), tuple(slot_of[e] for e in chosen), numbers)
        for edit in chosen:
            remaining[edit] -= lengths[edit][done[edit]]
            done[edit] += 1


def _best_step(
    lengths: Sequence[Sequence[int]],
    done: Sequence[int],
    remaining: Sequence[int],
    resident: Sequence[int],
    slots: int,
    batch_size: int,
    tokens_per_step: int,
) -> tuple[int, int, list[int]]:
    ready: dict[int, list[int]] = {}
    for edit in sorted(resident, key=lambda e: (-remaining[e], e)):
        ready.setdefault(lengths[edit][done[edit]], []).append(edit)
    best = (0.0, 0)
    plan: tuple[int, int, list[int]] | None = None
    for length in sorted(ready, reverse=True):
        candidates = list(ready[length])
        for shorter in sorted((x for x in ready if x < length), reverse=True):
            candidates += ready[shorter]
        for rows in row_choices(length, batch_size, tokens_per_step, slots):
            chosen = candidates[:rows]
            useful = batch_size * sum(lengths[e][done[e]] for e in chosen)
            score = (useful / (rows * length * batch_size + tokens_per_step // 32), rows * length)
            if score > best:
                best, plan = score, (length, rows, chosen)
    assert plan is not None
    return plan


@dataclasses.dataclass
class Waste:
    """How many token slots the device works on, and how many of them are real tokens."""

    slots: int = 0
    tokens: int = 0
    steps: int = 0

    @property
    def share(self) -> float:
        """The share of trained token slots that is padding, in [0, 1)."""
        return 1.0 - self.tokens / self.slots if self.slots else 0.0
