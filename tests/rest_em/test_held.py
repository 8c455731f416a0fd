import types

import jax
import numpy as np
import pytest

from seal_jax.config import FitConfig, LoraConfig
from seal_jax.models.decoder import Decoder
from seal_jax.models.hf import read_folder
from seal_jax.parallel import mesh
from seal_jax.rest_em.held import Held


@pytest.fixture(scope="module")
def policy(tiny_model):
    """As much of one as adapters need to be held."""
    settings = types.SimpleNamespace(fit=FitConfig(lora=LoraConfig(2, 4.0, ["q_proj", "up_proj"])))
    return types.SimpleNamespace(config=settings, decoder=Decoder(read_folder(tiny_model)[0]), mesh=mesh.single())


def edit(held, seed):
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: draw.normal(size=x.shape).astype(np.float32), held.part(0))


def product(adapter, lane):
    part = adapter["layers"]["attn"]["q_proj"]
    return np.einsum("nir,nro->nio", part["a"][lane], part["b"][lane])


def test_edits_add_up_each_at_its_scale(policy):
    held = Held(policy, 3, 2)
    first, second = edit(held, 0), edit(held, 1)
    held.keep(0, first, [1.0, 0.5, 0.0])
    held.keep(1, second, [0.25, 0.0, 1.0])
    now = held.of([0, 1, 2])
    for lane, (a, b) in enumerate([(1.0, 0.25), (0.5, 0.0), (0.0, 1.0)]):
        np.testing.assert_allclose(product(now, lane), a * product(first, lane) + b * product(second, lane), rtol=1e-5, atol=1e-6)


def test_a_trial_leaves_what_is_held_as_it_is(policy):
    held = Held(policy, 2, 2)
    held.keep(0, edit(held, 0), [1.0, 1.0])
    before, new = held.of([0, 1]), edit(held, 1)
    tried = held.with_edit([1], 1, new, [1.0, 0.5])
    np.testing.assert_allclose(product(tried, 0), product(before, 1) + 0.5 * product(new, 1), rtol=1e-5, atol=1e-6)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(held.of([0, 1])), strict=True))


def test_a_refused_edit_leaves_its_lane_as_it_was_even_if_it_diverged(policy):
    held = Held(policy, 2, 1)
    new = jax.tree.map(lambda x: np.full_like(x, np.nan), edit(held, 0))
    held.keep(0, new, [0.0, 0.0])
    assert not any(np.any(x) for x in jax.tree.leaves(held.of([0, 1])))


def test_what_is_saved_of_one_lane_is_read_for_all_that_are_like_it(policy):
    """As a memory is, whose lanes are the shards of the mesh: it may be read on another number of them."""
    held = Held(policy, 2, 1)
    new = jax.tree.map(lambda x: np.repeat(x[:1], 2, axis=0), edit(held, 0))
    held.keep(0, new, [1.0, 1.0])
    other = Held(policy, 3, 1)
    other.load(held.saved(0, 1), 0)
    for lane in range(3):
        np.testing.assert_array_equal(product(other.of([lane]), 0), product(new, 0))
