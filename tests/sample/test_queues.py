import numpy as np
import pytest

from seal_jax.fit.plan import padded_length
from seal_jax.sample import queues
from seal_jax.sample.queues import Queues, layout, readings

SHARE = 0.01  # an adapter, of the model


def numbered(counts, shards=1):
    """The requests of adapters that have so many, numbered from 0, dealt out over shards."""
    ends = np.cumsum(counts).tolist()
    found = [{} for _ in range(shards)]
    for a, (n, end) in enumerate(zip(counts, ends, strict=True)):
        if n:
            found[a * shards // len(counts)][a] = list(range(end - n, end))
    return found


@pytest.mark.parametrize(
    ("counts", "rows", "expected"),
    [
        ([5] * 150, 160, (32, 5)),
        ([16, *[5] * 9] * 15, 160, (26, 6)),  # not 10 places of 16 rows, most of which would be idle
        ([64, *[1] * 149], 160, (160, 1)),
        ([3], 4, (1, 3)),
        ([70], 32, (1, 32)),
        ([23], 64, (1, 24)),  # of the bare model: of one program with 21 to 24
        ([37], 38, (1, 38)),
        ([23, 7], 64, (2, 23)),
        ([12] * 3, 36, (3, 12)),
        ([5] * 3, 64, (4, 5)),  # three places, rounded up
    ],
)
def test_rows_of_a_place(counts, rows, expected):
    assert layout(numbered(counts), rows, SHARE) == expected


def test_rows_of_a_place_are_one_of_few_numbers():
    """However the requests are spread: below the largest number that an adapter can use, four numbers for each doubling at most."""
    draw, found = np.random.default_rng(0), set()
    for _ in range(300):
        counts = (1 + draw.geometric(1 / draw.integers(2, 12), 40)).tolist()
        places, each = layout(numbered(counts), 64, SHARE)
        assert sum(counts) // len(counts) <= each <= max(counts) and places * each <= 64
        found |= {each} - {max(counts)}
    assert found <= {1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40}


@pytest.mark.parametrize("shards", [1, 2])
def test_everyone_is_served_by_a_place_of_its_shard(shards):
    """Once, in the order of its adapter's queue, in a free row of a place that holds its adapter; no place is idle meanwhile."""
    draw = np.random.default_rng(0)
    counts = draw.integers(0, 9, 24).tolist()
    adapter_of = np.repeat(np.arange(24), counts)
    line = Queues(numbered(counts, shards), places=3, each=2)
    seen = []
    while True:
        before = list(line.adapter)
        busy = {place for place, _ in line.owner}
        taken = line.admit()
        for place, adapter in taken:
            assert place not in busy and line.adapter[place] == adapter and adapter * shards // 24 == place // 3
        assert [a for p, a in enumerate(line.adapter) if p not in dict(taken)] == [a for p, a in enumerate(before) if p not in dict(taken)]
        old = dict(line.owner)
        starts = line.start()
        for s in starts:
            assert line.adapter[s.place] == adapter_of[s.index] and (s.place, s.row) not in old
        seen += [s.index for s in starts]
        if not line.owner:
            break
        for shard, waiting in enumerate(line.waiting):
            if sum(map(len, waiting.values())) > 0:
                assert len({p for p, _ in line.owner if p // 3 == shard}) == 3, "someone waits, and a place has nothing to do"
        for place in [p for p in line.owner if draw.random() < 0.4]:
            del line.owner[place]
    assert sorted(seen) == list(range(sum(counts)))
    for a in range(24):
        own = [i for i in seen if adapter_of[i] == a]
        assert own == sorted(own)


def test_a_place_stays_with_its_adapter_while_that_has_more():
    line = Queues(numbered([7, 7, 7]), places=2, each=2)
    assert line.admit() == [(0, 0), (1, 1)]
    for left in (5, 3, 1):
        line.start()
        line.owner.clear()
        assert line.admit() == [] and len(line.waiting[0][0]) == left
    line.start()
    line.owner.clear()
    assert line.admit() == [(0, 2), (1, 2)]


def test_many_requests_of_one_adapter_get_several_places():
    line = Queues(numbered([8, 1]), places=4, each=2)
    assert sorted(a for _, a in line.admit()) == [0, 0, 0, 1]
    assert sorted(s.index for s in line.start()) == [0, 1, 2, 3, 4, 5, 8]


@pytest.mark.parametrize("shards", [1, 2])
def test_prompts_are_read_in_calls_of_bounded_size_and_few_shapes(shards):
    """Each once, at an entry of its place's shard."""
    draw, shapes = np.random.default_rng(0), set()
    for _ in range(60):
        new = {
            int(place): [tuple(draw.integers(0, 99, n).tolist()) for n in draw.integers(200, 300, draw.integers(1, 6))]
            for place in draw.choice(32 * shards, draw.integers(1, 32), replace=False)
        }
        seen = []
        for call in readings(new, 32, shards, each=5):
            assert call.width * call.depth * call.length <= queues.READ
            shapes.add(call[:3])
            entries = [entry for entry, _, _ in call.entries]
            assert len(set(entries)) == len(entries)
            for entry, place, prompts in call.entries:
                assert entry // call.width == place // 32 and len(prompts) <= call.depth
                assert not call.in_order or entry % call.width == place % 32
                assert all(len(prompt) <= call.length for prompt in prompts)
                seen += [(place, prompt) for prompt in prompts]
        assert sorted(seen) == sorted((place, prompt) for place, prompts in new.items() for prompt in prompts)
    assert len(shapes) <= 8  # two lengths, few or many prompts of a place, few or many places


def test_long_prompts_are_read_one_by_one():
    (call, *rest) = readings({0: [(1,) * 9000, (2,) * 9000, (3,) * 9000]}, 1, 1, each=8)
    assert len(rest) == 2 and (call.width, call.depth, call.length) == (1, 1, 16384)


def test_all_places_are_read_in_their_order():
    (call,) = readings({place: [(1, 2, 3)] * 2 for place in range(8)}, 8, 1, each=2)
    assert call.in_order and (call.width, call.depth, call.length) == (8, 2, padded_length(3))
