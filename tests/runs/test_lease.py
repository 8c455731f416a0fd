"""The lease of a run in a store: one process has it, a living one keeps it, a dead one's is free."""

import json
import os
import subprocess
import sys
import time

import pytest

from seal_jax import config as config_lib
from seal_jax.errors import SealError
from seal_jax.runs import lease, store
from seal_jax.runs.events import read_events
from seal_jax.runs.lease import Held, Lease
from seal_jax.runs.places import place


@pytest.fixture
def path(tmp_path):
    return place(f"memory:/{tmp_path}/run/lock")


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(lease, "SETTLE", 0.0)


def held(path, **changes):
    """A lease that another machine's process took just now, or with `changes`."""
    found = {"token": "other", "process": 7, "host": "far", "machine": "m", "born": "1", "time": time.time(), **changes}
    path.write_bytes(json.dumps(found).encode())


def test_one_has_it_and_gives_it_back(path):
    assert not lease.in_use(path)
    mine = Lease(path)
    assert lease.in_use(path)
    with pytest.raises(Held, match=rf"^process {os.getpid()} on .*, last seen \d+ s ago$"):
        Lease(path)
    mine.close()
    assert not path.exists() and not lease.in_use(path)


@pytest.mark.parametrize("changes", [{"time": 0.0}, {"time": "?"}, {"time": time.time() + 1e6}])
def test_an_old_lease_is_taken(path, changes):
    held(path, **changes)
    assert not lease.in_use(path)
    mine = Lease(path)
    assert json.loads(path.read_bytes())["process"] == os.getpid()
    mine.close()


def test_a_fresh_lease_is_not_taken_and_what_is_no_lease_is(path):
    held(path, time=time.time() - 60)
    with pytest.raises(Held, match="process 7 on far, last seen 60 s ago") as caught:
        Lease(path)
    assert 115 < caught.value.left <= 120
    for data in (b"", b"[1]", b"\xff"):
        path.write_bytes(data)
        Lease(path).close()


def test_the_lease_of_a_process_of_this_machine_that_has_ended_is_free(path):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    here = {"machine": lease._machine(), "process": child.pid, "born": lease._born(child.pid)}
    held(path, **here)
    assert lease.in_use(path) and here["machine"]
    held(path, **{**here, "born": "1"})
    assert not lease.in_use(path), "another process has its number now"
    held(path, **here)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has asked how
    assert not lease.in_use(path)
    child.communicate()
    assert not lease.in_use(path)
    Lease(path).close()


def test_it_is_renewed_while_it_is_held(path, monkeypatch):
    monkeypatch.setattr(lease, "RENEW", 0.02)
    mine = Lease(path)
    first, end = json.loads(path.read_bytes()), time.monotonic() + 10
    while json.loads(path.read_bytes())["time"] == first["time"]:
        assert time.monotonic() < end
        time.sleep(0.01)
    path.unlink()  # by somebody who tidies up: it is written again
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    mine.check()
    mine.close()


def test_of_two_that_take_an_old_one_the_last_has_it(path, monkeypatch):
    held(path, time=0.0)
    monkeypatch.setattr(time, "sleep", lambda _: held(path))  # the other writes after us, before we look again
    with pytest.raises(Held, match="process 7 on far"):
        Lease(path)


def test_of_two_that_find_none_one_has_it(path, monkeypatch):
    real, reads = lease._read, []

    def read(path):
        reads.append(1)
        if len(reads) == 1:  # the other creates it after we have looked
            held(path)
            return None
        return real(path)

    monkeypatch.setattr(lease, "_read", read)
    with pytest.raises(Held, match="process 7 on far"):
        Lease(path)
    assert json.loads(path.read_bytes())["host"] == "far"


def test_a_store_that_cannot_create_exclusively(path, monkeypatch):
    real = type(path).write_bytes

    def write(self, data, exclusive=False):
        if exclusive:
            raise OSError(38, "not implemented")
        real(self, data)

    monkeypatch.setattr(type(path), "write_bytes", write)
    mine = Lease(path)
    assert lease.in_use(path)
    mine.close()


def test_a_run_whose_lease_is_lost_writes_no_more(tmp_path, monkeypatch):
    folder, made = place(f"memory:/{tmp_path}/run"), config_lib.build({"name": "test", "task": {"name": "knowledge"}})
    with pytest.raises(SealError, match=r"run: taken over by another process \(process 7 on far, last seen 0 s ago\)") as caught:  # noqa: SIM117
        with store.RunStore.create_or_open(folder, made) as run:
            run.once("a", lambda: {})
            run._events._send()
            held(folder / "lock")
            run.once("b", lambda: {})  # the lease was renewed just now, as far as is known here
            monkeypatch.setattr(run._lock, "_renewed", time.time() - lease.STALE)  # after minutes of sleep
            run.once("c", lambda: {})
    assert store.RunStore(folder).names() == ["a", "b"]
    assert "stopped" not in [e["event"] for e in read_events(folder / "events.jsonl")], "the log is the other's now"
    assert json.loads((folder / "lock").read_bytes())["host"] == "far", "and so is the lease"
    assert "\n" not in str(caught.value)
