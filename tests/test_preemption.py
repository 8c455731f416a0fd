"""Told to end: SIGTERM at every kind of work, in one process and in several, and what is saved then."""

import json
import os
import signal
import time

import pytest

from seal_jax import config, preemption
from seal_jax.experiments import pretraining
from seal_jax.runs import checkpoint
from seal_jax.runs.events import read_events

LINE = "seal-jax: told to end (SIGTERM); nothing finished is lost, the same command goes on"
# The process stops for a moment after the first units of a step that is called so, and leaves a file that says so.
PAUSE = """
import time
from seal_jax import progress
def update(self, n=1, shown=progress._Lines.update):
    shown(self, n)
    if n and self.what.startswith({what!r}) and not os.path.exists({mark!r}):
        open({mark!r}, "x").close()
        time.sleep(1.0)
progress._Lines.update = update
"""


def wait_for(path, process):
    end = time.monotonic() + 200
    while not path.exists():
        assert process.is_alive() and time.monotonic() < end, f"{path} did not come"
        time.sleep(0.005)


def ended(process, within=30.0):
    """The exit code of a process that ends within so many seconds."""
    process.join(within)
    assert process.exitcode is not None, "still there"
    return process.exitcode


def stopped(folder):
    return [e["error"] for e in read_events(folder / "events.jsonl") if e["event"] == "stopped"]


def test_told_to_end_at_every_kind_of_work_and_continued_equals_unbroken(start, tiny_config, tiny_run, tmp_path, same_run):
    folder, said = tmp_path / "run", tmp_path / "said"
    for number, what in enumerate(("writing self-edits (evaluate", "answering", "fitting (rounds 1", "M-step")):
        mark = tmp_path / f"mark{number}"
        process = start("train", tiny_config, said=said, before=PAUSE.format(what=what, mark=str(mark)))
        wait_for(mark, process)
        os.kill(process.pid, signal.SIGTERM)
        assert ended(process) == 143
        assert said.read_text().splitlines()[-1] == LINE and "Traceback" not in said.read_text()
        assert stopped(folder)[number:] == ["Preempted: told to end (SIGTERM)"]
    process = start("train", tiny_config)
    assert ended(process, 200) == 0
    same_run(folder, tiny_run)
