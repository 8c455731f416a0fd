import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax.fit.loss import cross_entropy

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
