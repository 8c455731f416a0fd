import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax import rng
from seal_jax.models import lora
from seal_jax.models.decoder import Decoder
from seal_jax.sample import decode, engine
from seal_jax.sample.engine import Generated, Request, generate

torch = pytest.importorskip("torch", reason="torch computes the reference; pip install seal_jax[test]")

FAMILIES = ["llama2", "llama3", "smollm2", "qwen2", "qwen3"]
ROWS, LIMIT, STOP = 4, 16, tuple(range(0, 352, 25))


def prompts(spec, count, seed=0):
    """Of 1 to 16 tokens."""
    draw = np.random.default_rng(seed)
    return [tuple(draw.integers(0, spec.vocab_size, (16, 1, 9, 12, 5, 3, 7)[i % 7]).tolist()) for i in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers_token_for_token(tiny, family):
    """With several stop ids; rows that stop at different times, and rows that run to their limit."""
    model = tiny(family)
    reference = model.load()
    reference.generation_config.eos_token_id = None
    expected: dict[tuple[int, ...], Generated] = {}
    for prompt in prompts(model.spec, 24):
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": LIMIT, "do_sample": False, "eos_token_id": list(STOP), "pad_token_id": 0}
        with torch.no_grad():
            tokens = reference.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
        stopped = tokens[-1] in STOP
        expected[prompt] = Generated(tuple(tokens[:-1] if stopped else tokens), stopped)
    some = [p for p, g in expected.items() if g.stopped][:3] + [p for p, g in expected.items() if not g.stopped][:3]
    assert sum(expected[p].stopped for p in some) >= 2 and len({len(expected[p].tokens) for p in some}) >= 3
    ours = generate(Decoder(model.spec), model.params, [Request(p, LIMIT) for p in some], stop=STOP, rows=ROWS)
    assert ours == [expected[p] for p in some]


@pytest.fixture(scope="module")
def world(tiny):
    """A model; twelve requests that differ in everything, some with a prompt in common; and what each gives alone."""
    model = tiny("qwen2")
    decoder = Decoder(model.spec)
    asked = prompts(model.spec, 7)
    settings = [(0.0, 1.0, 0), (1.0, 1.0, 0), (0.7, 0.95, 0), (1.5, 0.9, 40), (1.0, 1.0, 5)]
    requests = [
        Request(asked[i % 7 if i < 9 else 0], 9 + i % 8, *settings[i % 5], key=tuple(rng.words(0, "request", i).tolist()))
        for i in range(12)
    ]
    alone = [generate(decoder, model.params, [request], stop=STOP, rows=1)[0] for request in requests]
    assert any(g.stopped for g in alone) and len({g.tokens for g in alone}) == len(alone)
    return model, decoder, requests, alone


def test_a_request_does_not_depend_on_its_company(world):
    """More requests than rows, in any order, with any neighbours: each as it is alone."""
    model, decoder, requests, alone = world
    seen = []

    def progress(n, tokens, waiting):
        seen.append((n, tokens, waiting))

    assert generate(decoder, model.params, requests, stop=STOP, rows=ROWS, progress=progress) == alone
    ended, tokens, waiting = zip(*seen, strict=True)
    assert sum(ended) == len(requests) and len(seen) > 1
    assert sum(tokens) == sum(len(g.tokens) + g.stopped for g in alone)
    assert waiting[0] == len(requests) - ROWS and waiting[-1] == 0 and sorted(waiting, reverse=True) == list(waiting)
    order = np.random.default_rng(0).permutation(len(requests))
    assert generate(decoder, model.params, [requests[i] for i in order], stop=STOP, rows=ROWS) == [alone[i] for i in order]
    assert generate(decoder, model.params, requests[3:7], stop=STOP, rows=ROWS) == alone[3:7]


@pytest.fixture
def prefilled(monkeypatch):
    """A list of all (adapter within its group, prompt) that `decode.prefill` is called with from now on, and their shapes."""
    seen, prefill = [], decode.prefill

    def counted(decoder, mesh, params, adapters, tokens, length):
        places = np.argwhere(np.asarray(length))
        seen.extend((tokens.shape, int(e), tuple(np.asarray(tokens)[e, p, : length[e, p]].tolist())) for e, p in places)
        return prefill(decoder, mesh, params, adapters, tokens, length)

    monkeypatch.setattr(decode, "prefill", counted)
    return seen


def test_requests_of_one_prompt_are_prefilled_once(world, prefilled):
    """Also those that wait for a row, while others of their prompt go on or are over."""
    model, decoder, requests, alone = world
    shared = [i for i, r in enumerate(requests) if r.prompt == requests[0].prompt]
    assert len(shared) == ROWS + 1
    assert generate(decoder, model.params, [requests[i] for i in shared], stop=STOP, rows=ROWS) == [alone[i] for i in shared]
    assert prefilled == [((1, 1, 16), 0, requests[0].prompt)]
    for rows in (ROWS, 2, 1):
        prefilled.clear()
        assert generate(decoder, model.params, requests * 3, stop=STOP, rows=rows) == alone * 3
        assert sorted(p for _, _, p in prefilled) == sorted({r.prompt for r in requests})


def test_other_keys_give_other_samples(world):
    model, decoder, requests, alone = world
    other = [dataclasses.replace(r, key=(r.key[0] ^ 1, r.key[1])) for r in requests]
    again = generate(decoder, model.params, other, stop=STOP, rows=ROWS)
    for request, one, two in zip(requests, alone, again, strict=True):
        assert (one == two) == (request.temperature == 0)


def test_limits_and_stops_cut_and_do_nothing_else(world):
    """Without stop ids and with the largest limit, everyone says the same at first, and goes on."""
    model, decoder, requests, alone = world
    free = generate(decoder, model.params, [dataclasses.replace(r, max_tokens=LIMIT) for r in requests], stop=(), rows=ROWS)
    assert all(len(g.tokens) == LIMIT and not g.stopped for g in free)

    def cut(whole, limit):
        at = next((i for i, token in enumerate(whole.tokens[:limit]) if token in STOP), None)
        return Generated(whole.tokens[: limit if at is None else at], at is not None)

    assert alone == [cut(g, r.max_tokens) for g, r in zip(free, requests, strict=True)]
    asked, expected = list(requests), list(alone)
    for r, g in zip(requests, free, strict=True):  # limits of 1, and such that the stop id comes as the last token or just too late
        end = len(cut(g, LIMIT).tokens)
        for limit in {1, min(end + 1, LIMIT), max(end, 1)}:
            asked.append(dataclasses.replace(r, max_tokens=limit))
            expected.append(cut(g, limit))
    assert generate(decoder, model.params, asked, stop=STOP, rows=ROWS) == expected


# --- Adapters -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(world):
    """Three adapters on all linear layers, stacked, with scale 2 folded in; and the trees before that."""
    spec = world[0].spec
    shapes = jax.eval_shape(lambda: lora.init(jax.random.key(0), spec, 3, list(lora.GROUPS)))
    draw = np.random.default_rng(0)
    trees = [jax.tree.map(lambda x: jnp.asarray(draw.normal(0, 0.2, x.shape), jnp.float32), shapes) for _ in range(3)]
    return jax.tree.map(lambda *x: jnp.stack(x), *[lora.scaled(tree, 2.0) for tree in trees]), trees


def test_stacked_adapters_equal_merged_models(world, adapters):
    """Each request is answered by its own adapter, greedily and by sampling, whoever else is there and however many fit at once."""
    model, decoder, requests, alone = world
    stacked, trees = adapters
    asked = [dataclasses.replace(r, adapter=(i * 2) % 3) for i, r in enumerate(requests[:7])]
    expected = [
        generate(decoder, lora.merge(model.params, trees[r.adapter], 2.0), [dataclasses.replace(r, adapter=0)], stop=STOP, rows=1)[0]
        for r in asked
    ]
    assert sum(a != b for a, b in zip(expected, alone, strict=False)) >= 6  # they do change the model
    assert generate(decoder, model.params, asked, stop=STOP, rows=6, lora=stacked) == expected  # two adapters at once, then one
    order = [3, 5, 0, 6, 1, 4, 2]
    got = generate(decoder, model.params, [asked[i] for i in order], stop=STOP, rows=6, lora=stacked)
    assert got == [expected[i] for i in order]


def test_a_prompt_is_prefilled_once_for_each_adapter(world, adapters, prefilled):
    """With rows for all adapters at once, whose requests start and end at different times."""
    model, decoder, requests, _ = world
    stacked, _ = adapters
    asked = [dataclasses.replace(r, adapter=i % 3) for i, r in enumerate(requests * 3)]
    expected = [generate(decoder, model.params, [r], stop=STOP, rows=1, lora=stacked)[0] for r in asked]
    prefilled.clear()
    assert generate(decoder, model.params, asked, stop=STOP, rows=36, lora=stacked) == expected
    assert len(prefilled) == len({(r.adapter, r.prompt) for r in asked})
    prefilled.clear()
    assert generate(decoder, model.params, asked * 2, stop=STOP, rows=27, lora=stacked) == expected * 2
    assert len(prefilled) == len({(r.adapter, r.prompt) for r in asked})


def test_an_adapter_of_zeros_is_the_bare_model(world, adapters):
    model, decoder, requests, alone = world
    nothing = jax.tree.map(jnp.zeros_like, adapters[0])
    asked = [dataclasses.replace(r, adapter=i % 3) for i, r in enumerate(requests[:7])]
    assert generate(decoder, model.params, asked, stop=STOP, rows=6, lora=nothing) == alone[:7]


# --- One program ----------------------------------------------------------------------------------------------------


def test_new_values_do_not_compile_again(world):
    model, decoder, requests, _ = world
    generate(decoder, model.params, requests, stop=STOP, rows=ROWS)
    programs = (decode.prefill, decode.insert, decode.decode)
    before = [f._cache_size() for f in programs]
    changed = [dataclasses.replace(r, temperature=0.3 + i / 9, top_p=0.5 + i / 30, top_k=3 * i, key=(i, 9)) for i, r in enumerate(requests)]
    generate(decoder, jax.tree.map(lambda x: x * 0.9, model.params), changed, stop=STOP, rows=ROWS)
    assert [f._cache_size() for f in programs] == before


def test_nothing_is_moved_between_host_and_device_unasked(world, adapters):
    model, decoder, requests, alone = world
    with jax.transfer_guard("disallow"):
        assert generate(decoder, model.params, requests, stop=STOP, rows=ROWS) == alone
        asked = [dataclasses.replace(r, adapter=i % 3) for i, r in enumerate(requests[:7])]
        generate(decoder, model.params, asked, stop=STOP, rows=6, lora=adapters[0])


def test_what_is_refused(world, adapters):
    model, decoder, requests, _ = world
    good = requests[0]
    for bad, lora_, told in [
        (dataclasses.replace(good, prompt=()), None, "request 1: a prompt without tokens"),
        (dataclasses.replace(good, max_tokens=0), None, "request 1: max_tokens=0"),
        (dataclasses.replace(good, adapter=1), None, "request 1: adapter 1 of 0"),
        (dataclasses.replace(good, adapter=3), adapters[0], "request 1: adapter 3 of 3"),
        (dataclasses.replace(good, adapter=-1), adapters[0], "request 1: adapter -1 of 3"),
    ]:
        with pytest.raises(ValueError, match=told):
            generate(decoder, model.params, [good, bad], stop=STOP, rows=ROWS, lora=lora_)
    assert generate(decoder, model.params, [], stop=STOP, rows=ROWS) == []


def test_caches_are_no_longer_than_the_sequences_in_them(world, monkeypatch):
    """They grow as sequences do, and shrink when the long ones are over; no one's tokens change by that. One row long, the others short."""
    model, decoder, requests, _ = world
    asked = [dataclasses.replace(requests[1], max_tokens=100)] + [
        dataclasses.replace(r, max_tokens=9 + i % 4) for i, r in enumerate(requests)
    ]
    stop = STOP[1:2]
    at_once = generate(decoder, model.params, asked, stop=stop, rows=2)
    assert len(at_once[0].tokens) > 64
    seen, decoded = [], decode.decode

    def watched(decoder, stop, mesh, params, lora, rows, steps, guide):
        written = np.asarray(rows.position + jnp.minimum(steps, rows.limit - rows.drawn))[~np.asarray(rows.done)]
        seen.append((rows.cache.v.shape[-2], int(np.max(written, initial=0))))
        return decoded(decoder, stop, mesh, params, lora, rows, steps, guide)

    monkeypatch.setattr(decode, "decode", watched)
    monkeypatch.setattr(engine, "SHORT", 16)
    for together in (asked, asked[::-1]):
        seen.clear()
        grown = generate(decoder, model.params, together, stop=stop, rows=2)
        assert (grown if together is asked else grown[::-1]) == at_once
        lengths = [length for length, _ in seen]
        assert {32, 64, 128} <= set(lengths) <= {16, 32, 64, 128}, "powers of two, up to the least that holds everyone"
        assert lengths.index(128) < len(lengths) - 1 - lengths[::-1].index(32)
        assert all(length >= need for length, need in seen)
