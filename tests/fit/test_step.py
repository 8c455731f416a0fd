import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax.fit import step as step_lib
from seal_jax.fit.step import SCHEDULES, Batch, Hyper
from seal_jax.models import lora
from seal_jax.models.decoder import Decoder

torch = pytest.importorskip("torch", reason="torch computes the reference; pip install seal_jax[test]")

SLOTS, ROWS, LENGTH, RANK = 4, 3, 12, 4
PEFT_NAMES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def hyper(count, **changes):
    """Hyperparameters of `count` edits; a change is a number for all or one for each."""
    defaults = {"learning_rate": 1e-2, "schedule": 1, "warmup_steps": 0, "total_steps": 10, "weight_decay": 0.0, "max_grad_norm": 1.0}
    defaults |= {"epoch_steps": 5, "stop_loss": 0.0, "stop_gain": 0.0, "patience": 1, "anchor": 0.0, "orthogonal": 0.0}
    types = dict.fromkeys(("schedule", "warmup_steps", "total_steps", "epoch_steps", "patience"), np.int32)
    values = {**defaults, "scale": 2.0, **changes}
    return Hyper(**{name: np.broadcast_to(np.asarray(v, types.get(name, np.float32)), count) for name, v in values.items()})


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("warmup", "total"), [(0, 30), (11, 30), (5, 6), (0, 1)])
def test_schedules_equal_transformers(name, warmup, total):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    scheduler = get_scheduler(PEFT_NAMES[name], optimizer, num_warmup_steps=warmup, num_training_steps=total)
    theirs = []
    for _ in range(total):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    one = jax.tree.map(lambda x: x[0], hyper(1, learning_rate=3e-4, schedule=SCHEDULES.index(name), warmup_steps=warmup, total_steps=total))
    ours = jax.vmap(lambda step: step_lib.learning_rate(one, step))(jnp.arange(total))
    np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-10)


@pytest.mark.parametrize(("decay", "clip"), [(0.0, 1.0), (0.1, 1.0), (0.1, 0.0), (0.0, 1e3)])
def test_clipping_and_adamw_equal_torch(monkeypatch, decay, clip):
    """Six steps on gradients that are given: those of a loss that is linear in the adapter."""
    draw = np.random.default_rng(0)
    tree = {"a": draw.normal(0, 1, (5, 3)).astype(np.float32), "b": draw.normal(0, 1, (3, 4)).astype(np.float32)}
    slopes = [jax.tree.map(lambda x, s=s: draw.normal(0, s, x.shape).astype(np.float32), tree) for s in (1, 9, 1e-3, 30, 0.1, 1e-4)]
    labels = 7

    def linear_loss(decoder, chunk, adapter, scale, params, inputs, targets, weights):
        return sum(jnp.sum(x * s) for x, s in zip(jax.tree.leaves(adapter), jax.tree.leaves(params), strict=True)) * jnp.sum(weights)

    monkeypatch.setattr(step_lib, "adapter_loss", linear_loss)
    zeros = np.zeros((1, labels), np.int32)
    batch = Batch(np.int32(0), zeros, zeros, np.ones((1, labels), np.float32))
    one = jax.tree.map(lambda x: x[0], hyper(1, learning_rate=0.05, total_steps=6, weight_decay=decay, max_grad_norm=clip))
    shapes = jax.eval_shape(lambda: tree)
    edit = jax.tree.map(lambda x: x[0], step_lib.empty_state(shapes, 1))._replace(lora=tree, hyper=one)

    @jax.jit
    def update(slope, edit):
        loss, found = step_lib.gradient(None, 0, slope, edit.hyper, edit.lora, batch)
        lora, moments = step_lib.descend(edit.hyper, edit.lora, edit.moments, found)
        return edit._replace(lora=lora, moments=moments), loss

    theirs = [torch.nn.Parameter(torch.tensor(x)) for x in jax.tree.leaves(tree)]
    optimizer = torch.optim.AdamW(theirs, lr=0.05, weight_decay=decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 6)
    for slope in slopes:
        edit, loss = update(slope, edit)
        expected = sum((p * torch.tensor(s)).sum() for p, s in zip(theirs, jax.tree.leaves(slope), strict=True))
        np.testing.assert_allclose(loss, expected.item(), rtol=1e-5, atol=1e-6)
        optimizer.zero_grad()
        expected.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs, clip or float("inf"))
        assert norm > clip > 0 or norm < 1000  # some steps are clipped at 1, none at 1000
        optimizer.step()
        scheduler.step()
        for mine, his in zip(jax.tree.leaves(edit.lora), theirs, strict=True):
            np.testing.assert_allclose(mine, his.detach(), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def world(tiny):
    """`step` of a tiny model as one compiled program, and a filled state of SLOTS edits, whose slot 3 has 2 of RANK columns in use."""
    model = tiny("qwen2")
    decoder, targets = Decoder(model.spec), ["q_proj", "v_proj", "down_proj"]
    program = jax.jit(functools.partial(step_lib.step, decoder, 16, model.params))
    keys, active = jax.random.split(jax.random.key(0), SLOTS), jnp.asarray([4, 4, 4, 2])
    adapters = jax.vmap(lambda key, active: lora.init(key, model.spec, RANK, targets, active))(keys, active)
    noise, used = np.random.default_rng(0), (np.arange(RANK) < active[:, None])[:, None, :, None]
    # As in the middle of a fit: with b at zero, the first step would leave a as it is.
    adapters = jax.tree.map_with_path(lambda path, x: noise.normal(0, 0.1, x.shape) * used if path[-1].key == "b" else x, adapters)
    adapters = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), adapters)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), adapters)
    rates = hyper(SLOTS, learning_rate=[1e-2, 1e-3, 1e-4, 1e-2], weight_decay=[0, 0.1, 0, 0.1])
    state = jax.jit(step_lib.admit)(step_lib.empty_state(shapes, SLOTS), np.arange(SLOTS, dtype=np.int32), adapters, rates)
    return program, state, model.spec.vocab_size


def batch(slots, vocab, seed=0, length=LENGTH):
    """Random sequences of different lengths in LENGTH token slots; rows past those of `slots` are idle."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(0, vocab, (ROWS, LENGTH + 1)).astype(np.int32)
    weights = np.zeros((ROWS, LENGTH), np.float32)
    for row in range(len(slots)):
        weights[row, : length - row] = 1.0
    shape = (ROWS, 1, LENGTH)
    padded = np.asarray([*slots, *[1 << 30] * (ROWS - len(slots))], np.int32)
    return Batch(padded, ids[:, :-1].reshape(shape), ids[:, 1:].reshape(shape), weights.reshape(shape))


def leaves(state, slot):
    return [np.asarray(x)[slot] for x in jax.tree.leaves(state)]


def equal(one, other):
    return [np.array_equal(a, b) for a, b in zip(one, other, strict=True)]


def test_other_slots_never_change(world):
    """Leaf for leaf, bit for bit: adapter, moments, count and hyperparameters of those that are not in the step."""
    program, state, vocab = world
    after, (losses, _) = program(state, batch([2, 0], vocab))
    assert losses.shape == (ROWS,) and losses[2] == 0 and np.all(np.asarray(losses[:2]) > 1)
    for slot in (1, 3):
        assert all(equal(leaves(state, slot), leaves(after, slot)))
    for slot in (0, 2):
        assert not any(equal(leaves((state.lora, state.moments), slot), leaves((after.lora, after.moments), slot)))
        assert all(equal(leaves(state.hyper, slot), leaves(after.hyper, slot)))
    # All rows idle: nothing at all.
    same, (losses, _) = program(after, batch([], vocab))
    jax.tree.map(np.testing.assert_array_equal, same, after)
    assert not np.asarray(losses).any()


def test_optimisers_step_alike_together_and_in_place(world):
    """In place is for accelerators (`step.step`); it must be the same thing. Slot 3 has ended, a row is idle, slot 1 has no row."""
    _, state, _ = world
    slots, ended = np.asarray([2, 3, 1 << 30, 0], np.int32), np.asarray([False, True, False, False])
    weights = state.lora, jax.tree.map(lambda x: 0.1 * x, state.lora), jax.tree.map(jnp.square, state.lora)
    hyper, count, slope = step_lib.taken((state.hyper, state.moments.count + 3, jax.tree.map(jnp.cos, state.lora)), slots)
    rows = slots, ended, hyper, count, slope
    together = jax.jit(step_lib.descend_together)(weights, rows)
    in_place = jax.jit(step_lib.descend_in_place)(weights, rows)
    for slot in range(SLOTS):
        same = equal(leaves(weights, slot), leaves(in_place, slot))
        assert all(same) if slot in (1, 3) else not any(same)
        for a, b in zip(leaves(in_place, slot), leaves(together, slot), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


def test_masked_columns_never_change(world):
    """With weight decay on, over several steps: parameters and moments of unused columns stay exactly zero."""
    program, state, vocab = world
    for seed in range(4):
        state, _ = program(state, batch([3, 1], vocab, seed))
    assert state.moments.count.tolist() == [0, 4, 0, 4]
    for path, leaf in jax.tree_util.tree_leaves_with_path((state.lora, state.moments.mu, state.moments.nu)):
        columns = np.moveaxis(np.asarray(leaf), -1 if path[-1].key == "a" else -2, 0)  # [rank, slot, ...]
        assert not columns[2:, 3].any()
        assert columns[:2, 3].any() and columns[2:, 1].any()


def test_a_slot_does_not_see_its_neighbours_or_its_row(world):
    """The same edit, alone, beside others and in another row, with the same data: the same result."""
    program, state, vocab = world
    data = batch([1, 0, 2], vocab)
    together, (losses, _) = program(state, data)
    alone, (loss, _) = program(state, data._replace(slots=np.asarray([1, 1 << 30, 1 << 30], np.int32)))
    moved, (other, _) = program(state, jax.tree.map(lambda x: np.roll(x, 1, axis=0), data))
    assert losses[0] == pytest.approx(float(loss[0]), rel=1e-6) and losses[0] == pytest.approx(float(other[1]), rel=1e-6)
    for result in (alone, moved):
        for a, b in zip(leaves(together, 1), leaves(result, 1), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(a).max())


def test_a_broken_neighbour_stays_alone(world):
    """An edit whose loss is not a number takes nobody with it."""
    program, state, vocab = world
    data = batch([1, 0], vocab)
    clean, _ = program(state, data)
    broken = state._replace(hyper=state.hyper._replace(scale=state.hyper.scale.at[0].set(np.nan)))
    after, (losses, _) = program(broken, data)
    assert np.isnan(losses[0]) == False and np.isnan(losses[1])  # noqa: E712
    assert all(equal(leaves(clean, 1), leaves(after, 1)))
    assert all(equal(leaves(state, 2), leaves(after, 2)))


def test_padding_never_enters(world):
    """Token slots without a label change neither losses nor gradients, whatever stands in them; a prompt is read but carries no loss."""
    program, state, vocab = world
    data = batch([0, 1, 2], vocab, length=8)
    clean, (losses, _) = program(state, data)
    junk = np.random.default_rng(9).integers(0, vocab, data.inputs.shape).astype(np.int32)
    pad = data.weights == 0
    dirty, (same, _) = program(state, data._replace(inputs=np.where(pad, junk, data.inputs), targets=np.where(pad, junk, data.targets)))
    np.testing.assert_array_equal(losses, same)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    # The loss is a mean over labels: those of the first three tokens and those of the rest make up the whole.
    first = data.weights * (np.arange(LENGTH) < 3)
    _, (start, _) = program(state, data._replace(weights=first))
    _, (rest, _) = program(state, data._replace(weights=data.weights - first))
    counts = data.weights.sum(axis=(1, 2))
    np.testing.assert_allclose((3 * start + (counts - 3) * rest) / counts, losses, rtol=1e-6)
    # What carries no loss is read all the same.
    changed = data.inputs.copy()
    changed[..., 0] = (changed[..., 0] + 1) % vocab
    _, (other, _) = program(state, data._replace(inputs=changed, weights=data.weights - first))
    assert np.all(np.asarray(rest) != np.asarray(other))


def test_admission_resets_a_slot_and_only_that(world):
    program, state, vocab = world
    trained, _ = program(state, batch([0, 1, 2], vocab))
    fresh = jax.tree.map(lambda x: x[:2] + 1, state.lora)
    after = jax.jit(step_lib.admit)(trained, np.asarray([1, 1 << 30], np.int32), fresh, hyper(2, learning_rate=[5.0, 6.0]))
    for slot in (0, 2, 3):
        assert all(equal(leaves(trained, slot), leaves(after, slot)))
    assert not any(x.any() for x in leaves(after.moments, 1))
    assert all(equal(leaves(after.lora, 1), leaves(fresh, 0)))
    assert after.hyper.learning_rate[1] == 5.0
