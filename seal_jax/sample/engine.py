"""Generation for many requests and many adapters: queues on the host, `decode` on the device.

Requests of one adapter share its rows; a row that ends takes the adapter's next request at the next look of the host, so that a few long
sequences do not hold up the rest. A prompt of an adapter is prefilled once, however many requests have it and whenever they start. Caches
are as long as the sequences in them, and not as those may become. A request's tokens depend on its prompt, adapter, key, sampling and
constraint alone.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from seal_jax.fit.plan import deal, padded_length
from seal_jax.models.decoder import LANES, Cache, Decoder, packed
from seal_jax.parallel import mesh as mesh_lib
from seal_jax.sample import decode as device
from seal_jax.sample.constraint import Constraint, guide
from seal_jax.sample.logits import Guide, Sampling

LOOK = 16  # tokens between the host's looks at who is done
SHORT = 512  # positions that a cache has before it grows, to twice as many each time; longer prompts apart
FEW = 8  # requests that start together in a program for few; for more there is one for as many as there are rows


@dataclasses.dataclass(frozen=True)
class Request:
    """One sequence to generate. `key` is a raw threefry key ([2] uint32, see `seal_jax.rng.words`); greedy at temperature 0.

    Under a `constraint` (`seal_jax.sample.constraint.for_schema`), the tokens spell a text that it matches, or the limit cut them short.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    key: tuple[int, int] = (0, 0)
    adapter: int = 0
    constraint: Constraint | None = None


@dataclasses.dataclass(frozen=True)
class Generated:
    """The new tokens of a request, without the stop token; `stopped` is False where the limit cut it short."""

    tokens: tuple[int, ...]
    stopped: bool


def generate(
    decoder: Decoder,
    params: Any,
    requests: Sequence[Request],
    *,
    stop: Sequence[int],
    rows: int,
    lora: Any = None,
    mesh: Mesh | None = None,
    progress: Callable[..., None] | None = None,
) -> list[Generated]:
    """What the model continues each prompt with, in the order of `requests`.

    `rows` sequences are decoded at once by each shard of `mesh` (default: one device). `lora`: adapters stacked [E, ...] with their scale
    folded in (`models.lora.scaled`), dealt out over the shards, among which `Request.adapter` chooses; None: the bare model, and the
    requests are dealt out. `progress` is called with the number of requests that have finished since, their new tokens (stop tokens
    included) as `tokens`, and the number of requests that wait for a row as `waiting`.
    Raises ValueError for an empty prompt, for `max_tokens` below 1, for an adapter that is not there, and for a constraint without
    `stop` ids to end it with.
    """
    mesh = mesh or mesh_lib.single()
    count = 0 if lora is None else jax.tree.leaves(lora)[0].shape[0]
    _check(requests, stop, count)
    results: list[Generated | None] = [None] * len(requests)
    shards = _queues(requests, count, mesh_lib.shards(mesh))
    if not any(shards):
        return []
    each = min(rows, max(len(queue) for queues in shards for queue in queues.values()))
    # No more than there are, but for a rounding that keeps the number of programs small.
    at_once = min(max(1, rows // each), _power_of_two(max(map(len, shards))))
    model = _Model(decoder, mesh, packed(params), tuple(stop), *_guide(requests, stop, decoder.spec.vocab_size, mesh))
    left = len(requests)
    for start in range(0, max(map(len, shards)), at_once):
        group: list[int | None] = []  # the adapters of the pool, as many from each shard
        for queues in shards:
            here = sorted(queues)[start : start + at_once]
            group += [*here, *[None] * (at_once - len(here))]
        own = None
        if lora is not None:
            local = np.asarray([(a or 0) % (count // len(shards)) for a in group], np.int32)
            own = device.take(mesh, decoder.dtype, lora, mesh_lib.put(local, mesh_lib.edit_sharding(mesh)))
        waiting = [[] if a is None else shards[i // at_once][a] for i, a in enumerate(group)]
        pool = _Pool(model, own, requests, waiting, each)
        for ended in pool.run():
            for i, generated in ended:
                results[i] = generated
            left -= len(ended)
            if progress is not None and ended:
                tokens = sum(len(generated.tokens) + generated.stopped for _, generated in ended)
                progress(len(ended), tokens=tokens, waiting=left - len(pool.owner))
    return results  # type: ignore[return-value]


def _queues(requests: Sequence[Request], adapters: int, shards: int) -> list[dict[int, list[int]]]:
    """For each shard, the requests of each adapter that it has; without adapters, its share of the requests, under 0.

    Requests that share a prompt stand next to each other, so that no more than one prompt of an adapter has to be kept for later.
    """
    order = sorted(range(len(requests)), key=lambda i: (requests[i].adapter, len(requests[i].prompt), requests[i].prompt, i))
    queues: list[dict[int, list[int]]] = [{} for _ in range(shards)]
    if adapters:
        for i in order:
            queues[requests[i].adapter // (adapters // shards)].setdefault(requests[i].adapter, []).append(i)
        return queues
    # Whole prompts, so that each is prefilled once, unless there are fewer of them than shards.
    prompts: dict[tuple[int, ...], list[int]] = {}
    for i in order:
        prompts.setdefault(requests[i].prompt, []).append(i)
    parts = list(prompts.values()) if len(prompts) >= shards else [[i] for i in order]
    costs = [sum(requests[i].max_tokens for i in part) for part in parts]
    for part, shard in zip(parts, deal(costs, shards), strict=True):
        queues[shard].setdefault(0, []).extend(part)
    return queues


def _check(requests: Sequence[Request], stop: Sequence[int], adapters: int) -> None:
    for i, r in enumerate(requests):
        if not r.prompt:
            raise ValueError(f"request {i}: a prompt without tokens cannot be continued")
        if r.max_tokens < 1:
            raise ValueError(f"request {i}: max_tokens={r.max_tokens}: expected at least 1")
        if not 0 <= r.adapter < max(1, adapters):
            raise ValueError(f"request {i}: adapter {r.adapter} of {adapters}")
        if r.constraint is not None and not stop:
            raise ValueError(f"request {i}: a constraint, and no stop ids to end it with")


def _guide(requests: Sequence[Request], stop: Sequence[int], vocab_size: int, mesh: Mesh) -> tuple[Guide | None, dict[Constraint, int]]:
    constraints = list(dict.fromkeys(r.constraint for r in requests if r.constraint is not None))
    if not constraints:
        return None, {}
    tables, starts = guide(constraints, stop, vocab_size)
    return mesh_lib.put(tables, mesh_lib.everywhere(mesh)), starts


def cache_length(prompt: int, tokens: int) -> int:
    """The length of a cache for sequences of so many `tokens` at most, `prompt` tokens of prompt among them."""
    return -(-max(padded_length(prompt), tokens) // LANES) * LANES


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


class _Model(NamedTuple):
    """What stays the same through a call of `generate`."""

    decoder: Decoder
    mesh: Mesh
    params: Any
    stop: tuple[int, ...]
    guide: Guide | None
    states: dict[Constraint, int]  # where in the guide each constraint starts


class _Start(NamedTuple):
    """A request that begins: which, in which row of which adapter (both counted within the pool)."""

    adapter: int
    row: int
    index: int


class _Pool:
    """`each` rows for each adapter of `lora` [E, ...] (or the bare model of each shard), and the `queues` [E] that they serve."""

    def __init__(self, model: _Model, lora: Any, requests: Sequence[Request], queues: Sequence[Sequence[int]], each: int):
        self.model, self.lora, self.requests, self.each, self.size = model, lora, requests, each, len(queues)
        self.queues = [deque(q) for q in queues]
        self.owner: dict[tuple[int, int], int] = {}  # (adapter, row) -> the request that has it
        # (adapter, prompt) -> the prefix that holds it, and where. Only prompts that are still wanted.
        self.ready: dict[tuple[int, tuple[int, ...]], tuple[device.Prefix, int]] = {}
        everyone = [requests[i] for queue in queues for i in queue]
        room = max(len(r.prompt) + r.max_tokens for r in everyone)
        self.most = cache_length(max(len(r.prompt) for r in everyone), room)  # positions that a row may need
        self.length: dict[tuple[int, int], int] = {}  # (adapter, row) -> tokens of its sequence, drawn ones included
        out = _power_of_two(max(r.max_tokens for r in everyone))
        self.rows = device.empty(model.decoder, model.mesh, self.size, each, self._room(0), out)

    def run(self) -> Iterator[list[tuple[int, Generated]]]:
        """Serves the queues to their ends; yields the requests that ended since the last look."""
        m = self.model
        while True:
            starts = self._start()
            if not self.owner:
                return
            steps = LOOK if any(self.queues) else 4 * LOOK
            # Prompts lie in their prefix padded, as long as the longest of those prefilled together.
            width = max((prefix.cache.v.shape[-2] for prefix, _ in starts), default=0)
            self._resize(max(width, *(min(n + steps, self._limit(place)) for place, n in self.length.items())))
            for prefix, together in starts:
                self._insert(prefix, together)
            self._keep([self._prompt(e, queue[0]) for e, queue in enumerate(self.queues) if queue])
            given = mesh_lib.put(np.int32(steps), mesh_lib.everywhere(m.mesh))
            self.rows = device.decode(m.decoder, m.stop, m.mesh, m.params, self.lora, self.rows, given, m.guide)
            yield self._ended()

    def _limit(self, place: tuple[int, int]) -> int:
        """The most tokens that the sequence at `place` may come to."""
        r = self.requests[self.owner[place]]
        return len(r.prompt) + r.max_tokens

    def _room(self, tokens: int) -> int:
        """The length of a cache for sequences of so many tokens: one of a few, so that there are few programs."""
        room = max(SHORT, _power_of_two(tokens))
        return room if 2 * room <= self.most else self.most

    def _resize(self, tokens: int) -> None:
        """Has the cache no longer than sequences of so many tokens need: every step reads all of it, and long limits are seldom reached."""
        k, v = self.rows.cache
        room = self._room(tokens)
        if room != v.shape[-2]:
            self.rows = self.rows._replace(cache=())  # keys, then values, so that only one of them is there twice
            k = device.resize(self.model.mesh, -1, room, k)
            v = device.resize(self.model.mesh, -2, room, v)
            self.rows = self.rows._replace(cache=Cache(k, v))

    def _ended(self) -> list[tuple[int, Generated]]:
        """Takes the results out of the rows that are done: the one place where the host reads from the device."""
        done, drawn, out = mesh_lib.fetch((self.rows.done, self.rows.drawn, self.rows.out))
        ended = []
        for place, index in list(self.owner.items()):
            self.length[place] = len(self.requests[index].prompt) + int(drawn[place])
            if done[place]:
                del self.owner[place], self.length[place]
                ids = out[place][: drawn[place]].tolist()
                stopped = ids[-1] in self.model.stop
                ended.append((index, Generated(tuple(ids[:-1] if stopped else ids), stopped)))
        return ended

    def _start(self) -> list[tuple[device.Prefix, list[_Start]]]:
        """Gives the free rows to requests from the queues. Returns those, by the prefix that holds their prompts."""
        starts = []
        for e, queue in enumerate(self.queues):
            free = [r for r in range(self.each) if (e, r) not in self.owner]
            starts += [_Start(e, r, queue.popleft()) for r in free[: len(queue)]]
        self._prefill(list(dict.fromkeys(self._prompt(s.adapter, s.index) for s in starts)))
        by_prefix: dict[int, tuple[device.Prefix, list[_Start]]] = {}
        for s in starts:
            self.owner[s.adapter, s.row] = s.index
            self.length[s.adapter, s.row] = len(self.requests[s.index].prompt) + 1
            prefix, _ = self.ready[self._prompt(s.adapter, s.index)]
            by_prefix.setdefault(id(prefix), (prefix, []))[1].append(s)
        return list(by_prefix.values())

    def _put(self, tree: Any) -> Any:
        return mesh_lib.put(tree, mesh_lib.edit_sharding(self.model.mesh))

    def _prompt(self, adapter: int, index: int) -> tuple[int, tuple[int, ...]]:
        return adapter, self.requests[index].prompt

    def _prefill(self, prompts: list[tuple[int, tuple[int, ...]]]) -> None:
        """Makes `prompts` ready, those that are not."""
        new: list[list[tuple[int, ...]]] = [[] for _ in range(self.size)]
        for adapter, prompt in prompts:
            if (adapter, prompt) not in self.ready:
                new[adapter].append(prompt)
        if not any(new):
            return
        shape = self.size, min(self.each, _power_of_two(max(map(len, new))))
        tokens = np.zeros((*shape, padded_length(max(len(p) for own in new for p in own))), np.int32)
        lengths = np.zeros(shape, np.int32)
        for e, own in enumerate(new):
            for p, prompt in enumerate(own):
                tokens[e, p, : len(prompt)], lengths[e, p] = prompt, len(prompt)
        prefix = device.prefill(self.model.decoder, self.model.mesh, self.model.params, self.lora, *self._put((tokens, lengths)))
        self.ready.update({(e, prompt): (prefix, p) for e, own in enumerate(new) for p, prompt in enumerate(own)})

    def _insert(self, prefix: device.Prefix, starts: list[_Start]) -> None:
        """Puts requests whose prompts are in `prefix` into their rows."""
        columns = [[s for s in starts if s.adapter == e] for e in range(self.size)]
        width = self.each if max(map(len, columns)) > FEW else min(FEW, self.each)
        shape = (self.size, width)
        row, source, limit = np.full(shape, self.each, np.int32), np.zeros(shape, np.int32), np.ones(shape, np.int32)
        state, key, temperature = np.zeros(shape, np.int32), np.zeros((*shape, 2), np.uint32), np.zeros(shape, np.float32)
        top_p, top_k = np.ones(shape, np.float32), np.zeros(shape, np.int32)
        for e, column in enumerate(columns):
            for q, s in enumerate(column):
                r = self.requests[s.index]
                source[e, q] = self.ready[e, r.prompt][1]
                row[e, q], limit[e, q] = s.row, r.max_tokens
                state[e, q] = 0 if r.constraint is None else self.model.states[r.constraint]
                key[e, q], temperature[e, q], top_p[e, q], top_k[e, q] = r.key, r.temperature, r.top_p, r.top_k
        given = device.Starts(row, source, limit, state, Sampling(key, temperature, top_p, top_k))
        self.rows = device.insert(self.model.stop, self.model.mesh, self.rows, prefix, self._put(given), self.model.guide)

    def _keep(self, wanted: list[tuple[int, tuple[int, ...]]]) -> None:
        """Forgets all prompts but those `wanted` next, of which each adapter has one at most, and frees the memory of the others."""
        index: dict[int, np.ndarray] = {}
        kept = {key: self.ready[key] for key in wanted if key in self.ready}
        for (e, _), (prefix, p) in kept.items():
            index.setdefault(id(prefix), np.zeros(self.size, np.int32))[e] = p
        prefixes = {id(prefix): prefix for prefix, _ in kept.values()}
        small = {i: p if p.length.shape[1] == 1 else device.only(self.model.mesh, p, self._put(index[i])) for i, p in prefixes.items()}
        self.ready = {key: (small[id(prefix)], 0) for key, (prefix, _) in kept.items()}
