import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax.fit import likelihood
from seal_jax.models import lora
from seal_jax.models.decoder import Decoder, logits
from seal_jax.models.hf import read_folder


@pytest.fixture(scope="module")
def world(tiny_model):
    spec, params, _ = read_folder(tiny_model)
    shapes = jax.eval_shape(lambda: lora.init(jax.random.key(0), spec, 3, ["q_proj", "down_proj"]))
    noise = np.random.default_rng(0)
    adapters = jax.tree.map(lambda x: jnp.asarray(noise.normal(0, 0.3, (likelihood.ADAPTERS + 2, *x.shape)), jnp.float32), shapes)
    texts = [noise.integers(0, spec.vocab_size, n).tolist() for n in (300, 2, 41, 1, 120)]  # in more than one pass
    return Decoder(spec), params, adapters, texts


def log_probabilities(decoder, params, adapter, ids):
    hidden, _ = decoder.apply({"params": params, "lora": adapter}, jnp.asarray(ids)[None])
    return np.asarray(jax.nn.log_softmax(logits(params, hidden)[0]), np.float64)


def test_nll_and_divergence_are_what_they_say(world):
    """For each of more adapters than go at once: against the model applied to one text after another."""
    decoder, params, adapters, texts = world
    packed = likelihood.texts_of(texts)
    assert packed.inputs.shape[0] > 1 and packed.labels == sum(len(t) - 1 for t in texts)
    nll = likelihood.mean_nll(decoder, params, adapters, packed)
    before = jax.tree.map(lambda x: x[::-1], adapters)
    kl = likelihood.divergence(decoder, params, before, adapters, packed)
    assert nll.shape == kl.shape == (likelihood.ADAPTERS + 2,)
    for place in (0, likelihood.ADAPTERS + 1):
        pair = [jax.tree.map(lambda x, p=p: x[p], adapters) for p in (len(nll) - 1 - place, place)]
        loss, distance = 0.0, 0.0
        for ids in texts:
            old, new = (log_probabilities(decoder, params, adapter, ids) for adapter in pair)
            loss -= sum(new[i, ids[i + 1]] for i in range(len(ids) - 1))
            distance += np.sum((np.exp(old) * (old - new))[:-1])
        np.testing.assert_allclose(nll[place], loss / packed.labels, rtol=1e-5)
        np.testing.assert_allclose(kl[place], distance / packed.labels, rtol=1e-4)


def test_the_bare_model_is_that_with_adapters_of_zero(world):
    decoder, params, adapters, texts = world
    packed = likelihood.texts_of(texts)
    zero = jax.tree.map(lambda x: jnp.zeros_like(x[:1]), adapters)
    bare = likelihood.mean_nll(decoder, params, None, packed)
    np.testing.assert_allclose(bare, likelihood.mean_nll(decoder, params, zero, packed), rtol=1e-6)
    assert likelihood.divergence(decoder, params, zero, zero, packed) == pytest.approx(0.0, abs=1e-7)


def test_texts_without_a_token_to_predict_are_refused():
    with pytest.raises(ValueError, match="no text"):
        likelihood.texts_of([[3], []])
