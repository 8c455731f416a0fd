"""Runs of several processes of which one is told to end, stalls or dies: all end, with one line each, and the same command goes on."""

import os
import signal
import socket
import time

import pytest

from seal_jax.errors import SealError
from seal_jax.parallel import peers
from seal_jax.runs.events import read_events

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
    for number in (0, 1):  # by whichever is told
        mark = tmp_path / f"mark{number}"
        both = pair("train", tiny_config, before=[pause("writing self-edits", mark, 0.2), ""])
        wait_for(mark, both[0])
        os.kill(both[number].pid, signal.SIGTERM)
        t = time.monotonic()
        assert [ended(process) for process in both] == [143, 143], [(tmp_path / f"said{i}").read_text() for i in (0, 1)]
        print("TOOK", time.monotonic() - t)
        assert last_lines(tmp_path) == [TOLD, TOLD]
    assert stops(tmp_path) == ["Preempted: told to end (SIGTERM)"] * 2


def test_a_stalled_process_is_not_waited_for(pair, pause, wait_for, ended, start, tiny_config, tiny_run, tmp_path, same_run):
    for number in (0, 1):
        mark = tmp_path / f"mark{number}"
        both = pair("train", tiny_config, before=[pause("writing self-edits", mark, 0.2), ""], silence=4)
        wait_for(mark, both[0])
        os.kill(both[number].pid, signal.SIGSTOP)
        t = time.monotonic()
        assert ended(both[1 - number], 40) == 2, [(tmp_path / f"said{i}").read_text() for i in (0, 1)]
        print("TOOK", time.monotonic() - t)
        print((tmp_path / f"said{1 - number}").read_text())
        both[number].kill()
        both[number].join()
