import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_jax import config
from seal_jax.errors import SealError
from seal_jax.fleet.ledger import Ledger
from seal_jax.fleet.store import Lost, WorkerStore
from seal_jax.runs.store import RunStore

UNITS = [f"rounds/1/e_step/{i:03d}" for i in range(6)]


class Killed(BaseException):
    pass


def asks(ledger, guard):
    """A worker's questions, answered one at a time, as an actor answers them."""

    def ask(method, *arguments):
        with guard:
            if method == "replace":
                return ledger.store.keep(*arguments) and None
            return getattr(ledger if hasattr(ledger, method) else ledger.store, method)(*arguments)

    return ask


@pytest.fixture(scope="module")
def settings(tmp_path_factory, write_config):
    return config.load(write_config(tmp_path_factory.mktemp("config")))


@given(deaths=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=4), workers=st.integers(1, 3))
def test_whoever_dies_whenever_each_unit_is_computed_to_the_same_result(tmp_path_factory, settings, deaths, workers):
    """A worker dies in its n-th unit, and another one takes its place; what all of them end with is the same."""
    left, results, started = list(deaths), [], []
    with RunStore.create_or_open(tmp_path_factory.mktemp("fleet") / "run", settings) as store:
        ledger, guard = Ledger(store), threading.RLock()

        def life(number, name):
            computed = [0]

            def compute(unit):
                with guard:
                    started.append(unit)
                    computed[0] += 1
                    if (number, computed[0]) in left:
                        left.remove((number, computed[0]))
                        raise Killed
                result = {"unit": unit, "square": int(unit[-3:]) ** 2}
                return (lambda: result) if int(unit[-3:]) % 2 else result  # one that is waited for, or as it is

            worker = WorkerStore(name, "run", asks(ledger, guard), lambda seconds: None)
            found = worker.each(UNITS, compute)
            total = worker.once("total", lambda: {"sum": sum(unit["square"] for unit in found)})
            results.append((found, total))

        def work(number):
            for again in range(9):
                try:
                    return life(number, f"{number}.{again}")
                except Killed:
                    with guard:
                        ledger.release(f"{number}.{again}", "killed")

        threads = [threading.Thread(target=work, args=(i,)) for i in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        expected = [{"unit": unit, "square": i * i} for i, unit in enumerate(UNITS)]
        assert results == [(expected, {"sum": 55})] * workers
        assert len(started) == len(UNITS) + sum(ledger.losses.values()), "each once, and again where a worker died"


def test_a_result_is_waited_for_when_the_next_unit_is_computed_or_none_is_left(tmp_path, settings):
    said = []
    with RunStore.create_or_open(tmp_path / "run", settings) as store:
        ledger, guard = Ledger(store), threading.RLock()

        def compute(unit):
            said.append(f"compute {unit[-1]}")
            if unit == UNITS[2]:  # the other worker comes meanwhile, and takes what is left
                assert ledger.claim("1.0", UNITS[:4]) == {"compute": UNITS[3]}
            return {"unit": unit} if unit == UNITS[1] else lambda: said.append(f"wait {unit[-1]}") or {"unit": unit}

        def pause(seconds):
            said.append("pause")
            ledger.keep("1.0", UNITS[3], {"unit": UNITS[3]}, 0.0)

        worker = WorkerStore("0.0", "run", asks(ledger, guard), pause)
        assert worker.each(UNITS[:4], compute) == [{"unit": unit} for unit in UNITS[:4]]
    assert said == ["compute 0", "compute 1", "wait 0", "compute 2", "wait 2", "pause"]


def test_workers_read_the_same_data(tmp_path, settings):
    with RunStore.create_or_open(tmp_path / "run", settings) as store:
        ledger, guard = Ledger(store), threading.RLock()
        first, second = (WorkerStore(name, "run", asks(ledger, guard), lambda seconds: None) for name in ("0.0", "1.0"))
        first.same_data({"task.train": [["a", "1"]]})
        first.once(UNITS[0], lambda: {})
        second.same_data({"task.train": [["a", "1"]]})
        with pytest.raises(SealError, match=r"holds results of other data than task.train now has, at 'a'"):
            second.same_data({"task.train": [["a", "2"]]})


def test_a_result_that_is_waited_for_is_kept_where_the_next_unit_fails(tmp_path, settings):
    with RunStore.create_or_open(tmp_path / "run", settings) as store:
        ledger, guard = Ledger(store), threading.RLock()

        def compute(unit):
            if unit == UNITS[1]:
                raise OSError("no more")
            return lambda: {"unit": unit}

        with pytest.raises(OSError, match="no more"):
            WorkerStore("0.0", "run", asks(ledger, guard), lambda seconds: None).each(UNITS[:2], compute)
        assert store.read(UNITS[0]) == {"unit": UNITS[0]} and not store.has(UNITS[1])


def test_checkpoints_go_through_the_ledger(tmp_path, settings):
    tree = {"layers": {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    with RunStore.create_or_open(tmp_path / "run", settings) as store:
        worker = WorkerStore("0.0", "run", asks(Ledger(store), threading.RLock()))

        def tune():
            worker.save("policy/1", tree, {"round": 1})
            return {"pairs": 1}

        assert not worker.saved("policy/1")
        assert worker.once("rounds/1/m_step", tune, beside="policy/1") == {"pairs": 1}
        assert worker.saved("policy/1") and worker.has("rounds/1/m_step") and worker.names("rounds/") == ["rounds/1/m_step"]
        again, metadata = worker.load("policy/1")
        np.testing.assert_array_equal(again["layers"]["a"], tree["layers"]["a"])
        assert metadata == {"round": 1}
        assert worker.keep("table", {"rows": []}, 0.0) == worker.keep("table", {"rows": []}, 0.0) == {"rows": []}


def test_a_worker_that_was_given_up_stops(tmp_path, settings):
    with RunStore.create_or_open(tmp_path / "run", settings) as store:
        ledger = Ledger(store)
        worker = WorkerStore("0.0", "run", asks(ledger, threading.RLock()))

        def slow():
            ledger.release("0.0", "stalled")
            return {}

        with pytest.raises(Lost):
            worker.once("rounds/1/e_step/000", slow)
        assert not store.has("rounds/1/e_step/000")
