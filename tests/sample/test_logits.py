import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax import rng
from seal_jax.sample.logits import Sampling, keep, pick

torch = pytest.importorskip("torch", reason="torch computes the reference; pip install seal_jax[test]")

VOCAB = 500
kept = jax.jit(keep)
picked = jax.jit(pick)


def softmax(logits):
    e = np.exp(np.asarray(logits, np.float64) - np.max(logits, -1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def warped(logits, top_p, top_k):
    """Which tokens transformers' warpers leave, row by row, top k first as in its `generate`."""
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    out = []
    for row, p, k in zip(torch.tensor(logits), top_p, top_k, strict=True):
        scores = row[None]
        if k > 0:
            scores = TopKLogitsWarper(int(k))(None, scores)
        if p < 1:
            scores = TopPLogitsWarper(float(p))(None, scores)
        out.append(torch.isfinite(scores[0]).numpy())
    return np.stack(out)


def test_nucleus_and_top_k_equal_transformers():
    draw = np.random.default_rng(0)
    rows = 64
    logits = (draw.normal(0, 1, (rows, VOCAB)) * draw.uniform(0.1, 8, (rows, 1))).astype(np.float32)
    top_p = draw.choice([0.05, 0.3, 0.7, 0.9, 0.95, 0.999, 1.0], rows).astype(np.float32)
    top_k = draw.choice([0, 0, 1, 2, 7, 100, VOCAB, 2 * VOCAB], rows).astype(np.int32)
    ours = np.asarray(kept(jax.nn.softmax(logits), top_p, top_k))
    np.testing.assert_array_equal(ours, warped(logits, top_p, np.minimum(top_k, VOCAB)))
    assert ours.any(axis=1).all() and len(set(ours.sum(axis=1).tolist())) > 20


def test_ties_are_kept_together():
    """Where transformers keeps as many of equally likely tokens as fit, by their order, we keep all or none."""
    p = np.asarray([[0.3, 0.1, 0.1, 0.1, 0.2, 0.1, 0.1], [1 / 7] * 7], np.float32)
    for top_p, top_k, first in [
        (0.49, 0, [0, 4]),
        (0.55, 0, range(7)),
        (0.29, 0, [0]),
        (1.0, 2, [0, 4]),
        (1.0, 3, range(7)),
        (0.59, 2, [0]),  # of the two that are left, the first has 0.6 of the mass
        (0.61, 2, [0, 4]),
    ]:
        out = np.asarray(kept(p, np.full(2, top_p, np.float32), np.full(2, top_k, np.int32)))
        assert np.flatnonzero(out[0]).tolist() == list(first), (top_p, top_k)
        assert out[1].all()


def test_neighbouring_floats_are_told_apart():
    steps = np.arange(100, dtype=np.int32)
    p = (np.float32(0.01).view(np.int32) + steps).view(np.float32)[None]  # each one unit in the last place above the one before
    for count in (1, 37, 99):
        for top_p, top_k in ((1.0, count), ((count - 0.5) / 100, 0)):
            out = np.asarray(kept(p, np.full(1, top_p, np.float32), np.full(1, top_k, np.int32)))
            assert np.flatnonzero(out[0]).tolist() == list(range(100 - count, 100))


def test_extremes():
    tiny, huge = np.finfo(np.float32).smallest_normal, 1e4
    logits = np.zeros((5, VOCAB), np.float32)
    logits[0, 17] = huge  # one token has everything
    logits[1] = -np.arange(VOCAB)  # spans the whole range of float32, down to zero
    logits[2, :250] = -np.inf  # half is impossible
    logits[3] = huge
    logits[4, 3] = -huge
    probabilities = jax.nn.softmax(logits)
    for p in (tiny, 0.5, 1 - 2**-24):
        out = np.asarray(kept(probabilities, np.full(5, p, np.float32), np.zeros(5, np.int32)))
        assert out.any(axis=1).all()
        assert np.flatnonzero(out[0]).tolist() == [17]
        assert np.flatnonzero(out[1]).tolist() == list(range(out[1].sum()))
        assert not out[2, :250].any() and out[2, 250:].all()  # all that is possible is equally likely
        assert out[3].all()
        assert not out[4, 3] and out[4].sum() == VOCAB - 1
    assert np.asarray(kept(probabilities, np.ones(5, np.float32), np.zeros(5, np.int32))).all()
    # A key that gets its draws from the far tail never reaches what has no probability.
    keys = np.stack([rng.words(0, i) for i in range(5)])
    for step in range(20):
        token = picked(logits, Sampling(keys, np.full(5, 2, np.float32), np.ones(5, np.float32), np.zeros(5, np.int32)), np.full(5, step))
        assert token[0] == 17 and token[2] >= 250 and token[4] != 3


@pytest.mark.parametrize("mode", ["keys", "steps"])
@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.5, 1.0, 0), (1.0, 0.8, 0), (2.0, 0.9, 3)])
def test_draws_follow_the_distribution(mode, temperature, top_p, top_k):
    """Pearson's chi-square over 8 tokens, from many keys at one step and from many steps of one key."""
    count, logits = 4000, np.asarray([0.0, 1.0, 2.0, -1.0, 0.5, 1.5, -3.0, 0.2], np.float32)
    many = mode == "keys"
    keys = np.stack([rng.words(5, i if many else 0) for i in range(count)])
    steps = np.zeros(count, np.int32) if many else np.arange(count, dtype=np.int32)
    full = lambda x, t: np.full(count, x, t)  # noqa: E731
    sampling = Sampling(keys, full(temperature, np.float32), full(top_p, np.float32), full(top_k, np.int32))
    tokens = np.asarray(picked(np.tile(logits, (count, 1)), sampling, steps))
    p = softmax(logits / temperature)
    order = np.argsort(-p)
    if top_k:
        p[order[top_k:]] = 0
    p /= p.sum()
    p[order[np.searchsorted(np.cumsum(p[order]), top_p) + 1 :]] = 0
    p /= p.sum()
    seen = np.bincount(tokens, minlength=8)
    assert not seen[p == 0].any()
    expected = count * p[p > 0]
    assert ((seen[p > 0] - expected) ** 2 / expected).sum() < 35  # at 7 degrees of freedom, 1 in 90,000


def test_greedy_rows_take_the_first_of_the_largest():
    logits = np.asarray([[1, 3, 3, 0], [5, 1, 1, 5]], np.float32)
    zeros = Sampling(np.zeros((2, 2), np.uint32), np.zeros(2, np.float32), np.full(2, 0.1, np.float32), np.ones(2, np.int32))
    assert picked(logits, zeros, np.zeros(2, np.int32)).tolist() == [1, 0]


def test_any_temperature_cools_to_the_largest():
    """However small: what is not the largest is then out of reach."""
    logits = np.random.default_rng(0).normal(0, 5, (6, VOCAB)).astype(np.float32)
    logits[:, ::2] = -np.inf
    keys = np.stack([rng.words(0, i) for i in range(6)])
    cold = np.asarray([1e-3, 1e-9, 1e-20, 1e-30, 1e-37, 1e-45], np.float32)
    for top_p in (1.0, 0.9):
        sampling = Sampling(keys, cold, np.full(6, top_p, np.float32), np.zeros(6, np.int32))
        assert picked(logits, sampling, np.zeros(6, np.int32)).tolist() == np.argmax(logits, -1).tolist()


def test_a_row_of_which_nothing_can_be_drawn_takes_what_is_allowed():
    """Logits of a model that diverged, under a mask and without one; the row beside it draws as it would alone."""
    draw = np.random.default_rng(0)
    logits = draw.normal(0, 1, (4, VOCAB)).astype(np.float32)
    logits[:3] = np.nan
    logits[1, :37] = -np.inf
    logits[2] = -np.inf
    sampling = Sampling(
        np.stack([rng.words(0, i) for i in range(4)]), np.ones(4, np.float32), np.full(4, 0.9, np.float32), np.zeros(4, np.int32)
    )
    found = picked(logits, sampling, np.zeros(4, np.int32)).tolist()
    assert found[:3] == [0, 37, 0]
    assert found[3] == picked(logits[3:], jax.tree.map(lambda x: x[3:], sampling), np.zeros(1, np.int32))[0] != np.argmax(logits[3])


def test_a_draw_depends_on_its_key_and_step_alone():
    """Not on its row, its neighbours, their settings, or how many they are."""
    draw = np.random.default_rng(0)
    rows = 12
    logits = draw.normal(0, 2, (rows, VOCAB)).astype(np.float32)
    sampling = Sampling(
        np.stack([rng.words(1, i) for i in range(rows)]),
        draw.choice([0.0, 0.7, 1.0, 1.5], rows).astype(np.float32),
        draw.choice([0.5, 0.95, 1.0], rows).astype(np.float32),
        draw.choice([0, 3, 50], rows).astype(np.int32),
    )
    steps = draw.integers(0, 100, rows).astype(np.int32)
    tokens = np.asarray(picked(logits, sampling, steps))
    order = draw.permutation(rows)
    moved = picked(logits[order], jax.tree.map(lambda x: x[order], sampling), steps[order])
    np.testing.assert_array_equal(moved, tokens[order])
    for i in range(rows):
        alone = picked(logits[i : i + 1], jax.tree.map(lambda x, i=i: x[i : i + 1], sampling), steps[i : i + 1])
        assert alone[0] == tokens[i]
    hot = sampling.temperature > 0
    assert np.asarray(tokens != np.argmax(logits, -1))[hot].any() and not np.asarray(tokens != np.argmax(logits, -1))[~hot].any()
    for other in (sampling._replace(key=sampling.key + 1), None):
        changed = picked(logits, other or sampling, steps + (other is None))
        assert np.asarray(changed != tokens)[hot].any() and not np.asarray(changed != tokens)[~hot].any()


def test_a_row_without_a_nucleus_keeps_everything_beside_one_that_has_it():
    """Even tokens of a probability below the rounding of the mass."""
    p = np.full((2, VOCAB), 1e-10, np.float32)
    p[:, 0] = 1.0
    out = np.asarray(kept(p, np.asarray([1.0, 0.9], np.float32), np.zeros(2, np.int32)))
    assert out[0].all() and out[1].sum() == 1
    beside = np.asarray(kept(jnp.asarray(p), np.ones(2, np.float32), np.asarray([0, 2], np.int32)))
    assert beside[0].all()
