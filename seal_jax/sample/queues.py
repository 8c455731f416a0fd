"""Who is next: the queues of requests, the places of adapters, and which prompts are read together. Host code, no arrays.

A shard has some places on the device, each with the same number of rows. A place holds one adapter at a time, whose requests its rows
serve; when it has nothing left to do there, it takes the adapter of its shard that has the most waiting, one that no place holds yet or
one with more requests than its places have rows for. None of this changes what a request is answered with, only when.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from seal_jax.fit.plan import deal, padded_length, power_of_two
from seal_jax.sample.constraint import Constraint

# Tokens of prompts read in one call, at most, or one prompt. Enough to keep a device busy; of a 7B in bfloat16 the call's temporaries and
# its caches come to 3 GiB, however long the prompts are.
READ = 8192
LEAST = 512  # tokens that a call may as well read: with fewer, the time goes to fetching the weights

Prompt = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Request:
    """One sequence to generate. `key` is a raw threefry key ([2] uint32, see `seal_jax.rng.words`); greedy at temperature 0.

    Under a `constraint` (`seal_jax.sample.constraint.for_schema`), the tokens spell a text that it matches, or the limit cut them short.
    """

    prompt: Prompt
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    key: tuple[int, int] = (0, 0)
    adapter: int = 0
    constraint: Constraint | None = None


def shares(requests: Sequence[Request], adapters: int, shards: int) -> list[dict[int, list[int]]]:
    """For each shard, the requests of each adapter that it has; without adapters, its share of the requests, under 0.

    Requests that share a prompt stand next to each other, so that no more than one prompt of an adapter has to be kept for later.
    """
    order = sorted(range(len(requests)), key=lambda i: (requests[i].adapter, len(requests[i].prompt), requests[i].prompt, i))
    found: list[dict[int, list[int]]] = [{} for _ in range(shards)]
    if adapters:
        for i in order:
            found[requests[i].adapter // (adapters // shards)].setdefault(requests[i].adapter, []).append(i)
        return found
    # Whole prompts, so that each is prefilled once, unless there are fewer of them than shards.
    prompts: dict[Prompt, list[int]] = {}
    for i in order:
        prompts.setdefault(requests[i].prompt, []).append(i)
    parts = list(prompts.values()) if len(prompts) >= shards else [[i] for i in order]
    costs = [sum(requests[i].max_tokens for i in part) for part in parts]
    for part, shard in zip(parts, deal(costs, shards), strict=True):
        found[shard].setdefault(0, []).extend(part)
    return found


def power_of_four(least: int) -> int:
    """For shapes of which there should be few: what is too large costs at most four times, and seldom."""
    return 1 << -(-(least - 1).bit_length() // 2) * 2


def layout(shares: Sequence[Mapping[int, Sequence[int]]], rows: int, adapter: float) -> tuple[int, int]:
    """(places of a shard, rows of each) that serve the `shares` with about `rows` rows in the least time.

    `adapter`: the size of one as a share of the model's: a step reads the model, and every place's adapter. Few rows a place leave few
    idle, but need more places: no fewer than an adapter has requests on average, or adapters would take memory that no one reckons with.
    One of few numbers, because each is a compilation: the largest that any adapter can use, or a round one below; of the bare model, whose
    requests are another number in each group of contexts, the round one above.
    """
    counts = [[len(queue) for queue in queues.values()] for queues in shares]
    everyone = [n for shard in counts for n in shard]
    longest, mean = min(rows, max(everyone)), sum(everyone) // len(everyone)
    adapters = max(map(len, counts))

    def places(each: int) -> int:
        # No more than can be used, but for a rounding that keeps the number of programs small.
        most = max(sum(-(-n // each) for n in shard) for shard in counts)
        return min(max(1, rows // each), power_of_two(most if adapters > 1 else 1))

    def cost(each: int) -> float:
        rounds = max(-(-sum(-(-n // each) for n in shard) // places(each)) for shard in counts)
        return rounds * (1 + places(each) * adapter)

    steps = {1, 2, 3, *(m << k for m in (4, 5, 6) for k in range(longest.bit_length()))}
    if adapters == 1:
        longest = min(rows, min(s for s in steps if s >= longest))
    each = min((e for e in {longest, *(s for s in steps if mean <= s < longest)}), key=lambda e: (cost(e), -e))
    return places(each), each


class Start(NamedTuple):
    """A request that begins: in which row of which place, and which."""

    place: int
    row: int
    index: int


class Queues:
    """What waits, who has which row, and whose each place is. Places count on from shard to shard, `places` in each."""

    def __init__(self, shares: Sequence[Mapping[int, Sequence[int]]], places: int, each: int):
        self.places, self.each = places, each
        self.waiting = [{adapter: deque(queue) for adapter, queue in queues.items()} for queues in shares]
        self.adapter: list[int | None] = [None] * (len(shares) * places)  # that a place holds
        self.owner: dict[tuple[int, int], int] = {}  # (place, row) -> the request that has it

    def admit(self) -> list[tuple[int, int]]:
        """Gives places with nothing to do to adapters that have more waiting than their places have free rows: (place, adapter)."""
        taken = []
        busy = Counter(place for place, _ in self.owner)
        for shard, queues in enumerate(self.waiting):
            here = range(shard * self.places, (shard + 1) * self.places)
            wanted = {adapter: len(queue) for adapter, queue in queues.items()}
            serving: Counter[int] = Counter()
            idle = []
            for place in sorted(here, key=lambda p: -busy[p]):  # those with rows in use first: they keep their adapters
                own = self.adapter[place]
                if own is not None and (busy[place] or wanted.get(own, 0) > 0):
                    serving[own] += 1
                    wanted[own] = wanted.get(own, 0) - (self.each - busy[place])
                else:
                    idle.append(place)
            heap = [(-n / (1 + serving[a]), serving[a], a) for a, n in wanted.items() if n > 0] if idle else []
            heapq.heapify(heap)
            for place in sorted(idle):
                if not heap:
                    break
                _, places, adapter = heapq.heappop(heap)
                self.adapter[place] = adapter
                taken.append((place, adapter))
                wanted[adapter] -= self.each
                if wanted[adapter] > 0:
                    heapq.heappush(heap, (-wanted[adapter] / (2 + places), places + 1, adapter))
        return taken

    def start(self) -> list[Start]:
        """Gives the free rows to requests of the adapters that their places hold."""
        starts = []
        for place, adapter in enumerate(self.adapter):
            queues = self.waiting[place // self.places]
            queue = queues.get(adapter, ())
            free = [row for row in range(self.each) if (place, row) not in self.owner] if queue else []
            starts += [Start(place, row, queue.popleft()) for row in free[: len(queue)]]
            if adapter in queues and not queue:
                del queues[adapter]
        self.owner.update({(s.place, s.row): s.index for s in starts})
        return starts


class Reading(NamedTuple):
    """Prompts read in one call, by A entries of each shard: `prompts` of at most P each, by the adapter of a place of that shard."""

    width: int  # A
    depth: int  # P
    length: int  # L, of a prompt with its padding
    entries: list[tuple[int, int, list[Prompt]]]  # (entry, counted from shard to shard; place; prompts)
    in_order: bool  # there is an entry for each place, that of its number


def readings(new: Mapping[int, Sequence[Prompt]], places: int, shards: int, each: int) -> list[Reading]:
    """The calls that read all the `new` prompts of places, at most `READ` tokens in each, in few different shapes."""
    most = max(1, READ // padded_length(max(len(prompt) for prompts in new.values() for prompt in prompts)))
    depth = min(each, most, power_of_four(max(map(len, new.values()))))
    pieces: list[list[tuple[int, list[Prompt]]]] = [[] for _ in range(shards)]
    for place, prompts in new.items():
        ordered = sorted(prompts, key=len)
        pieces[place // places] += [(place, ordered[i : i + depth]) for i in range(0, len(ordered), depth)]
    count, top = max(map(len, pieces)), min(places, max(1, most // depth))
    calls = -(-count // top)
    found = []
    for shard in pieces:
        shard.sort(key=lambda piece: (len(piece[1][-1]), piece[0]))  # those of a length together
    for i in range(calls):
        here = [shard[i * -(-count // calls) : (i + 1) * -(-count // calls)] for shard in pieces]
        length = padded_length(max(len(prompts[-1]) for shard in here for _, prompts in shard))
        width = min(top, power_of_four(max(*map(len, here), LEAST // (depth * length), 1)))
        in_order = width == places and all(len({place for place, _ in shard}) == len(shard) for shard in here)
        entries = [
            (s * width + (place % places if in_order else a), place, prompts)
            for s, shard in enumerate(here)
            for a, (place, prompts) in enumerate(shard)
        ]
        found.append(Reading(width, depth, length, entries, in_order))
    return found
