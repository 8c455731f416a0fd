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
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from seal_jax.config import LENGTHS


def padded_length(length: int, lengths: Sequence[int] = LENGTHS) -> int:
    """The smallest of `lengths` (ascending) that holds `length` tokens; beyond the last, the next power of two."""
    if length <= lengths[-1]:
        return lengths[bisect.bisect_left(lengths, length)]
    return power_of_two(length)


def longest_step(longest: int, lengths: Sequence[int], tokens_per_step: int, batch_size: int) -> int:
    """The padded length up to which the steps are asked what they take, for sequences of up to `longest` tokens: up to a whole step of one
    sequence that hangs on its tokens more than on how long they are, and one question serves for all such sequences."""
    return padded_length(max(longest, min(tokens_per_step // batch_size, max(lengths))), lengths)


def power_of_two(least: int) -> int:
    """The smallest power of two that is at least `least`, and 1."""
    return 1 << max(0, least - 1).bit_length()


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


def alone(tokens: int) -> int:
    """No other device of the shard shares the rows of a step."""
    return 1


def row_choices(length: int, batch_size: int, tokens_per_step: int, slots: int, shared: Callable[[int], int] = alone) -> tuple[int, ...]:
    """The numbers of rows that a step of `length` may have: as many as fill `tokens_per_step`, and a quarter and a sixteenth of it.

    Few, because each is a compilation; more than one, because a step whose rows are mostly idle is waste. `shared`: of the
    tokens of a step, the devices that its rows are dealt out over, so that each gets as many as the others.
    """
    full = max(1, min(slots, tokens_per_step // (length * batch_size)))
    found = set()
    for rows in (full, max(1, full // 4), max(1, full // 16)):
        devices = shared(rows * length * batch_size)
        found.add(-(-rows // devices) * devices)
    return tuple(sorted(found))


def deal(costs: Sequence[float], shards: int) -> list[int]:
    """The shard of each edit: the dearest first, each to the shard with the least to do so far."""
    load, found = [0.0] * shards, [0] * len(costs)
    for edit in sorted(range(len(costs)), key=lambda e: (-costs[e], e)):
        shard = min(range(shards), key=lambda s: (load[s], s))
        found[edit], load[shard] = shard, load[shard] + costs[edit]
    return found


class Schedule:
    """The actions that fit all edits, in order: an iterator, which may be told meanwhile that an edit needs no further steps.

    `lengths[e][s]` is the padded length of edit e's optimiser step s. Each of `shards` devices (or groups of devices) holds `slots` edits
    at once, those that `shard_of` deals to it; slot numbers count on from shard to shard. A step has one length and one number of rows on
    all shards, as `row_choices` says, and each fills its rows with edits of its own.

    Deterministic. Each edit's steps come once and in order; a slot holds one edit at a time. An edit without steps is admitted and
    retired. Chosen greedily: the step that trains the most tokens for its cost, where the cost of a step is its token slots and a
    fixed overhead; in it the edits with the most left to do. Rows that would stay idle are lent to edits whose next sequence is shorter.
    """

    def __init__(
        self,
        lengths: Sequence[Sequence[int]],
        slots: int,
        batch_size: int,
        tokens_per_step: int,
        shard_of: Sequence[int] | None = None,
        shards: int = 1,
        shared: Callable[[int], int] = alone,
    ):
        self._lengths, self._slots, self._batch_size, self._tokens_per_step = lengths, slots, batch_size, tokens_per_step
        self._shared = shared
        self._shards, self._shard_of = shards, [0] * len(lengths) if shard_of is None else shard_of
        self._count = [len(steps) for steps in lengths]
        self._done = [0] * len(lengths)
        self._remaining = [sum(steps) for steps in lengths]
        self._slot_of: dict[int, int] = {}

    def end(self, edit: int) -> None:
        """The edit takes no further step; its slot is free once it has retired. Nothing if it has ended already."""
        self._count[edit] = min(self._count[edit], self._done[edit])

    def __iter__(self) -> Iterator[Admit | Step | Retire]:
        waiting = [[e for e in reversed(range(len(self._lengths))) if self._shard_of[e] == s] for s in range(self._shards)]
        free = [list(range(s * self._slots, (s + 1) * self._slots))[::-1] for s in range(self._shards)]
        while any(waiting) or self._slot_of:
            batch = [(w.pop(), f.pop()) for w, f in zip(waiting, free, strict=True) for _ in range(min(len(w), len(f)))]
            if batch:
                self._slot_of.update(batch)
                yield Admit(*zip(*batch, strict=True))
            finished = [(e, s) for e, s in self._slot_of.items() if self._done[e] == self._count[e]]
            if finished:
                yield Retire(*zip(*finished, strict=True))
                for edit, slot in finished:
                    del self._slot_of[edit]
                    free[slot // self._slots].append(slot)
                for numbers in free:
                    numbers.sort(reverse=True)
                continue
            length, rows, chosen = self._best_step()
            step = Step(length, rows, tuple(chosen), tuple(self._slot_of[e] for e in chosen), tuple(self._done[e] for e in chosen))
            for edit in chosen:  # before the step is handed out: `end` may be called before the next one is asked for
                self._remaining[edit] -= self._lengths[edit][self._done[edit]]
                self._done[edit] += 1
            yield step

    def _best_step(self) -> tuple[int, int, list[int]]:
        """(padded length, rows a shard, edits)."""
        following = {e: self._lengths[e][self._done[e]] for e in self._slot_of}
        ready: dict[int, list[list[int]]] = {}  # by length, by shard, those with the most left first
        for edit in sorted(self._slot_of, key=lambda e: (-self._remaining[e], e)):
            ready.setdefault(following[edit], [[] for _ in range(self._shards)])[self._shard_of[edit]].append(edit)
        best = (0.0, 0)
        found: tuple[int, int, list[int]] | None = None
        descending = sorted(ready, reverse=True)
        for i, length in enumerate(descending):
            candidates = [[e for other in descending[i:] for e in ready[other][shard]] for shard in range(self._shards)]
            for rows in row_choices(length, self._batch_size, self._tokens_per_step, self._slots, self._shared):
                chosen = [e for of_shard in candidates for e in of_shard[:rows]]
                useful = self._batch_size * sum(following[e] for e in chosen)
                cost = self._shards * (rows * length * self._batch_size + self._tokens_per_step // 32)
                score = (useful / cost, rows * length)
                if score > best:
                    best, found = score, (length, rows, chosen)
        assert found is not None
        return found


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
