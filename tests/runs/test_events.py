import datetime
import json
import os
import threading
import time

import pytest

from seal_jax.errors import SealError
from seal_jax.runs import events
from seal_jax.runs.events import EventLog, UploadedEventLog, read_events
from seal_jax.runs.places import ObjectPath, place


def test_one_json_line_an_event_with_time_in_utc(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.append("unit_done", unit="rounds/1/e_step/000", seconds=1.5, text="two\nlines")
    lines = (tmp_path / "events.jsonl").read_text().splitlines()  # visible while the log is open
    assert len(lines) == 1
    event = json.loads(lines[0])
    assert list(event) == ["time", "event", "unit", "seconds", "text"]
    time = datetime.datetime.fromisoformat(event["time"])
    assert time.utcoffset() == datetime.timedelta(0)
    assert abs((datetime.datetime.now(datetime.UTC) - time).total_seconds()) < 60
    assert read_events(tmp_path / "events.jsonl") == [event]
    log.close()


def opened(path):
    return UploadedEventLog(path) if isinstance(path, ObjectPath) else EventLog(path)


def test_a_log_goes_on_where_it_was(anywhere):
    path = anywhere / "events.jsonl"
    for name in ("first", "second"):
        log = opened(path)
        log.append(name)
        log.append(f"{name} again")
        log.close()
        log.close()
    assert [e["event"] for e in read_events(path)] == ["first", "first again", "second", "second again"]
    path.write_bytes(path.read_bytes()[:-3])
    log = opened(path)
    log.append("third")
    log.close()
    assert [e["event"] for e in read_events(path)] == ["first", "first again", "second", "third"]


def test_a_store_has_a_copy_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(events, "EVERY", 0.02)
    path = place(f"memory:/{tmp_path}/events.jsonl")
    log = UploadedEventLog(path)
    for name in ("first", "second"):
        log.append(name)
        end = time.monotonic() + 10
        while [e["event"] for e in read_events(path)][-1:] != [name]:
            assert time.monotonic() < end
            time.sleep(0.01)
    with monkeypatch.context() as patch:
        patch.setattr(ObjectPath, "write_bytes", out_of_reach)
        log.append("third")
        time.sleep(0.1)  # tried in vain, and not told
    log.close()
    assert [e["event"] for e in read_events(path)] == ["first", "second", "third"]


def test_why_a_run_stopped_is_in_the_store_at_once(tmp_path):
    path = place(f"memory:/{tmp_path}/events.jsonl")
    log = UploadedEventLog(path)
    log.append("first")
    assert read_events(path) == []
    log.append("stopped", error="told to end")
    assert [e["event"] for e in read_events(path)] == ["first", "stopped"]
    log.close()


def out_of_reach(self, data):
    raise OSError(5, "no answer", str(self))


def test_a_store_that_cannot_be_written_at_the_end_is_told(tmp_path, monkeypatch):
    log = UploadedEventLog(place(f"memory:/{tmp_path}/events.jsonl"))
    log.append("first")
    monkeypatch.setattr(ObjectPath, "write_bytes", out_of_reach)
    with pytest.raises(SealError, match=r"^memory://.*events\.jsonl: cannot write: no answer; nothing finished is lost"):
        log.close()
    assert not log.path.parent.exists()


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_torn_last_line_is_left_out_and_closed(tmp_path, cut):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.append("first", n=1)
    log.append("second", n=2)
    log.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert [e["event"] for e in read_events(path)] == (["first", "second"] if cut == 1 else ["first"])  # 1: only the newline is gone
    log = EventLog(path)
    log.append("third")
    log.close()
    assert [e["event"] for e in read_events(path)] == (["first", "second", "third"] if cut == 1 else ["first", "third"])
    assert path.read_bytes().startswith(whole[:-cut] + b"\n"), "nothing that was written is taken away"


def test_reading_what_is_no_event(tmp_path):
    path = tmp_path / "events.jsonl"
    assert read_events(path) == []
    path.write_bytes(b'\xff\xfe\n[1]\n{"event": 3, "time": "x"}\n\n{"time": "t", "event": "good"}\n{"event": "timeless"}\n')
    assert read_events(path) == [{"time": "t", "event": "good"}]


def test_threads_do_not_mix_lines(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    threads = [threading.Thread(target=lambda i=i: [log.append("graded", worker=i, text="x" * 500) for _ in range(50)]) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert len(read_events(tmp_path / "events.jsonl")) == 400


def test_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.append("first")
    real = os.write

    def write(file, data):  # some bytes fit, the rest does not
        if len(data) > 10:
            return real(file, bytes(data)[:10])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(SealError, match=r"events\.jsonl: cannot write: no space left on device"):
            log.append("x")
    log.append("third")
    log.close()
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["first", "third"]


def test_unwritable(tmp_path):
    with pytest.raises(SealError, match="cannot write: no such file or directory"):
        EventLog(tmp_path / "missing" / "events.jsonl")
