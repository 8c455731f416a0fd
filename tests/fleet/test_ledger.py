import json

import pytest

from seal_jax import config
from seal_jax.fleet.ledger import Ledger
from seal_jax.runs.events import read_events
from seal_jax.runs.store import RunStore

NAMES = ["rounds/1/e_step/000", "rounds/1/e_step/001"]


@pytest.fixture
def ledger(tmp_path, tiny_config):
    now = [0.0]
    with RunStore.create_or_open(tmp_path / "run", config.load(tiny_config)) as store:
        made = Ledger(store, lambda: now[0])
        made.now = now
        yield made


def test_units_go_to_who_asks_first_and_count_once(ledger):
    assert ledger.claim("0.0", NAMES) == {"compute": NAMES[0]}
    assert ledger.claim("1.0", NAMES) == {"compute": NAMES[1]}
    assert ledger.claim("2.0", NAMES) == {}
    assert ledger.keep("0.0", NAMES[0], {"by": 0}, 1.0)
    assert ledger.claim("2.0", NAMES) == {}
    assert ledger.claim("2.0", NAMES[:1]) == {"whole": True}
    assert ledger.keep("1.0", NAMES[1], {"by": 1}, 1.0)
    assert ledger.claim("2.0", NAMES) == {"whole": True}
    assert [ledger.store.read(name)["by"] for name in NAMES] == [0, 1]


def test_what_a_lost_worker_had_is_free_and_its_late_result_refused(ledger):
    ledger.claim("0.0", NAMES[:1])
    assert ledger.release("0.0", "killed") == {"units": NAMES[:1], "losses": 1, "began": True}
    assert ledger.claim("0.0", NAMES) == {"lost": True}, "what it asked before it was gone"
    assert not ledger.keep("0.0", NAMES[0], {"by": "nobody"}, 1.0)
    assert ledger.claim("1.0", NAMES[:1]) == {"compute": NAMES[0]}
    assert not ledger.keep("0.0", NAMES[0], {"by": "a ghost"}, 1.0)
    assert not ledger.save("0.0", NAMES[0], "policy/1", {}, {})
    assert ledger.keep("1.0", NAMES[0], {"by": 1}, 1.0)
    assert ledger.store.read(NAMES[0]) == {"by": 1}
    assert ledger.losses[NAMES[0]] == 1
    assert not ledger.keep("1.0", NAMES[0], {"by": "twice"}, 1.0), "a result is kept once"
    assert ledger.store.read(NAMES[0]) == {"by": 1}


def test_units_of_an_earlier_start_are_not_computed_again(ledger):
    ledger.store.keep(NAMES[0], {"by": "before"}, 0.0)
    assert ledger.claim("0.0", NAMES) == {"compute": NAMES[1]}
    assert ledger.claim("0.0", NAMES[:1], beside="policy/1") == {"whole": True}, "found once is found"


def test_a_unit_without_its_checkpoint_is_computed(ledger):
    ledger.store.keep(NAMES[0], {"by": "before"}, 0.0)
    assert ledger.claim("0.0", NAMES[:1], beside="policy/1") == {"compute": NAMES[0]}


def test_who_takes_too_long(ledger):
    ledger.claim("0.0", NAMES)
    ledger.now[0] = 5.0
    ledger.claim("1.0", NAMES)
    ledger.now[0] = 11.0
    assert ledger.overdue(10.0) == ["0.0"]
    ledger.expect("2.0")  # which never asks
    ledger.claim("3.0", NAMES)  # waits for the others, and asks again
    ledger.now[0] = 20.0
    ledger.claim("3.0", NAMES)
    ledger.now[0] = 22.0
    assert ledger.overdue(10.5) == ["0.0", "1.0", "2.0"]
    assert ledger.overdue(18.0) == ["0.0"]
    assert ledger.release("2.0", "stalled") == {"units": [], "losses": 0, "began": False}
    assert ledger.overdue(5.0) == ["0.0", "1.0"]


def test_who_has_just_finished_is_not_silent(ledger):
    ledger.claim("0.0", NAMES)
    ledger.now[0] = 9.0
    assert ledger.keep("0.0", NAMES[0], {"by": 0}, 9.0)
    ledger.now[0] = 11.0
    assert ledger.overdue(10.0) == []


def test_what_all_workers_say_stands_in_the_log_once(ledger):
    for worker in ("0.0", "1.0"):
        ledger.log("skipped", {"worker": worker, "reason": "no question", "count": 2})
        ledger.log("worker_started", {"worker": worker, "pid": 1, "host": "a", "device": "TPU v5"})
    events = [e["event"] for e in read_events(ledger.store.folder / "events.jsonl")]
    assert (events.count("skipped"), events.count("worker_started")) == (1, 2)


def test_versions_are_the_workers(tmp_path, tiny_config):
    """Not those of the process that has the folder, which has no accelerator."""
    for device in ("TPU v5", "TPU v5", "TPU v6 lite"):
        with RunStore.create_or_open(tmp_path / "run", config.load(tiny_config, ["executor.name=ray"])) as store:
            Ledger(store).log("worker_started", {"worker": "0.0", "pid": 1, "host": "a", "device": device})
    assert json.loads((tmp_path / "run/versions.json").read_text()) == {"device": "TPU v5"}
    changed = [e["changes"] for e in read_events(tmp_path / "run/events.jsonl") if e["event"] == "versions_changed"]
    assert changed == [{"device": ["TPU v5", "TPU v6 lite"]}]
