import os
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from seal_jax.tasks.arc import augmenters as aug
from seal_jax.tasks.arc import leave_out
from seal_jax.tasks.arc.grids import Pair, Puzzle


def make(pairs: int, side: int = 2) -> Puzzle:
    def grid(n: int):
        return tuple(tuple((n + 3 * i + j) % 10 for j in range(side)) for i in range(side))

    return Puzzle("a-0", tuple(Pair(grid(n), grid(n + 1)) for n in range(pairs)), Pair(grid(8), grid(9)))


def test_without_augmenters_only_the_order_of_the_pairs_changes():
    puzzle = make(3)
    made = leave_out.leave_n_puzzles(puzzle, (), n=1)
    assert {p.test for p in made} == set(puzzle.train) and puzzle.test not in {pair for p in made for pair in p.pairs}
    assert all(set(p.pairs) == set(puzzle.train) for p in made) and 3 <= len(made) == len(set(made)) <= 6
    assert all(len(p.pairs) == 2 for p in leave_out.leave_n_puzzles(puzzle, (), n=2))
    assert leave_out.leave_n_puzzles(puzzle, (), n=4) == []


def test_what_grows_beyond_30_is_left_out():
    sides = {p.side for p in leave_out.leave_n_puzzles(make(2, side=16), aug.SIZE)}
    assert sides == {16}
    assert {p.side for p in leave_out.leave_n_puzzles(make(2, side=15), aug.SIZE)} == {15, 30}


def test_training_puzzles_are_capped():
    puzzle, augmenters = make(4), aug.chosen()
    everything = leave_out.training_puzzles(puzzle, augmenters, limit=None)
    kept = leave_out.training_puzzles(puzzle, augmenters)
    assert len(everything) > leave_out.LIMIT == len(kept) and set(kept) < set(everything)
    assert kept == leave_out.training_puzzles(puzzle, augmenters) != leave_out.training_puzzles(puzzle, augmenters, seed=1)
    assert leave_out.training_puzzles(puzzle, ()) == leave_out.training_puzzles(puzzle, (), limit=None)


@given(st.lists(st.integers(), max_size=30), st.integers(0, 30), st.integers(0, 9))
def test_limited(items, limit, seed):
    kept = leave_out.limited(items, limit, seed)
    assert len(kept) == min(limit, len(items)) and not set(kept) - set(items)
    assert kept == items or len(items) > limit


def test_limited_shuffles_as_numpy_shuffles_a_list():
    import numpy as np

    items = [{"n": i} for i in range(300)]
    ours = leave_out.limited(items, 250, seed=0)
    np.random.RandomState(0).shuffle(items)
    assert ours == items[:250]


def test_queries_lead_back_to_the_puzzle():
    puzzle = make(3)
    queries = leave_out.queries(puzzle)
    views, plain = [q for q in queries if q.inverter], [q for q in queries if not q.inverter]
    assert queries == views + plain and len(views) == 5 and all(len(q.puzzle.train) == 2 for q in queries)
    for query in queries:
        inverter = query.inverter or aug.IdentityAugmenter()
        assert inverter.grid(query.puzzle.test.input) == puzzle.test.input
        assert inverter.grid(query.puzzle.test.output) == puzzle.test.output
    assert [q.puzzle.train for q in leave_out.queries(puzzle, leave_n=[0], permute_n=0) if not q.inverter] == [puzzle.train]
    assert len(leave_out.queries(puzzle, [0, 1])) == len(leave_out.queries(puzzle, [0])) + len(queries)
    assert leave_out.queries(puzzle, leave_n=[4]) == []


def test_nothing_depends_on_the_hash_seed():
    code = (
        "from seal_jax.tasks.arc import augmenters, leave_out; from seal_jax.tasks.arc.grids import *\n"
        "puzzle = Puzzle('a', tuple(Pair(((i, 9), (8, 1)), ((0, i),)) for i in range(4)), Pair(((7,),), ((8,),)))\n"
        "print(leave_out.training_puzzles(puzzle, augmenters.chosen()), leave_out.queries(puzzle))"
    )
    outputs = set()
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        outputs.add(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment).stdout)
    assert len(outputs) == 1 and "Puzzle" in outputs.pop()
