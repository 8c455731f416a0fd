import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax import rng
from seal_jax.models import lora
from seal_jax.models.decoder import Decoder
from seal_jax.parallel import mesh as mesh_lib
from seal_jax.sample import decode, engine, queues
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
    """A list of all (entry, prompt) that `decode.prefill` is called with from now on, and their shapes."""
    seen, prefill = [], decode.prefill

    def counted(decoder, mesh, params, adapters, tokens, length, *places):
        found = np.argwhere(np.asarray(length))
        seen.extend((tokens.shape, int(e), tuple(np.asarray(tokens)[e, p, : length[e, p]].tolist())) for e, p in found)
        return prefill(decoder, mesh, params, adapters, tokens, length, *places)

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


@pytest.mark.parametrize("what", [np.nan, np.inf])
def test_a_row_that_a_diverged_adapter_had_serves_others_as_ever(world, adapters, what):
    """What that left in the row's cache is not seen; and its own answers end."""
    model, decoder, requests, _ = world
    stacked = jax.tree.map(lambda x: x.at[0].set(what), adapters[0])
    asked = [dataclasses.replace(r, adapter=1 + i % 2) for i, r in enumerate(requests[:4])]
    expected = [generate(decoder, model.params, [r], stop=(), rows=1, lora=stacked)[0] for r in asked]
    assert len({g.tokens for g in expected}) == len(asked)
    first = [Request((5, 6, 7), 40), Request((5, 6, 7, 8), 40, temperature=1.0)]
    for rows in (1, 3):
        found = generate(decoder, model.params, [*first, *asked], stop=(), rows=rows, lora=stacked)
        assert found[2:] == expected and [len(g.tokens) for g in found[:2]] == [40, 40]


# --- Few steps, and little at once --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crowd(world):
    """Twelve adapters, stacked, and what each answers alone to each of six prompts, in 16 tokens."""
    model, decoder, _, _ = world
    shapes = jax.eval_shape(lambda: lora.init(jax.random.key(0), model.spec, 2, ["q_proj", "up_proj"]))
    draw = np.random.default_rng(1)
    stacked = jax.tree.map(lambda x: jnp.asarray(draw.normal(0, 0.3, (12, *x.shape)), jnp.float32), shapes)
    asked = [[Request(p, 16, adapter=a) for p in prompts(model.spec, 6, seed=1)] for a in range(12)]
    alone = [[generate(decoder, model.params, [r], stop=(), rows=1, lora=stacked)[0].tokens for r in own] for own in asked]
    assert len({tokens for own in alone for tokens in own}) > 36
    return stacked, asked, alone


@pytest.fixture
def steps(monkeypatch):
    """A list of the steps that each call of `decode.decode` takes from now on."""
    taken, decoded = [], decode.decode

    def counted(*args):
        before = np.array(args[5].drawn)
        rows = decoded(*args)
        taken.append(int((np.asarray(rows.drawn) - before).max()))
        return rows

    monkeypatch.setattr(decode, "decode", counted)
    return taken


@pytest.mark.parametrize(
    ("questions", "limits", "most"),
    [
        ([6, 2, 2, 2, 2, 2], [16], 4 * 15),  # 32 answers, by 8 rows: no row is ever idle. Six rows for each adapter were 12 * 15 steps
        ([2], [16, 2, 2, 2], 15 + 2 * 4),  # four adapters at a time were 3 * 15: each time, three waited for the one
    ],
)
def test_adapters_with_more_to_do_do_not_hold_up_the_rest(world, crowd, steps, monkeypatch, questions, limits, most):
    """Some have more requests than most, or longer answers. All answers are those alone, and the programs are those of one pool."""
    model, decoder, _, _ = world
    stacked, asked, alone = crowd
    monkeypatch.setattr(engine, "LOOK", 4)
    chosen = [(a, i) for a in range(12) for i in range(questions[a % len(questions)])]
    limit = [limits[a % len(limits)] for a, _ in chosen]
    requests = [dataclasses.replace(asked[a][i], max_tokens=n) for (a, i), n in zip(chosen, limit, strict=True)]
    programs = (decode.insert, decode.prefill)
    before = [f._cache_size() for f in programs]
    found = generate(decoder, model.params, requests, stop=(), rows=8, lora=stacked)
    assert [g.tokens for g in found] == [alone[a][i][:n] for (a, i), n in zip(chosen, limit, strict=True)]
    assert sum(steps) <= most
    assert all(f._cache_size() - n <= 3 for f, n in zip(programs, before, strict=True))


def test_a_pool_holds_few_adapters_and_has_one_program(world, crowd, monkeypatch):
    """However many adapters take places in it one after another: those of all places are as large as at first, and lie where they lay."""
    model, decoder, _, _ = world
    stacked, asked, _ = crowd
    seen, decoded, exchanged, exchange = [], decode.decode, [], decode.exchange
    monkeypatch.setattr(decode, "exchange", lambda mesh, own, *args: exchanged.append(own) or exchange(mesh, own, *args))

    def watched(*args):
        seen.append([(x.shape, x.sharding) for x in jax.tree.leaves(args[4])])
        return decoded(*args)

    monkeypatch.setattr(decode, "decode", watched)
    before = decoded._cache_size(), exchange._cache_size()
    requests = [dataclasses.replace(r, max_tokens=1 + a) for a, own in enumerate(asked) for r in own[:2]]
    generate(decoder, model.params, requests, stop=(), rows=6, lora=stacked)
    assert all(one == seen[0] for one in seen) and seen[0][0][0][0] == 3
    assert len(exchanged) >= 3 and all(x.is_deleted() for own in exchanged for x in jax.tree.leaves(own)), "in place"
    assert (decoded._cache_size() - before[0], exchange._cache_size() - before[1]) == (1, 1)


def test_prompts_are_read_a_few_tokens_at_a_time(world, crowd, prefilled, monkeypatch):
    """Many small calls give what one large one gives, with adapters and without."""
    model, decoder, requests, alone = world
    stacked, asked, expected = crowd
    monkeypatch.setattr(queues, "READ", 64)
    monkeypatch.setattr(queues, "LEAST", 16)
    assert generate(decoder, model.params, requests, stop=STOP, rows=12) == alone
    assert len(prefilled) == len({r.prompt for r in requests})
    several = [r for own in asked for r in own[:3]]
    found = generate(decoder, model.params, several, stop=(), rows=36, lora=stacked)
    assert [g.tokens for g in found] == [tokens for own in expected for tokens in own[:3]]
    assert len(prefilled) == len({r.prompt for r in requests}) + len(several)
    assert max(np.prod(shape) for shape, _, _ in prefilled) <= 64


def test_a_look_fetches_what_has_ended_and_no_more(world, monkeypatch):
    """Rows have room for as many tokens as the longest limit, here 1024, and most looks find few rows at their end, or none."""
    model, decoder, requests, _ = world
    fetched, fetch = [], mesh_lib.fetch

    def watched(tree):
        fetched.append(sum(x.nbytes for x in jax.tree.leaves(tree)))
        return fetch(tree)

    monkeypatch.setattr(mesh_lib, "fetch", watched)
    rows = 2 * engine.FEW
    asked = [dataclasses.replace(requests[0], max_tokens=n) for n in [1024, 800, *range(40, 740, 50)]]
    found = generate(decoder, model.params, asked, stop=(), rows=rows)
    assert [len(g.tokens) for g in found] == [r.max_tokens for r in asked]
    looks = [n for n in fetched if n == rows * 5]
    assert len(looks) > 10 and max(fetched) <= engine.FEW * 1024 * 4
    assert len(looks) == 16 and len(fetched) - len(looks) <= 13, "nothing but who is done, where no one is"


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
        (
            dataclasses.replace(good, prompt=(3, model.spec.vocab_size)),
            None,
            f"request 1: tokens \\[{model.spec.vocab_size}\\] in its prompt",
        ),
        (dataclasses.replace(good, max_tokens=0), None, "request 1: max_tokens=0"),
        (dataclasses.replace(good, temperature=float("inf")), None, "request 1: temperature=inf"),
        (dataclasses.replace(good, temperature=-1.0), None, "request 1: temperature=-1.0"),
        (dataclasses.replace(good, top_p=0.0), None, "request 1: top_p=0.0"),
        (dataclasses.replace(good, adapter=1), None, "request 1: adapter 1 of 0"),
        (dataclasses.replace(good, adapter=3), adapters[0], "request 1: adapter 3 of 3"),
        (dataclasses.replace(good, adapter=-1), adapters[0], "request 1: adapter -1 of 3"),
    ]:
        with pytest.raises(ValueError, match=told):
            generate(decoder, model.params, [good, bad], stop=STOP, rows=ROWS, lora=lora_)
    with pytest.raises(ValueError, match="rows=0"):
        generate(decoder, model.params, [good], stop=STOP, rows=0)
    with pytest.raises(ValueError, match="stop ids \\[-1, 9999\\]"):
        generate(decoder, model.params, [good], stop=(-1, 3, 9999), rows=ROWS)
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
