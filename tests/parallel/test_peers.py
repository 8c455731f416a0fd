"""Runs of several processes of which one is told to end, stalls or dies: all end, with one line each, and the same command goes on."""

import os
import signal
import socket
import time

import pytest

from seal_jax.errors import SealError
from seal_jax.parallel import peers
from seal_jax.runs import checkpoint
from seal_jax.runs.events import read_events
from seal_jax.runs.store import RunStore

TOLD = "seal-jax: told to end (SIGTERM); nothing finished is lost, the same command goes on"


@pytest.fixture
def pair(start, tmp_path):
    """`pair(...)`: a command in two processes of one device each, started as `start` does. `before`: for each what it runs first."""

    def run(*arguments, before=("", ""), silence=100):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        made = []
        for number in (0, 1):
            environment = {
                **{"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(number)},
                **{peers.TIMEOUT: str(silence)},
            }
            first = f"os.environ.update({environment})\n{before[number]}"
            made.append(start(*arguments, said=tmp_path / f"said{number}", before=first))
        return made

    return run


def last_lines(folder):
    return [(folder / f"said{i}").read_text().splitlines()[-1] for i in (0, 1)]


def stops(folder):
    return [e["error"] for e in read_events(folder / "run" / "events.jsonl") if e["event"] == "stopped"]


def test_one_process_told_to_end_ends_all(pair, pause, wait_for, ended, tiny_config, tmp_path):
    mark = tmp_path / "mark"
    both = pair("train", tiny_config, before=[pause("writing self-edits", mark, 0.2), ""])
    wait_for(mark, both[0])
    os.kill(both[1].pid, signal.SIGTERM)
    assert [ended(process) for process in both] == [143, 143]
    assert last_lines(tmp_path) == [TOLD, TOLD]
    assert stops(tmp_path) == ["Preempted: told to end (SIGTERM)"]


# Self-edits and answers that are known beforehand, so that training is all that is compiled.
TRAINS_ONLY = """
from seal_jax.rest_em.policy import Policy
Policy.write = lambda self, prompts, keys, *_, **__: [["Orsk sells salt." for _ in each] for each in keys]
Policy.answer = lambda self, probes, *_, **__: [["salt" for _ in each] for each in probes]
"""


def test_all_save_after_the_same_step_and_go_on_from_there(pair, pause, wait_for, ended, write_config, tmp_path):
    """All weights, over two processes, of which the second is told to end in the middle of the training."""
    sft = {"weights": "full", "learning_rate": 0.005, "epochs": 40, "batch_size": 1, "microbatch": 1, "row_length": 192}
    section = {"sizes": [1], "edits": 1, "group": 1, "sft": sft, "checkpoint_every": None}
    path, mark = write_config(tmp_path, pretraining=section), tmp_path / "mark"
    both = pair("pretrain", path, before=[TRAINS_ONLY + pause("training on passage only", mark, 0.2), TRAINS_ONLY])
    wait_for(mark, both[0])
    os.kill(both[1].pid, signal.SIGTERM)
    assert [ended(process) for process in both] == [143, 143]
    assert last_lines(tmp_path) == [TOLD, TOLD]
    (state,) = (tmp_path / "run" / "states").iterdir()
    first = checkpoint.load_adapters(state)[0]["losses"]
    assert 1 <= len(first) < 40
    assert [ended(process, 200) for process in pair("pretrain", path, before=[TRAINS_ONLY] * 2)] == [0, 0]
    losses = RunStore(tmp_path / "run").read("evaluate/0001_passages/000")["losses"]["passage only"]
    assert losses[: len(first)] == first.tolist() and len(losses) == 40 and losses[-1] < losses[0]


def test_a_stalled_process_is_not_waited_for(pair, pause, wait_for, ended, start, write_config, tiny_run, tmp_path, units):
    evaluate = {"contexts": 1, "edits": 2, "seeds": 2, "resamples": 200, "group": 1}
    path, mark = write_config(tmp_path, rest_em={"rounds": 0}, evaluate=evaluate), tmp_path / "mark"
    both = pair("train", path, before=[pause("writing self-edits", mark, 0.2), ""], silence=4)
    wait_for(mark, both[0])
    os.kill(both[1].pid, signal.SIGSTOP)
    assert ended(both[0]) == 2
    told = "process 1 of 2 has not been heard of for 4 s (SEAL_JAX_PEER_TIMEOUT)"
    lines = [line for line in (tmp_path / "said0").read_text().splitlines() if "heard" in line]
    assert len(lines) == 1 and lines[0].startswith(f"seal-jax: {told}; ")
    assert len(stops(tmp_path)) == 1 and told in stops(tmp_path)[0]
    both[1].kill()
    # On one device, because that is compiled already: what is found does not depend on the number of processes.
    assert ended(start("train", path), 200) == 0
    assert units(tmp_path / "run")["evaluate/before/000"] == units(tiny_run)["evaluate/before/000"]


# --- One process alone, with a table in its own memory --------------------------------------------------------------


class Table:
    """What `Peers` asks of JAX's client."""

    def __init__(self):
        self.texts, self.broken = {}, False

    def key_value_set(self, key, value, allow_overwrite=False):
        if self.broken or (key in self.texts and not allow_overwrite):
            raise RuntimeError("no")
        self.texts[key] = value

    def key_value_dir_get(self, prefix):
        if self.broken:
            raise RuntimeError("gone")
        return [(key, value) for key, value in self.texts.items() if key.startswith(prefix)]


def soon(ask, seconds=5.0):
    end = time.monotonic() + seconds
    while not (found := ask()) and time.monotonic() < end:
        time.sleep(0.01)
    return found


def test_silence_of_the_first_process_ends_the_others():
    """Its table cannot be read any more."""
    table = Table()
    here = peers.Peers(table, 1, 2, 0.5)
    for sign in range(10):
        table.texts["seal_jax/signs/0"] = str(sign)
        time.sleep(0.1)
        assert here.notice() is None
    table.broken = True
    found = soon(here.notice)
    assert found.code == 2 and found.text.startswith("process 0 of 2 has not been heard of for ")
    here.leave(found)  # nobody can be told, and that is no error


def test_a_process_that_has_come_to_its_end_may_be_silent():
    table = Table()
    first, second = (peers.Peers(table, number, 2, 0.5) for number in (0, 1))
    second.done()
    time.sleep(1.0)
    assert first.notice() is None
    first.done()


def test_the_first_notice_counts_and_is_waited_for():
    table = Table()
    first, second = (peers.Peers(table, number, 2, 10.0) for number in (0, 1))
    told = peers.Notice(143, "told to end", True)
    second.leave(told)
    first.post(peers.Notice(2, "later"))
    assert soon(first.notice) == told
    start = time.monotonic()
    first.leave(told)
    assert time.monotonic() - start < peers.LEAVING, "the other has gone already"


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_the_time_of_silence_is_a_number(text, monkeypatch):
    monkeypatch.setenv(peers.TIMEOUT, text)
    with pytest.raises(SealError, match=f"SEAL_JAX_PEER_TIMEOUT='{text}': expected a number of seconds above 0"):
        peers.timeout()
    monkeypatch.setenv(peers.TIMEOUT, "30")
    assert peers.timeout() == 30.0
