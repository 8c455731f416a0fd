import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seal_jax.config import LENGTHS
from seal_jax.fit import plan

SOME = (16, 24, 64, 512, 2048)
edits = st.lists(st.lists(st.sampled_from(SOME), max_size=9), max_size=14)


@settings(deadline=None, max_examples=200)
@given(lengths=edits, slots=st.integers(1, 9), batch_size=st.integers(1, 3), tokens=st.sampled_from([16, 100, 512, 2048]))
def test_every_step_is_taken_once_and_in_order(lengths, slots, batch_size, tokens):
    resident, done, ended = {}, [0] * len(lengths), set()
    actions = list(plan.Schedule(lengths, slots, batch_size, tokens))
    for action in actions:
        assert len(set(action.edits)) == len(action.edits) == len(action.slots) == len(set(action.slots)) > 0
        if isinstance(action, plan.Admit):
            assert not set(action.slots) & set(resident.values()), "a slot holds one edit at a time"
            assert not set(action.edits) & (set(resident) | ended), "an edit is admitted once"
            assert all(0 <= slot < slots for slot in action.slots)
            resident.update(zip(action.edits, action.slots, strict=True))
        elif isinstance(action, plan.Retire):
            for edit, slot in zip(action.edits, action.slots, strict=True):
                assert resident.pop(edit) == slot and done[edit] == len(lengths[edit])
                ended.add(edit)
        else:
            assert len(action.edits) <= action.rows <= slots
            assert action.rows in plan.row_choices(action.length, batch_size, tokens, slots)
            assert action.length == max(lengths[e][n] for e, n in zip(action.edits, action.numbers, strict=True))
            for edit, slot, number in zip(action.edits, action.slots, action.numbers, strict=True):
                assert resident[edit] == slot and done[edit] == number
                done[edit] += 1
    assert ended == set(range(len(lengths))) and not resident
    assert list(plan.Schedule(lengths, slots, batch_size, tokens)) == actions  # deterministic


def test_a_free_slot_does_not_wait():
    """With more edits than slots, the next edit starts as soon as one has ended."""
    actions = list(plan.Schedule([[16]] * 2 + [[16] * 5] + [[16]] * 3, 3, 1, 512))
    assert [type(a).__name__ for a in actions[:5]] == ["Admit", "Step", "Retire", "Admit", "Step"]
    assert actions[2].slots == actions[3].slots == (0, 1)
    assert set(actions[4].edits) == {2, 3, 4}


def test_long_edits_are_not_left_for_last():
    """Two rows a step: one edit of twenty steps beside six of five takes the fifty steps in twenty-five."""
    actions = plan.Schedule([[16] * 5] * 6 + [[16] * 20], 7, 1, 32)
    assert sum(isinstance(action, plan.Step) for action in actions) == 25


@settings(deadline=None)
@given(count=st.integers(1, 12), epochs=st.integers(1, 4), batch_size=st.integers(1, 5), seed=st.integers(0, 99))
def test_every_sequence_once_an_epoch(count, epochs, batch_size, seed):
    orders = plan.epoch_orders(count, epochs, batch_size, np.random.default_rng(seed))
    each = -(-count // batch_size)
    assert len(orders) == epochs * each
    for epoch in range(epochs):
        steps = orders[epoch * each : (epoch + 1) * each]
        assert sorted(i for step in steps for i in step) == list(range(count))
        assert all(len(step) == batch_size for step in steps[:-1]) and 1 <= len(steps[-1]) <= batch_size
    assert orders == plan.epoch_orders(count, epochs, batch_size, np.random.default_rng(seed))
    assert plan.epoch_orders(count, epochs, batch_size, np.random.default_rng(seed), 3) == orders[:3]


def test_orders_differ_between_epochs_and_seeds():
    first, second = plan.epoch_orders(20, 2, 20, np.random.default_rng(0))
    (other,) = plan.epoch_orders(20, 1, 20, np.random.default_rng(1))
    assert first != second and first != other


def test_the_longest_step_that_is_asked_for():
    asked = [
        plan.longest_step(longest, (16, 64, 256), tokens, batch) for longest, tokens, batch in ((5, 4096, 1), (5, 128, 2), (300, 128, 2))
    ]
    assert asked == [256, 64, 512], "of short sequences that of a whole step, and no longer than there are lengths"


def test_padded_lengths():
    for length in range(1, 20000):
        padded = plan.padded_length(length)
        assert padded >= length
        if length <= LENGTHS[-1]:
            assert padded == min(x for x in LENGTHS if x >= length)
        else:
            assert padded < 2 * length and padded & (padded - 1) == 0
    assert [plan.padded_length(n, (10, 20)) for n in (1, 10, 11, 20, 21)] == [10, 10, 20, 20, 32]


@settings(deadline=None)
@given(length=st.sampled_from(LENGTHS), batch_size=st.integers(1, 16), tokens=st.integers(1, 8192), slots=st.integers(1, 128))
def test_few_row_counts_a_length(length, batch_size, tokens, slots):
    rows = plan.row_choices(length, batch_size, tokens, slots)
    assert 1 <= len(rows) <= 3 and list(rows) == sorted(set(rows)) and rows[0] >= 1 and rows[-1] <= slots
    # Full steps use the budget, and exceed it only where one row does already.
    assert rows[-1] * length * batch_size <= max(tokens, length * batch_size)
    assert rows[-1] == slots or (rows[-1] + 1) * length * batch_size > tokens


def workload(seed=0, count=750, epochs=10):
    """Sequence lengths like those of a round of the original: per edit 8.3 sequences in the mean, of log-normal length. Returns the real
    token counts of each edit's steps."""
    draw = np.random.default_rng(seed)
    steps = []
    for _ in range(count):
        lengths = np.clip(np.exp(draw.normal(np.log(29), 0.93, 1 + draw.poisson(7.3))), 4, 1024).astype(int)
        orders = plan.epoch_orders(len(lengths), epochs, 1, draw)
        steps.append([int(lengths[i]) for step in orders for i in step])
    return steps


@pytest.mark.parametrize(("slots", "tokens"), [(64, 512), (64, 2048), (150, 4096)])
def test_little_padding_on_a_workload_like_the_originals(slots, tokens):
    real = workload()
    every = np.concatenate(real)
    assert len(every) / len(real) / 10 == pytest.approx(8.3, abs=0.3) and every.mean() == pytest.approx(44, abs=3)
    assert np.quantile(every, [0.5, 0.9, 0.99]) == pytest.approx([29, 100, 255], rel=0.1)
    padded = [[plan.padded_length(x) for x in steps] for steps in real]
    waste, shapes = plan.Waste(), set()
    for action in plan.Schedule(padded, slots, 1, tokens):
        if isinstance(action, plan.Step):
            waste.slots += action.rows * action.length
            waste.tokens += sum(real[e][n] for e, n in zip(action.edits, action.numbers, strict=True))
            shapes.add((action.rows, action.length))
    assert waste.tokens == every.sum()
    assert waste.share <= 0.25
    assert len(shapes) <= 3 * len(set(np.concatenate(padded)))  # each is a compilation


def test_the_share_of_padding():
    assert plan.Waste().share == 0.0
    assert plan.Waste(slots=200, tokens=150).share == pytest.approx(0.25)


@pytest.mark.parametrize("shared", [2, 4])
def test_rows_that_several_devices_share_are_as_many_for_each(shared):
    for length, slots in itertools.product((16, 48, 512), (1, 3, 7, 64)):
        alone = plan.row_choices(length, 1, 512, slots)
        found = plan.row_choices(length, 1, 512, slots, lambda tokens: shared)
        assert all(rows % shared == 0 for rows in found) and 0 <= found[-1] - alone[-1] < shared
    actions = list(plan.Schedule([[16] * 3, [32] * 2, [16]], 2, 1, 64, shared=lambda tokens: shared))
    steps = [a for a in actions if isinstance(a, plan.Step)]
    assert sorted(e for s in steps for e in s.edits) == [0, 0, 0, 1, 1, 2] and all(s.rows % shared == 0 for s in steps)
    many = lambda tokens: shared if tokens >= 240 else 1  # noqa: E731
    assert plan.row_choices(48, 1, 512, 5, many) == (1, -(-5 // shared) * shared), "rows of few tokens are not dealt out"
