"""Edits on top of adapters that came before, and what keeps them from undoing those."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax.config import FitConfig, LoraConfig
from seal_jax.fit import step as step_lib
from seal_jax.fit.engine import FitEngine, FitJob, Tokens
from seal_jax.models import lora
from seal_jax.models.decoder import Decoder
from seal_jax.models.hf import read_folder

RANK, TARGETS, LENGTH = 4, ["q_proj", "v_proj", "down_proj"], 24
FIT = FitConfig(lora=LoraConfig(RANK, 8.0, TARGETS), learning_rate=3e-3, epochs=2)


@pytest.fixture(scope="module")
def model(tiny_model):
    return read_folder(tiny_model)


@pytest.fixture(scope="module")
def engine(model):
    return FitEngine(Decoder(model[0], jnp.float32), FIT.lora, slots=4, tokens_per_step=4 * LENGTH, lengths=(LENGTH,))


@pytest.fixture(scope="module")
def held(model):
    """Three adapters, of another rank and with other targets than those that are fitted."""
    shapes = jax.eval_shape(lambda: lora.init(jax.random.key(0), model[0], 6, ["q_proj", "o_proj", "up_proj"]))
    noise = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(noise.normal(0, 0.4, (3, *x.shape)), jnp.float32), shapes)


def jobs(spec, count, **changes):
    draw = np.random.default_rng(1)
    texts = [tuple(Tokens(tuple(draw.integers(0, spec.vocab_size, LENGTH + 1 - i - j).tolist())) for j in range(2)) for i in range(count)]
    return [FitJob(("held", i), texts[i], dataclasses.replace(FIT, **changes), held=i) for i in range(count)]


def leaves(tree, place):
    return [np.asarray(x[place]) for x in jax.tree.leaves(tree)]


def test_a_held_adapter_is_as_if_merged(model, engine, held):
    """Each edit on its own held adapter, all at once, equals the edit alone on weights into which that was merged."""
    spec, params, _ = model
    wanted = jobs(spec, 3)
    together = engine.fit(params, wanted, held=held)
    bare = engine.fit(params, [dataclasses.replace(job, held=0) for job in wanted])
    for i, job in enumerate(wanted):
        merged = lora.merge(params, jax.tree.map(lambda x, i=i: x[i], held), 1.0)
        alone = engine.fit(merged, [dataclasses.replace(job, held=0)])
        np.testing.assert_allclose(together.losses[i], alone.losses[0], rtol=1e-5)
        assert not np.allclose(together.losses[i], bare.losses[i], rtol=1e-3)
        for mine, his in zip(leaves(together.lora, together.places[i]), leaves(alone.lora, alone.places[0]), strict=True):
            gap = np.abs(mine - his) / np.abs(his).max()
            assert np.quantile(gap, 0.9) <= 1e-5 and gap.max() <= 1e-2  # see test_engine.assert_same


def test_a_job_names_a_held_adapter_that_is_there(model, engine, held):
    with pytest.raises(ValueError, match="held adapter 7 of 3"):
        engine.fit(model[1], [dataclasses.replace(jobs(model[0], 1)[0], held=7)], held=held)


def test_the_penalty_is_what_it_says(model, held):
    """Against the products written out, with a scale, and where the held adapter has other targets."""
    spec = model[0]
    shapes = jax.eval_shape(lambda: lora.init(jax.random.key(0), spec, RANK, TARGETS))
    noise = np.random.default_rng(3)
    tree = jax.tree.map(lambda x: jnp.asarray(noise.normal(0, 0.1, x.shape), jnp.float32), shapes)
    before = jax.tree.map(lambda x: x[1], held)
    hyper = jax.tree.map(lambda x: x[0], step_lib.empty_state(shapes, 1)).hyper._replace(anchor=0.3, orthogonal=0.7, scale=jnp.float32(2.0))
    distance = sum(
        np.sum(np.einsum("nir,nro->nio", part["a"], 2.0 * part["b"]) ** 2) for group in tree["layers"].values() for part in group.values()
    )
    q = [t["layers"]["attn"]["q_proj"]["a"] for t in (tree, before)]  # the only projection that both have
    overlap = np.sum(np.einsum("nir,nis->nrs", *q) ** 2)
    np.testing.assert_allclose(step_lib.penalty(hyper, tree, before), 0.5 * (0.3 * distance + 0.7 * overlap), rtol=1e-5)
    np.testing.assert_allclose(step_lib.penalty(hyper, tree, None), 0.5 * 0.3 * distance, rtol=1e-5)


def size(tree, place):
    """The L2 norm of what the adapter adds to the kernels."""
    parts = [part for group in tree["layers"].values() for part in group.values()]
    return np.sqrt(sum(np.sum(np.einsum("nir,nro->nio", part["a"][place], part["b"][place]) ** 2) for part in parts))


def overlap(tree, place, held, number):
    return np.sum(
        np.einsum("nir,nis->nrs", tree["layers"]["attn"]["q_proj"]["a"][place], held["layers"]["attn"]["q_proj"]["a"][number]) ** 2
    )


def test_penalties_hold_back_their_own_edits_alone(model, engine, held):
    """Of four edits on the same text one is anchored, one kept orthogonal, and two are free: those are as without the others."""
    spec, params, _ = model
    job = jobs(spec, 1)[0]
    change = [{}, {"anchor": 1.0}, {"orthogonal": 30.0}, {}]
    four = [dataclasses.replace(job, config=dataclasses.replace(FIT, epochs=6, **c), held=1) for c in change]
    fitted = engine.fit(params, four, held=held)
    free = engine.fit(params, [four[0]], held=held)
    for place in (fitted.places[0], fitted.places[3]):
        assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(leaves(fitted.lora, place), leaves(free.lora, free.places[0]), strict=True))
    sizes = [size(fitted.lora, p) for p in fitted.places]
    overlaps = [overlap(fitted.lora, p, held, 1) for p in fitted.places]
    assert sizes[1] < 0.8 * sizes[0] and overlaps[2] < 0.8 * overlaps[0]
    np.testing.assert_allclose(fitted.losses[1][0], free.losses[0][0], rtol=1e-5)  # the loss that is told is the text's alone
