"""Generation for many requests and many adapters: `queues` on the host, `decode` on the device.

Adapters have places on the device, with some rows each. A row that ends takes the adapter's next request at the next look of the host, and
a place whose adapter has no more takes another adapter: so a few long sequences, or a few adapters with many requests, do not hold up the
rest. A prompt of an adapter is prefilled once, however many requests have it at a time, and no more tokens at once than keep the device
busy. Caches are as long as the sequences in them, and not as those may become. A request's tokens depend on its prompt, adapter, key,
sampling and constraint alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from seal_jax.fit.plan import padded_length, power_of_two
from seal_jax.models.decoder import LANES, Cache, Decoder, packed
from seal_jax.parallel import mesh as mesh_lib
from seal_jax.sample import decode as device
from seal_jax.sample import queues
from seal_jax.sample.constraint import Constraint, guide
from seal_jax.sample.logits import Guide, Sampling
from seal_jax.sample.queues import Prompt, Reading, Request, Start

LOOK = 16  # tokens between the host's looks at who is done
SHORT = 512  # positions that a cache has before it grows, to twice as many each time; longer prompts apart
FEW = 8  # of a shard, what a program for few starts, exchanges or reads at once; for more there is one for all


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
    Raises ValueError for an empty prompt, for `rows` or `max_tokens` below 1, for a temperature or nucleus that is none, for tokens or an
    adapter that are not there, and for a constraint without `stop` ids to end it with.
    """
    mesh = mesh or mesh_lib.single()
    count = 0 if lora is None else jax.tree.leaves(lora)[0].shape[0]
    _check(requests, stop, rows, count, decoder.spec.vocab_size)
    results: list[Generated | None] = [None] * len(requests)
    if not requests:
        return []
    shares = queues.shares(requests, count, mesh_lib.shards(mesh))
    adapter = _size(lora) / count / _size(params) if count else 0.0
    line = queues.Queues(shares, *queues.layout(shares, rows, adapter))
    model = _Model(decoder, mesh, packed(params), lora, tuple(stop), *_guide(requests, stop, decoder.spec.vocab_size, mesh))
    left = len(requests)
    for ended in _Pool(model, requests, line).run():
        for i, generated in ended:
            results[i] = generated
        left -= len(ended)
        if progress is not None and ended:
            tokens = sum(len(generated.tokens) + generated.stopped for _, generated in ended)
            progress(len(ended), tokens=tokens, waiting=left - len(line.owner))
    return results  # type: ignore[return-value]


def _size(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def _check(requests: Sequence[Request], stop: Sequence[int], rows: int, adapters: int, vocab_size: int) -> None:
    known = range(vocab_size)
    if rows < 1:
        raise ValueError(f"rows={rows}: expected at least 1")
    if strange := [s for s in stop if s not in known]:
        raise ValueError(f"stop ids {strange}: the model's tokens are 0 to {vocab_size - 1}")
    for i, r in enumerate(requests):
        if not r.prompt:
            raise ValueError(f"request {i}: a prompt without tokens cannot be continued")
        if strange := [t for t in r.prompt if t not in known]:
            raise ValueError(f"request {i}: tokens {strange[:3]} in its prompt: the model's are 0 to {vocab_size - 1}")
        if r.max_tokens < 1:
            raise ValueError(f"request {i}: max_tokens={r.max_tokens}: expected at least 1")
        if not 0 <= r.temperature < math.inf:
            raise ValueError(f"request {i}: temperature={r.temperature}: expected a finite number, at least 0")
        if not 0 < r.top_p <= 1:
            raise ValueError(f"request {i}: top_p={r.top_p}: expected more than 0, and at most 1")
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
    """The length of a cache for sequences of so many `tokens` at most, `prompt` tokens of prompt among them: one of a few, since each is a
    program, and the longest prompt is another one in each group of contexts."""
    room = max(padded_length(prompt), tokens)
    part = LANES if room <= 8 * LANES else 2 * LANES
    return -(-room // part) * part


class _Model(NamedTuple):
    """What stays the same through a call of `generate`."""

    decoder: Decoder
    mesh: Mesh
    params: Any
    lora: Any  # [K, ...] all adapters, or None
    stop: tuple[int, ...]
    guide: Guide | None
    states: dict[Constraint, int]  # where in the guide each constraint starts


_Key = tuple[int, int, Prompt]  # shard, adapter, prompt


class _Pool:
    """The places of `line` on the device, with their adapters and rows, until all `requests` are served."""

    def __init__(self, model: _Model, requests: Sequence[Request], line: queues.Queues):
        self.model, self.requests, self.line = model, requests, line
        self.size, self.shards = len(line.adapter), mesh_lib.shards(model.mesh)
        self.own: Any = None  # [E, ...] the adapters of the places; None: the bare model
        self.ready: dict[_Key, tuple[device.Prefix, int]] = {}  # the prefix that holds a prompt, and its number there
        room = max(len(r.prompt) + r.max_tokens for r in requests)
        self.most = cache_length(max(len(r.prompt) for r in requests), room)  # positions that a row may need
        self.length: dict[tuple[int, int], int] = {}  # (place, row) -> tokens of its sequence, drawn ones included
        out = power_of_two(max(r.max_tokens for r in requests))
        self.rows = device.empty(model.decoder, model.mesh, self.size, line.each, self._room(0), out)

    def run(self) -> Iterator[list[tuple[int, Generated]]]:
        """Serves all requests; yields those that ended since the last look."""
        m, line = self.model, self.line
        while True:
            self._admit(line.admit())
            starts = line.start()
            if not line.owner:
                return
            self.length.update({(s.place, s.row): len(self.requests[s.index].prompt) + 1 for s in starts})
            steps = LOOK if any(line.waiting) else 4 * LOOK
            self._begin(starts, steps)
            given = mesh_lib.put(np.int32(steps), mesh_lib.everywhere(m.mesh))
            self.rows = device.decode(m.decoder, m.stop, m.mesh, m.params, self.own, self.rows, given, m.guide)
            yield self._ended()

    def _put(self, tree: Any) -> Any:
        return mesh_lib.put(tree, mesh_lib.edit_sharding(self.model.mesh))

    def _dealt(self, numbers: Sequence[Sequence[int]], width: int, rest: int = 0) -> np.ndarray:
        """Some numbers for each shard, `width` of them, filled up with `rest`."""
        return np.asarray([n for own in numbers for n in [*own, *[rest] * (width - len(own))]], np.int32)

    # --- Adapters ------------------------------------------------------------------------------------------------------

    def _admit(self, taken: list[tuple[int, int]]) -> None:
        """Brings adapters to the places that they have been given."""
        m, places = self.model, self.line.places
        if m.lora is None or not taken:
            return
        count = jax.tree.leaves(m.lora)[0].shape[0] // self.shards
        if self.own is None:
            index = np.zeros(self.size, np.int32)
            for place, adapter in taken:
                index[place] = adapter % count
            self.own = device.take(m.mesh, m.decoder.dtype, m.lora, self._put(index))
            return
        shares = [[(p % places, a % count) for p, a in taken if p // places == shard] for shard in range(self.shards)]
        width = min(FEW, places)
        for i in range(0, max(map(len, shares)), width):
            some = [share[i : i + width] for share in shares]
            index = self._dealt([[a for _, a in own] for own in some], width)
            to = self._dealt([[p for p, _ in own] for own in some], width, places)
            self.own = device.exchange(m.mesh, self.own, m.lora, *self._put((index, to)))

    # --- Room ----------------------------------------------------------------------------------------------------------

    def _room(self, tokens: int) -> int:
        """The length of a cache for sequences of so many tokens: one of a few, so that there are few programs."""
        room = max(SHORT, power_of_two(tokens))
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

    def _limit(self, place: tuple[int, int]) -> int:
        """The most tokens that the sequence at `place` may come to."""
        r = self.requests[self.line.owner[place]]
        return len(r.prompt) + r.max_tokens

    # --- Prompts -------------------------------------------------------------------------------------------------------

    def _key(self, start: Start) -> _Key:
        r = self.requests[start.index]
        return start.place // self.line.places, r.adapter, r.prompt

    def _begin(self, starts: list[Start], steps: int) -> None:
        """Puts requests into their rows, and has those of their prompts read that are not; the caches get room for `steps` more tokens."""
        new: dict[int, list[Prompt]] = {}
        where = {self._key(s): s.place for s in starts}
        for key, place in where.items():
            if key not in self.ready:
                new.setdefault(place, []).append(key[2])
        calls = queues.readings(new, self.line.places, self.shards, self.line.each) if new else []
        # Prompts lie in their prefix padded, as long as the longest of those read together.
        widths = [*(c.length for c in calls), *(self.ready[key][0].cache.v.shape[-2] for key in where if key in self.ready)]
        self._resize(max([*widths, *(min(n + steps, self._limit(place)) for place, n in self.length.items())]))
        wanted = {(s, a, self.requests[queue[0]].prompt) for s, waiting in enumerate(self.line.waiting) for a, queue in waiting.items()}
        for call in (None, *calls):  # one by one, so that what was read is in its rows, and its own cache gone, before more is
            if call is not None:
                self._prefill(call)
            self._seat([s for s in starts if self._key(s) in self.ready])
            starts = [s for s in starts if self._key(s) not in self.ready]
            self._keep(wanted)

    def _seat(self, starts: list[Start]) -> None:
        """Puts requests whose prompts have been read into their rows."""
        by_prefix: dict[int, tuple[device.Prefix, list[Start]]] = {}
        for s in starts:
            prefix, _ = self.ready[self._key(s)]
            by_prefix.setdefault(id(prefix), (prefix, []))[1].append(s)
        for prefix, together in by_prefix.values():
            self._insert(prefix, together)

    def _prefill(self, call: Reading) -> None:
        m = self.model
        shape = self.shards * call.width, call.depth
        tokens, lengths, places = np.zeros((*shape, call.length), np.int32), np.zeros(shape, np.int32), np.zeros(shape[0], np.int32)
        for a, place, prompts in call.entries:
            places[a] = place % self.line.places
            for p, prompt in enumerate(prompts):
                tokens[a, p, : len(prompt)], lengths[a, p] = prompt, len(prompt)
        given = self._put((tokens, lengths) if call.in_order else (tokens, lengths, places))
        prefix = device.prefill(m.decoder, m.mesh, m.params, self.own, *given)
        for a, place, prompts in call.entries:
            whose, number = (place // self.line.places, self.line.adapter[place] or 0), a % call.width * call.depth
            self.ready.update({(*whose, prompt): (prefix, number + p) for p, prompt in enumerate(prompts)})

    def _insert(self, prefix: device.Prefix, starts: list[Start]) -> None:
        """Puts requests whose prompts are in `prefix` into their rows."""
        each = self.line.each
        columns = [[s for s in starts if s.place == e] for e in range(self.size)]
        width = each if max(map(len, columns)) > FEW else min(FEW, each)
        shape = (self.size, width)
        row, source, limit = np.full(shape, each, np.int32), np.zeros(shape, np.int32), np.ones(shape, np.int32)
        state, key, temperature = np.zeros(shape, np.int32), np.zeros((*shape, 2), np.uint32), np.zeros(shape, np.float32)
        top_p, top_k = np.ones(shape, np.float32), np.zeros(shape, np.int32)
        for e, column in enumerate(columns):
            for q, s in enumerate(column):
                r = self.requests[s.index]
                source[e, q] = self.ready[self._key(s)][1]
                row[e, q], limit[e, q] = s.row, r.max_tokens
                state[e, q] = 0 if r.constraint is None else self.model.states[r.constraint]
                key[e, q], temperature[e, q], top_p[e, q], top_k[e, q] = r.key, r.temperature, r.top_p, r.top_k
        given = device.Starts(row, source, limit, state, Sampling(key, temperature, top_p, top_k))
        self.rows = device.insert(self.model.stop, self.model.mesh, self.rows, prefix, self._put(given), self.model.guide)

    def _keep(self, wanted: Collection[_Key]) -> None:
        """Forgets all prompts but those `wanted` next, of which each adapter has one at most, and frees the memory of the others."""
        kept = {key: self.ready[key] for key in self.ready if key in wanted}
        self.ready = {}
        for prefix in {id(prefix): prefix for prefix, _ in kept.values()}.values():
            of_shard = [[key for key, (own, _) in kept.items() if own is prefix and key[0] == shard] for shard in range(self.shards)]
            size, width = prefix.length.size // self.shards, queues.power_of_four(max(map(len, of_shard)))
            if width < size:
                numbers = self._dealt([[kept[key][1] for key in keys] for keys in of_shard], width)
                small = device.only(self.model.mesh, prefix, self._put(numbers))
                self.ready.update({key: (small, number) for keys in of_shard for number, key in enumerate(keys)})
            else:
                self.ready.update({key: kept[key] for keys in of_shard for key in keys})

    # --- Results -------------------------------------------------------------------------------------------------------

    def _ended(self) -> list[tuple[int, Generated]]:
        """Takes the results out of the rows that are done: the one place where the host reads from the device."""
        line = self.line
        done, drawn = mesh_lib.fetch((self.rows.done, self.rows.drawn))
        for place, index in line.owner.items():
            self.length[place] = len(self.requests[index].prompt) + int(drawn[place])
        ended = {place: line.owner.pop(place) for place in list(line.owner) if done[place]}
        found = []
        for place, ids in self._drawn(list(ended)).items():
            del self.length[place]
            tokens = ids[: drawn[place]].tolist()
            stopped = tokens[-1] in self.model.stop
            found.append((ended[place], Generated(tuple(tokens[:-1] if stopped else tokens), stopped)))
        return found

    def _drawn(self, places: list[tuple[int, int]]) -> dict[tuple[int, int], np.ndarray]:
        """What the rows at `places` have drawn: of few rows those alone, for limits are long and looks are many."""
        line = self.line
        of_shard = [[place for place in places if place[0] // line.places == shard] for shard in range(self.shards)]
        if max(map(len, of_shard)) > FEW:
            out = mesh_lib.fetch(self.rows.out)
            return {place: out[place] for place in places}
        if not places:
            return {}
        numbers = self._dealt([[e % line.places * line.each + r for e, r in own] for own in of_shard], FEW)
        out = mesh_lib.fetch(device.drawn(self.model.mesh, self.rows.out, self._put(numbers)))
        return {place: out[shard * FEW + i] for shard, own in enumerate(of_shard) for i, place in enumerate(own)}
