import jax
import numpy as np
import pytest

from seal_jax.models.decoder import Decoder
from seal_jax.parallel import mesh
from seal_jax.sample import decode
from seal_jax.sample.logits import Sampling

ROWS, LENGTH, OUT, STOP = 4, 64, 16, tuple(range(0, 352, 25))  # as in test_engine.py, which then shares the compiled programs
MESH = mesh.single()


def greedy(shape):
    return Sampling(np.zeros((*shape, 2), np.uint32), np.zeros(shape, np.float32), np.ones(shape, np.float32), np.zeros(shape, np.int32))


def start(world, rows, row, source, limit=OUT):
    """Requests for the prompts `source` of the prefix, greedy, into the rows `row` of the one adapter there is."""
    prefix, idle = world[2], ROWS - len(row)
    row, source = np.asarray([[*row, *[ROWS] * idle]], np.int32), np.asarray([[*source, *[0] * idle]], np.int32)
    limits = np.asarray([[*np.broadcast_to(limit, ROWS - idle), *[1] * idle]], np.int32)
    return decode.insert(STOP, MESH, rows, prefix, decode.Starts(row, source, limits, np.zeros((1, ROWS), np.int32), greedy((1, ROWS))))


@pytest.fixture(scope="module")
def world(tiny):
    model = tiny("qwen2")
    decoder = Decoder(model.spec)
    tokens = np.random.default_rng(0).integers(0, model.spec.vocab_size, (1, 2, 16)).astype(np.int32)
    return decoder, model.params, decode.prefill(decoder, MESH, model.params, None, tokens, np.asarray([[16, 7]], np.int32))


def copy(rows):
    """On the host: `insert` and `decode` consume what they are given."""
    return jax.tree.map(np.array, rows)


def row_of(rows, r):
    """Everything that belongs to row r, but for cache entries past its position, which no one reads."""
    here = int(rows.position[0, r])
    cache = (rows.cache.k[0, :, r, :, :, :here], rows.cache.v[0, :, r, :, :here])
    return [*cache, *(np.asarray(x)[0, r] for x in jax.tree.leaves(rows._replace(cache=())))]


def run(world, rows, steps):
    decoder, params, _ = world
    return decode.decode(decoder, STOP, MESH, params, None, rows, np.int32(steps))


def test_a_start_touches_its_own_row_alone(world):
    rows = decode.empty(world[0], MESH, 1, ROWS, LENGTH, OUT)
    assert np.asarray(rows.done).all()
    rows = run(world, start(world, rows, [0, 2], [0, 1]), 3)
    before = copy(rows)
    after = copy(start(world, rows, [1], [1]))
    for r in (0, 2):
        assert all(np.array_equal(a, b) for a, b in zip(row_of(before, r), row_of(after, r), strict=True))
    assert (after.position[0, 1], after.drawn[0, 1], after.done[0, 1]) == (7, 1, False)
    assert after.last[0, 1] == after.out[0, 1, 0] == before.out[0, 2, 0] and not after.out[0, 1, 1:].any()


def test_a_row_that_is_done_stays_as_it_is(world):
    rows = start(world, decode.empty(world[0], MESH, 1, ROWS, LENGTH, OUT), [0, 1], [0, 1], [3, OUT])
    rows = run(world, rows, 2)
    assert rows.done.tolist() == [[True, False, True, True]] and rows.drawn.tolist() == [[3, 3, 0, 0]]
    before = copy(rows)
    after = copy(run(world, rows, 4))
    assert after.drawn.tolist() == [[3, 7, 0, 0]]
    assert all(np.array_equal(a, b) for a, b in zip(row_of(before, 0), row_of(after, 0), strict=True))
    assert np.array_equal(after.out[0, 0, :3], before.out[0, 0, :3]) and not after.out[0, 0, 3:].any()


def test_decoding_in_portions_is_decoding_at_once(world):
    """And a row that had another sequence before is as good as a new one."""
    fresh = decode.empty(world[0], MESH, 1, ROWS, LENGTH, OUT)
    whole = copy(run(world, start(world, fresh, [0, 1], [0, 1]), 7))
    used = run(world, start(world, decode.empty(world[0], MESH, 1, ROWS, LENGTH, OUT), [1, 0], [0, 0]), 15)
    rows = start(world, used, [0, 1], [0, 1])
    for steps in (1, 4, 0, 2):
        rows = run(world, rows, steps)
    rows = copy(rows)
    for r in (0, 1):
        for a, b in zip(row_of(whole, r), row_of(rows, r), strict=True):
            np.testing.assert_array_equal(a, b)


def test_decoding_ends_when_all_are_done(world):
    """However many steps it may take: the position shows how many it took."""
    rows = start(world, decode.empty(world[0], MESH, 1, ROWS, LENGTH, OUT), [0, 1], [0, 1], [2, 5])
    rows = run(world, rows, 1_000_000_000)
    assert np.asarray(rows.done).all() and rows.drawn.tolist() == [[2, 5, 0, 0]] and rows.position.tolist() == [[17, 11, 0, 0]]


def test_greedy_requests_do_not_pay_for_sampling(world):
    """What only sampled rows need is behind a condition; under `vmap` all of it would be computed."""
    decoder, _, prefix = world
    rows = jax.eval_shape(lambda: decode._rows(decoder, 1, ROWS, LENGTH, OUT))
    slots = np.zeros((1, ROWS), np.int32)
    starts = decode.Starts(slots, slots, slots, slots, greedy((1, ROWS)))
    assert " cond[" in str(jax.make_jaxpr(lambda *arguments: decode._insert(STOP, *arguments, None))(rows, prefix, starts))
