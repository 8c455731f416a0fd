"""Generation for many requests and many adapters: queues on the host, `decode` on the device.

Requests of one adapter share its rows; a row that ends takes the adapter's next request at the next look of the host, so that a few long
sequences do not hold up the rest. Requests with the same prompt that start together share one prefill. A request's tokens depend on its
prompt, adapter, key and sampling alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from seal_jax.fit.plan import padded_length
from seal_jax.models.decoder import Decoder
from seal_jax.sample import decode as device
from seal_jax.sample.logits import Sampling

LOOK = 16  # tokens between the host's looks at who is done
ROOM = 64  # a cache's length is a multiple of this


@dataclasses.dataclass(frozen=True)
class Request:
    """One sequence to generate. `key` is a raw threefry key ([2] uint32, see `seal_jax.rng.words`); greedy at temperature 0."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    key: tuple[int, int] = (0, 0)
    adapter: int = 0


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
    progress: Callable[[int], None] | None = None,
) -> list[Generated]:
    """What the model continues each prompt with, in the order of `requests`.

    `rows` sequences are decoded at once. `lora`: adapters stacked [E, ...] with their scale folded in (`models.lora.scaled`), among
    which `Request.adapter` chooses; None: the bare model. `progress` is called with the number of finished requests.
    Raises ValueError for an empty prompt, for `max_tokens` below 1, and for an adapter that is not there.
    """
    count = 1 if lora is None else jax.tree.leaves(lora)[0].shape[0]
    for i, r in enumerate(requests):
        if not r.prompt:
            raise ValueError(f"request {i}: a prompt without tokens cannot be continued")
        if r.max_tokens < 1:
            raise ValueError(f"request {i}: max_tokens={r.max_tokens}: expected at least 1")
        if not 0 <= r.adapter < count:
            raise ValueError(f"request {i}: adapter {r.adapter} of {0 if lora is None else count}")
    results: list[Generated | None] = [None] * len(requests)
    queues: dict[int, list[int]] = {}
    # Requests that share a prompt stand next to each other, so that it is prefilled once for them.
    for index in sorted(range(len(requests)), key=lambda i: (requests[i].adapter, len(requests[i].prompt), requests[i].prompt, i)):
        queues.setdefault(requests[index].adapter, []).append(index)
    if not queues:
        return []
    each = min(rows, max(map(len, queues.values())))
    # No more than there are, but for a rounding that keeps the number of programs small.
    at_once = min(max(1, rows // each), 1 << (len(queues) - 1).bit_length())
    adapters = sorted(queues)
    for start in range(0, len(adapters), at_once):
        group = adapters[start : start + at_once]
        _run(decoder, params, requests, [queues[a] for a in group], group, tuple(stop), each, at_once, lora, results, progress)
    return results  # type: ignore[return-value]


def _run(
    decoder: Decoder,
    params: Any,
    requests: Sequence[Request],
    queues: list[list[int]],
    group: Sequence[int],
    stop: tuple[int, ...],
    each: int,
    at_once: int,
    lora: Any,
    results: list[Generated | None],
    progress: Callable[[int], None] | None,
) -> None:
    """Serves the queues of the adapters `group`, at most `at_once` of them, with `each` rows an adapter."""
    everyone = [requests[i] for queue in queues for i in queue]
    room = max(padded_length(max(len(r.prompt) for r in everyone)), -(-max(len(r.prompt) + r.max_tokens for r in everyone) // ROOM) * ROOM)
    out = max(r.max_tokens for r in everyone)
    if lora is not None:
        index = np.asarray([*group, *[group[-1]] * (at_once - len(group))], np.int32)
        lora = _take(lora, jax.device_put(index))
    size = at_once if lora is not None else 1
    state = device.empty(decoder, size, each, room, 1 << (out - 1).bit_length())
    queues = [list(q) for q in queues]
    owner: dict[tuple[int, int], int] = {}
    while True:
        free = [[r for r in range(each) if (e, r) not in owner] for e in range(len(queues))]
        taken = [[(r, q.pop(0)) for r in f[: len(q)]] for f, q in zip(free, queues, strict=True)]
        if any(taken):
            state = _start(decoder, params, lora, state, stop, requests, taken, size, each)
            owner.update({(e, r): i for e, pairs in enumerate(taken) for r, i in pairs})
        if not owner:
            return
        state = device.decode(decoder, stop, params, lora, state, jax.device_put(np.int32(LOOK if any(queues) else 4 * LOOK)))
        done, drawn = jax.device_get((state.done, state.drawn))
        ended = [place for place in owner if done[place]]
        if ended:
            tokens = jax.device_get(state.out)
            for place in ended:
                ids = tokens[place][: drawn[place]].tolist()
                stopped = ids[-1] in stop
                results[owner.pop(place)] = Generated(tuple(ids[:-1] if stopped else ids), stopped)
            if progress is not None:
                progress(len(ended))


@jax.jit
def _take(lora: Any, index: jax.Array) -> Any:
    return jax.tree.map(lambda x: x[index], lora)


def _start(
    decoder: Decoder,
    params: Any,
    lora: Any,
    state: device.Rows,
    stop: tuple[int, ...],
    requests: Sequence[Request],
    taken: list[list[tuple[int, int]]],
    size: int,
    each: int,
) -> device.Rows:
    """Prefills the prompts of the requests in `taken` (per adapter, pairs of row and request) and puts them into their rows."""
    unique = [list(dict.fromkeys(requests[i].prompt for _, i in pairs)) for pairs in taken]
    prompts = 1 << (max(map(len, unique)) - 1).bit_length()
    length = padded_length(max(len(p) for u in unique for p in u))
    tokens, lengths = np.zeros((size, prompts, length), np.int32), np.zeros((size, prompts), np.int32)
    row, source, limit = np.full((size, each), each, np.int32), np.zeros((size, each), np.int32), np.ones((size, each), np.int32)
    key, temperature = np.zeros((size, each, 2), np.uint32), np.zeros((size, each), np.float32)
    top_p, top_k = np.ones((size, each), np.float32), np.zeros((size, each), np.int32)
    for e, pairs in enumerate(taken):
        for p, prompt in enumerate(unique[e]):
            tokens[e, p, : len(prompt)], lengths[e, p] = prompt, len(prompt)
        for q, (r, i) in enumerate(pairs):
            request = requests[i]
            row[e, q], source[e, q], limit[e, q] = r, unique[e].index(request.prompt), request.max_tokens
            key[e, q], temperature[e, q], top_p[e, q], top_k[e, q] = request.key, request.temperature, request.top_p, request.top_k
    prefix = device.prefill(decoder, params, lora, *jax.device_put((tokens, lengths)))
    return device.insert(stop, state, prefix, *jax.device_put((row, source, limit, Sampling(key, temperature, top_p, top_k))))
