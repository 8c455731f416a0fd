"""Told to end: SIGTERM at every kind of work, and what is saved then."""

import os
import signal
import subprocess
import sys
import time

import pytest

from seal_jax import config, preemption
from seal_jax.experiments import pretraining
from seal_jax.runs import checkpoint
from seal_jax.runs.events import read_events

LINE = "seal-jax: told to end (SIGTERM); nothing finished is lost, the same command goes on"
# In place of writing self-edits: XLA compiles for long; or C code runs for long, in which no handler of Python's can.
COMPILE = """
import jax, jax.numpy as jnp
from seal_jax.rest_em.policy import Policy
jax.config.update("jax_enable_compilation_cache", False)
def long(x):
    for i in range(800):
        x = jnp.sort(x * (i + 1.5), axis=i % 2)
    return x
def write(*_, **__):
    program = jax.jit(long).lower(jnp.ones((4, 4, 4)))
    open({mark!r}, "x").close()
    program.compile()
    open({mark!r} + "done", "x").close()
Policy.write = write
"""
STUCK = """
import ctypes, signal
from seal_jax import preemption
from seal_jax.rest_em.policy import Policy
preemption.LIMIT = {limit}
def write(*_, **__):
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))  # other threads get it: the sleep is not cut short
    sleep = ctypes.CDLL(None).sleep
    open({mark!r}, "x").close()
    sleep(100)
Policy.write = write
"""


def stopped(folder):
    return [e["error"] for e in read_events(folder / "events.jsonl") if e["event"] == "stopped"]


def test_told_to_end_while_xla_compiles(start, wait_for, ended, tiny_config, tmp_path):
    said, mark = tmp_path / "said", tmp_path / "mark"
    process = start("train", tiny_config, said=said, before=COMPILE.format(mark=str(mark)))
    wait_for(mark, process)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGTERM)
    assert ended(process) == 143 and not (tmp_path / "markdone").exists()
    assert said.read_text().splitlines()[-1].startswith("seal-jax: told to end (SIGTERM); ")
    assert len(stopped(tmp_path / "run")) == 1


def test_a_main_thread_that_does_not_answer_is_ended(start, wait_for, ended, tiny_config, tmp_path):
    said, mark = tmp_path / "said", tmp_path / "mark"
    process = start("train", tiny_config, said=said, before=STUCK.format(limit=1.0, mark=str(mark)))
    wait_for(mark, process)
    time.sleep(0.3)  # until it sleeps: before, the handler would still run
    os.kill(process.pid, signal.SIGTERM)
    assert ended(process, 10.0) == 143
    told = "told to end (SIGTERM); the main thread did not answer within 1 s"
    assert said.read_text().splitlines()[-1] == f"seal-jax: {told}; {preemption.GOES_ON}"
    assert stopped(tmp_path / "run") == [f"Preempted: {told}"]


def test_told_twice_a_process_ends_at_once(start, wait_for, ended, tiny_config, tmp_path):
    for second in (signal.SIGTERM, signal.SIGINT):
        said, mark = tmp_path / "said", tmp_path / f"mark{second}"
        process = start("train", tiny_config, said=said, before=STUCK.format(limit=60.0, mark=str(mark)))
        wait_for(mark, process)
        time.sleep(0.3)
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(preemption.TOGETHER + 0.3 if second == signal.SIGTERM else 0.3)
        os.kill(process.pid, second)
        assert ended(process, 10.0) == 128 + second
        assert said.read_text().splitlines()[-1] == f"seal-jax: told twice, ended at once; {preemption.GOES_ON}"


def test_a_notice_that_comes_twice_at_once_is_one(start, wait_for, ended, tiny_config, tmp_path):
    """As `timeout` sends it: to the process, and to its group."""
    said, mark = tmp_path / "said", tmp_path / "mark"
    process = start("train", tiny_config, said=said, before=STUCK.format(limit=3.0, mark=str(mark)))
    wait_for(mark, process)
    time.sleep(0.3)
    for _ in range(2):
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.1)
    assert ended(process, 15.0) == 128 + signal.SIGTERM
    assert "told twice" not in said.read_text() and "did not answer within 3 s" in said.read_text()


CHILD = """
import os, signal, time
from seal_jax import preemption
with preemption.watched():
    child = os.fork()
    if not child:
        signal.pause()
    time.sleep(0.3)
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(preemption.notice(wait=1.0))
print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
"""


def test_a_forked_child_told_to_end_is_not_this_process():
    """As the workers of a pool are when it closes."""
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["-15", "None", "True"], done.stderr


# --- Training that is saved -----------------------------------------------------------------------------------------


def make_pretraining(write_config, folder, **changes):
    sft = {"weights": "full", "learning_rate": 0.005, "epochs": 3, "batch_size": 1, "microbatch": 1, "row_length": 192}
    return write_config(folder, pretraining={"sizes": [1], "edits": 1, "group": 1, "sft": sft, "checkpoint_every": None, **changes})


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, write_config, quick_compile, units):
    """The results of an undisturbed run."""
    settings = config.load(make_pretraining(write_config, tmp_path_factory.mktemp("unbroken")))
    with quick_compile():
        pretraining.run(settings)
    return units(settings.run_dir)


def test_pretraining_saves_at_the_next_step_and_goes_on_from_there(
    start, pause, wait_for, ended, write_config, tmp_path, pretrained, units
):
    path, said, mark = make_pretraining(write_config, tmp_path), tmp_path / "said", tmp_path / "mark"
    process = start("pretrain", path, said=said, before=pause("training on passage only", mark))
    wait_for(mark, process)
    os.kill(process.pid, signal.SIGTERM)
    assert ended(process) == 143
    assert said.read_text().splitlines()[-1] == LINE
    (state,) = (tmp_path / "run" / "states").iterdir()
    assert checkpoint.is_complete(state)
    steps = len(checkpoint.load_adapters(state)[0]["losses"])
    assert 1 <= steps <= 3
    process = start("pretrain", path)
    assert ended(process, 200) == 0
    assert units(tmp_path / "run") == pretrained
