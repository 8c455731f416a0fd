"""Generation under constraints, with random tiny models: they would never write JSON by themselves."""

import dataclasses
import json
import re
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax import rng
from seal_jax.models.decoder import Decoder, logits
from seal_jax.sample import decode
from seal_jax.sample.constraint import for_regex, for_schema
from seal_jax.sample.engine import Request, generate
from seal_jax.tasks.knowledge import directives

ROWS, LIMIT = 4, 128
EDIT = {
    "type": "object",
    "properties": {
        "augment": {"type": "object", "properties": {"turn": {"type": "boolean"}, "größe": {"type": "boolean"}}},
        "strategy": {"enum": ["all", "output", "東京"]},
        "rate": {"type": "number", "minimum": 1e-5, "maximum": 0.01},
        "epochs": {"type": "integer", "minimum": 1, "maximum": 20},
    },
}
WORD = r"[a-z]{1,4}(?: [é🙂]+)?\."


def is_edit(text):
    value = json.loads(text, parse_float=Decimal)
    assert list(value) == ["augment", "strategy", "rate", "epochs"] and list(value["augment"]) == ["turn", "größe"]
    assert all(isinstance(v, bool) for v in value["augment"].values()) and value["strategy"] in ("all", "output", "東京")
    assert Decimal("1e-5") <= value["rate"] <= Decimal("0.01") and type(value["epochs"]) is int and 1 <= value["epochs"] <= 20
    return True


@pytest.fixture(scope="module")
def world(tiny):
    """A model; requests under two constraints and none, in turn, that differ in everything else too; and what each gives alone."""
    model = tiny("qwen2")
    decoder, tokens = Decoder(model.spec), model.tokenizer.token_bytes
    constraints = [for_schema(EDIT, tokens), None, for_regex(WORD, tokens)]
    settings = [(1.0, 1.0, 0), (5.0, 1.0, 0), (0.0, 1.0, 0), (2.0, 0.9, 0), (3.0, 0.95, 40), (1.5, 1.0, 2)]
    draw = np.random.default_rng(0)
    asked = [tuple(draw.integers(4, 300, n).tolist()) for n in (16, 3, 9)]
    requests = [
        Request(asked[i % 5 % 3], LIMIT, *settings[i % 6], key=tuple(rng.words(0, i).tolist()), constraint=constraints[i % 7 % 3])
        for i in range(14)
    ]
    alone = [generate(decoder, model.params, [r], stop=model.tokenizer.eos_ids, rows=1)[0] for r in requests]
    return model, decoder, requests, alone


def test_every_sample_satisfies_its_constraint(world):
    model, _, requests, alone = world
    edits = 0
    for request, generated in zip(requests, alone, strict=True):
        text = model.tokenizer.decode(generated.tokens)
        if request.constraint is None or not generated.stopped:
            assert request.constraint is None or len(generated.tokens) == LIMIT
        elif request.constraint.regex == WORD:
            assert re.fullmatch(WORD, text)
        else:
            edits += is_edit(text)
    assert edits >= 4 and len({g.tokens for g in alone}) == len(alone)


def test_a_row_does_not_depend_on_its_neighbours(world):
    """Neither a constrained row, nor one without a constraint beside constrained ones, which is as it is in a call without any."""
    model, decoder, requests, alone = world
    stop = model.tokenizer.eos_ids
    assert generate(decoder, model.params, requests, stop=stop, rows=ROWS) == alone
    order = np.random.default_rng(1).permutation(len(requests))
    assert generate(decoder, model.params, [requests[i] for i in order], stop=stop, rows=ROWS) == [alone[i] for i in order]
    free = [i for i, r in enumerate(requests) if r.constraint is None]
    assert free and generate(decoder, model.params, [requests[i] for i in free], stop=stop, rows=ROWS) == [alone[i] for i in free]


def test_greedy_takes_the_likeliest_of_what_is_allowed(world):
    """Checked token by token against one pass over the whole sequence."""
    model, decoder, requests, _ = world
    stop = model.tokenizer.eos_ids
    for request in (r for r in requests[:6] if r.constraint is not None):
        constraint = request.constraint
        greedy = dataclasses.replace(request, temperature=0.0)
        generated = generate(decoder, model.params, [greedy], stop=stop, rows=1)[0]
        whole = jnp.asarray([[*request.prompt, *generated.tokens]])
        scores = np.asarray(logits(model.params, decoder.apply({"params": model.params}, whole)[0]))[0, len(request.prompt) - 1 :]
        state = 0
        for i, token in enumerate([*generated.tokens, *([stop[0]] if generated.stopped else [])]):
            allowed = constraint.following[state, constraint.class_of] >= 0
            allowed = np.flatnonzero(np.pad(allowed, (0, scores.shape[1] - len(allowed))))
            allowed = [*allowed.tolist(), *(stop if constraint.final[state] else ())]
            assert token in allowed and scores[i, token] >= scores[i, allowed].max() - 1e-4
            state = constraint.following[state, constraint.class_of[token]] if token not in stop else state


def test_many_hot_samples(world):
    model, decoder, requests, _ = world
    constraint = requests[0].constraint
    asked = [Request(requests[0].prompt, LIMIT, 1.0 + i % 5, key=tuple(rng.words(1, i).tolist()), constraint=constraint) for i in range(24)]
    done = generate(decoder, model.params, asked, stop=model.tokenizer.eos_ids, rows=8)
    assert all(is_edit(model.tokenizer.decode(g.tokens)) if g.stopped else len(g.tokens) == LIMIT for g in done)
    assert sum(g.stopped for g in done) > 12 and len({g.tokens for g in done}) == len(done)


def test_directives_open_every_sample_and_any_text_follows(world):
    model, decoder, requests, _ = world
    bounds = directives.Config([0.0005, 0.02], [2, 12])
    constraint = for_schema(directives.schema(bounds), model.tokenizer.token_bytes, then_text=True)
    asked = [Request(requests[0].prompt, LIMIT, 1.0 + i % 4, key=tuple(rng.words(2, i).tolist()), constraint=constraint) for i in range(16)]
    done = generate(decoder, model.params, asked, stop=model.tokenizer.eos_ids, rows=8)
    found = [directives.split(model.tokenizer.decode(g.tokens), bounds) for g in done]
    assert not [problem for problem in found if isinstance(problem, str)], "no number was cut short by the limit, nor out of bounds"
    assert all(None not in (chosen.learning_rate, chosen.epochs, chosen.loss) for chosen, _ in found)
    assert len({chosen for chosen, _ in found}) > 8 and {chosen.loss for chosen, _ in found} == {"all", "part"}
    texts = [text for _, text in found]
    assert not any("\0" in text for text in texts)
    assert sum(len(text) > 20 for text in texts) > 8 and any("\n" in text for text in texts) and not all(text.isascii() for text in texts)


def test_a_limit_cuts(world):
    model, decoder, requests, alone = world
    short = [dataclasses.replace(r, max_tokens=5) for r in requests if r.constraint is not None]
    done = generate(decoder, model.params, short, stop=model.tokenizer.eos_ids, rows=ROWS)
    for cut, whole in zip(done, (g for g, r in zip(alone, requests, strict=True) if r.constraint is not None), strict=True):
        assert cut.tokens == whole.tokens[:5] and cut.stopped == (len(whole.tokens) < 5)


def test_another_constraint_of_about_the_size_does_not_compile_again(world):
    model, decoder, requests, _ = world
    other = json.loads(json.dumps(EDIT))
    other["properties"]["epochs"]["maximum"] = 17
    constraints = {requests[0].constraint: for_schema(other, model.tokenizer.token_bytes)}
    generate(decoder, model.params, requests, stop=model.tokenizer.eos_ids, rows=ROWS)
    programs = (decode.prefill, decode.insert, decode.decode, decode.only)
    before = [f._cache_size() for f in programs]
    changed = [dataclasses.replace(r, constraint=constraints.get(r.constraint, r.constraint)) for r in requests]
    with jax.transfer_guard("disallow"):
        done = generate(decoder, model.params, changed, stop=model.tokenizer.eos_ids, rows=ROWS)
    assert [f._cache_size() for f in programs] == before and any(g.stopped for g in done)


def test_a_constraint_needs_a_stop_id(world):
    model, decoder, requests, _ = world
    with pytest.raises(ValueError, match="request 0: a constraint, and no stop ids"):
        generate(decoder, model.params, requests, stop=(), rows=ROWS)
