import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax.models import lora
from seal_jax.models.decoder import Decoder, logits

ALL = list(lora.GROUPS)


def arrays(tree):
    return {"/".join(k.key for k in path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@functools.cache
def draw(spec, rank, targets, active=None, seed=0):
    return arrays(jax.jit(lambda: lora.init(jax.random.key(seed), spec, rank, targets, active))())


def filled(spec, rank, targets, seed=0):
    """An adapter with no zeros in it."""
    shapes = jax.eval_shape(lambda: lora.init(jax.random.key(0), spec, rank, targets))
    noise = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(noise.normal(0, 0.3, x.shape), jnp.float32), shapes)


def test_a_is_uniform_as_in_peft_and_b_zero(tiny):
    spec = tiny("qwen3").spec  # its q_proj is wider than the hidden size
    tree = draw(spec, 64, tuple(ALL))
    assert len(tree) == 14
    for target in ALL:
        inputs, outputs = lora.dimensions(spec, target)
        a, b = (tree[f"layers/{lora.GROUPS[target]}/{target}/{part}"] for part in "ab")
        assert a.shape == (spec.num_layers, inputs, 64) and b.shape == (spec.num_layers, 64, outputs)
        assert a.dtype == b.dtype == np.float32 and not b.any()
        x = np.sort(a.ravel()) * np.sqrt(inputs)  # uniform in [-1, 1): compare the empirical distribution (Kolmogorov-Smirnov, p < 1e-6)
        assert np.abs((x + 1) / 2 - (np.arange(x.size) + 0.5) / x.size).max() < 2.7 / np.sqrt(x.size)
        assert np.abs(x).max() <= 1.0
        assert np.unique(a).size > 0.99 * a.size  # nothing is repeated over layers or columns


def test_peft_draws_from_the_same_range(tiny):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    torch.manual_seed(0)
    model = tiny("qwen3")
    theirs = peft.get_peft_model(model.load(), peft.LoraConfig(r=64, target_modules=ALL))
    ours = draw(model.spec, 64, tuple(ALL))
    for target in ALL:
        a = np.concatenate([w.detach().numpy().ravel() for n, w in theirs.named_parameters() if f"{target}.lora_A" in n])
        mine = ours[f"layers/{lora.GROUPS[target]}/{target}/a"].ravel()
        np.testing.assert_allclose(np.quantile(mine, [0, 0.25, 0.75, 1]), np.quantile(a, [0, 0.25, 0.75, 1]), rtol=0.05)
        assert not any(w.any() for n, w in theirs.named_parameters() if f"{target}.lora_B" in n)


def test_a_column_depends_on_key_target_and_number_alone(tiny):
    spec = tiny("smollm2").spec
    tree = draw(spec, 4, ("q_proj", "v_proj"))
    for other in (draw(spec, 4, ("v_proj", "q_proj")), draw(spec, 6, ("q_proj", "v_proj")), draw(spec, 4, tuple(ALL))):
        for name in tree:
            if name.endswith("/a"):
                np.testing.assert_array_equal(tree[name], other[name][:, :, :4])
    q, v = tree["layers/attn/q_proj/a"], tree["layers/attn/v_proj/a"]
    assert not np.isin(q, v).any()
    assert not np.isin(q, draw(spec, 4, ("q_proj", "v_proj"), seed=1)["layers/attn/q_proj/a"]).any()


def test_columns_beyond_the_rank_are_zero(tiny):
    spec = tiny("smollm2").spec
    whole = draw(spec, 4, ("q_proj", "v_proj"))
    make = jax.jit(lambda active: lora.init(jax.random.key(0), spec, 4, ["q_proj", "v_proj"], active))
    for active in (1, 3, 4):  # traced: one program for all ranks
        for name, leaf in arrays(make(active)).items():
            if name.endswith("/a"):
                np.testing.assert_array_equal(leaf[..., :active], whole[name][..., :active])
                assert not leaf[..., active:].any()
    assert make._cache_size() == 1


def test_scaled_multiplies_b_once(tiny):
    tree = filled(tiny("smollm2").spec, 2, ["q_proj", "up_proj"])
    for name, leaf in arrays(lora.scaled(tree, 2.5)).items():
        np.testing.assert_array_equal(leaf, arrays(tree)[name] * np.float32(2.5 if name.endswith("/b") else 1))


@pytest.mark.parametrize(("family", "targets"), [("qwen3", ALL), ("qwen2", ["q_proj", "v_proj"]), ("llama2", ["down_proj"])])
def test_merged_equals_applied(tiny, family, targets):
    model = tiny(family)
    tree = filled(model.spec, 3, targets)
    tokens = np.random.default_rng(0).integers(0, model.spec.vocab_size, (2, 10)).astype(np.int32)

    @jax.jit
    def forward(variables):
        return logits(variables["params"], Decoder(model.spec).apply(variables, tokens)[0])

    plain = forward({"params": model.params})
    applied = forward({"params": model.params, "lora": lora.scaled(tree, 2.0)})
    merged = forward({"params": lora.merge(model.params, tree, 2.0)})
    assert np.abs(applied - plain).max() > 0.1
    np.testing.assert_allclose(applied, merged, atol=5e-5)


def test_merge_touches_the_targets_alone_and_rounds_once(tiny):
    model = tiny("qwen2")
    tree = filled(model.spec, 3, ["q_proj"])
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    before, after, delta = arrays(low), arrays(lora.merge(low, tree, 0.5)), arrays(tree)
    assert before.keys() == after.keys()
    for name, leaf in before.items():
        assert after[name].dtype == leaf.dtype
        if name == "layers/attn/q_proj/kernel":
            exact = leaf.astype(np.float64) + 0.5 * (delta["layers/attn/q_proj/a"].astype(np.float64) @ delta["layers/attn/q_proj/b"])
            assert np.mean(after[name] == exact.astype(leaf.dtype)) > 0.99  # but where float32 falls on the other side of a half
            np.testing.assert_allclose(after[name].astype(np.float64), exact, rtol=2**-8)
        else:
            np.testing.assert_array_equal(after[name], leaf)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ALL, ["o_proj", "o_proj"]])
def test_count_is_the_size_of_the_tree(tiny, targets):
    spec = tiny("qwen3").spec
    shapes = jax.eval_shape(lambda: lora.init(jax.random.key(0), spec, 5, targets))
    assert lora.count(spec, 5, targets) == sum(x.size for x in jax.tree.leaves(shapes))
