import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax.fit.loss import cross_entropy, grouped_cross_entropy

T, D, V = 23, 8, 41


def data(seed=0, scale=1.0):
    draw = np.random.default_rng(seed)
    hidden, head = draw.normal(0, scale, (T, D)), draw.normal(0, 1, (V, D))
    weights = (draw.random(T) < 0.7).astype(np.float32)
    return hidden.astype(np.float32), head.astype(np.float32), draw.integers(0, V, T).astype(np.int32), weights


@functools.partial(jax.jit, static_argnums=(4,))
def value_and_gradient(hidden, head, targets, weights, chunk):
    return jax.value_and_grad(lambda h: 3.0 * cross_entropy(h, head, targets, weights, chunk))(hidden)


def plain(hidden, head, targets, weights):
    """3 x the loss and its gradient in float64, from the definition."""
    hidden, head, weights = (np.asarray(x, np.float64) for x in (hidden, head, weights))
    logits = hidden @ head.T
    logits -= logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    slope = (np.exp(log_p) - np.eye(V)[targets]) * weights[:, None]
    return -3 * (log_p[np.arange(T), targets] * weights).sum(), 3 * slope @ head


@pytest.mark.parametrize("chunk", [1, 5, 16, T, 100])
def test_value_and_gradient_for_any_chunk(chunk):
    hidden, head, targets, weights = data()
    weights[3] = 0.25  # weights need not be 0 or 1
    value, gradient = value_and_gradient(hidden, head, targets, weights, chunk)
    expected, slope = plain(hidden, head, targets, weights)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, atol=2e-5)
    # The same as automatic differentiation of log_softmax.
    auto = jax.grad(lambda h: -3 * jnp.sum(jax.nn.log_softmax(h @ head.T)[np.arange(T), targets] * weights))(hidden)
    np.testing.assert_allclose(gradient, auto, atol=2e-5)


@pytest.mark.parametrize("chunk", [5, 100])
def test_padding_has_no_loss_and_no_gradient(chunk):
    hidden, head, targets, weights = data()
    value, gradient = value_and_gradient(hidden, head, targets, weights, chunk)
    unlabelled = weights == 0
    assert unlabelled.any() and not np.asarray(gradient)[unlabelled].any()
    assert np.asarray(gradient)[~unlabelled].all()
    # Whatever stands there, nothing changes, bit for bit.
    hidden[unlabelled], targets[unlabelled] = 50.0, 0
    again = value_and_gradient(hidden, head, targets, weights, chunk)
    jax.tree.map(np.testing.assert_array_equal, (value, gradient), again)


def test_no_labels_at_all_is_zero():
    hidden, head, targets, weights = data()
    value, gradient = value_and_gradient(hidden, head, targets, np.zeros_like(weights), 5)
    assert value == 0 and not np.asarray(gradient).any()


def test_large_logits_do_not_overflow():
    hidden, head, targets, weights = data(scale=300.0)
    value, gradient = value_and_gradient(hidden, head, targets, weights, 16)
    expected, slope = plain(hidden, head, targets, weights)
    assert np.abs(hidden @ head.T).max() > 1000  # exp of it is infinite
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, atol=1e-3)


def test_bfloat16_within_its_rounding():
    """Logits are accumulated in float32; what is left is the rounding of softmax and gradient to 8 bits (0.4 %)."""
    hidden, head, targets, weights = data()
    low, low_head = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)
    value, gradient = value_and_gradient(low, low_head, targets, weights, 16)
    expected, slope = plain(low.astype(np.float32), low_head.astype(np.float32), targets, weights)
    assert value.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient.astype(np.float32), slope, atol=0.02 * np.abs(slope).max())


def sizes(jaxpr):
    """The sizes of all intermediate arrays, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield from (x.aval.size for x in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner)


def test_the_whole_logits_are_never_in_memory():
    shapes = [(1000, 4), (500, 4), (1000,), (1000,)]
    args = [jax.ShapeDtypeStruct(s, t) for s, t in zip(shapes, [jnp.float32, jnp.float32, jnp.int32, jnp.float32], strict=True)]
    program = jax.make_jaxpr(jax.grad(lambda *a: cross_entropy(*a, 10)))(*args)
    largest = max(sizes(program.jaxpr))
    assert 10 * 500 <= largest < 2 * 10 * 500


# --- Groups, and a head that trains ----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(4, 5))
def grouped(hidden, head, targets, weights, chunk, train_head):
    """3 x the loss and its slopes with respect to hidden states and head."""
    loss = lambda h, e: 3.0 * grouped_cross_entropy(h, e, targets, weights, chunk, train_head)  # noqa: E731
    return jax.value_and_grad(loss, argnums=(0, 1) if train_head else (0,))(hidden, head)


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("chunk", [1, 5, T, 100])
def test_groups_of_positions_and_the_slope_of_the_head(chunk, train_head):
    """Three groups, of which one has no labels at all, under one head: the sum over all, and automatic differentiation's slopes."""
    parts = [data(seed, scale) for seed, scale in ((0, 1.0), (1, 1.0), (2, 50.0))]
    head = parts[0][1]
    hidden, targets, weights = (np.stack([p[i] for p in parts]) for i in (0, 2, 3))
    weights[1], weights[0, 3] = 0.0, 0.25
    value, slopes = grouped(hidden, head, targets, weights, chunk, train_head)
    found = [plain(h, head, t, w) for h, t, w in zip(hidden, targets, weights, strict=True)]
    np.testing.assert_allclose(value, sum(v for v, _ in found), rtol=1e-5)
    np.testing.assert_allclose(slopes[0], np.stack([s for _, s in found]), atol=1e-4)
    assert not np.asarray(slopes[0])[weights == 0].any()
    if train_head:
        auto = lambda e: -3 * jnp.sum(jax.nn.log_softmax(hidden @ e.T)[*np.indices(targets.shape), targets] * weights)  # noqa: E731
        np.testing.assert_allclose(slopes[1], jax.grad(auto)(head), rtol=1e-4, atol=1e-3)


def test_the_slope_of_a_bfloat16_head_is_added_up_in_float32():
    """Rounded once at the end, over chunks of one position each; added up in bfloat16 it would be off by several roundings."""
    hidden, head, targets, weights = data()
    low, low_head = jnp.asarray(hidden[None], jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)
    _, (_, slope) = grouped(low, low_head, targets[None], weights[None], 1, True)
    _, (_, exact) = grouped(low.astype(jnp.float32), low_head.astype(jnp.float32), targets[None], weights[None], T, True)
    assert slope.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(slope, np.float32), exact, atol=0.006 * np.abs(exact).max())
