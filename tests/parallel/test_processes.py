import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from seal_jax.errors import SealError
from seal_jax.parallel import processes


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(arguments, number, port, count=2):
    """Process `number` of `count` of a run of the command line, with four fake devices each."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(number),
    }
    command = [sys.executable, "-m", "seal_jax.cli", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def together(arguments, count=2):
    port = free_port()
    started = [start(arguments, number, port, count) for number in range(count)]
    try:
        said = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]


def rewards(units):
    """What every trial of the run earned, and what was written and answered, by unit."""
    found = {}
    for name, unit in units.items():
        for context in unit.get("contexts", []) if isinstance(unit.get("contexts"), list) else []:
            for edit in context["edits"]:
                trials = [(t["seed"], t["reward"], tuple(t["outputs"])) for t in edit["trials"]]
                found[name, context["id"], edit["candidate"]] = (edit["text"], edit["reward"], trials)
            found[name, context["id"]] = {m: [t["reward"] for t in trials] for m, trials in context["methods"].items()}
    return found


def test_two_processes_of_four_devices_earn_the_rewards_of_one_device(tmp_path, write_config, tiny_run, units):
    """The whole of `seal-jax train`, over a mesh of eight devices of two processes: the same self-edits, answers, rewards and table."""
    path = write_config(tmp_path / "two")
    done = together(["train", str(path)])
    assert [code for code, *_ in done] == [0, 0], done[0][2][-3000:] + done[1][2][-3000:]
    many, one = units(tmp_path / "two" / "run"), units(tiny_run)
    assert set(many) == set(one)
    expected = rewards(one)
    assert rewards(many) == expected and len(expected) >= 12
    assert len({reward for value in expected.values() if isinstance(value, tuple) for _, reward, _ in value[2]}) > 1, "they differ"
    for number in (1, 2):
        np.testing.assert_allclose(many[f"rounds/{number}/m_step"]["losses"], one[f"rounds/{number}/m_step"]["losses"], rtol=1e-4)
    assert many["table"]["rows"] == one["table"]["rows"]
    assert json.loads((tmp_path / "two" / "run" / "versions.json").read_text())["devices"] == 8
    (_, out, err), (_, other_out, other_err) = done
    assert "run folder:" in out and "seal-jax train: tiny" in err, "the first process tells"
    assert "run folder:" not in other_out and "seal-jax train" not in other_err, "the second does not"


def test_a_fault_is_told_by_all_and_none_waits(tmp_path, write_config):
    """The first process finds the run folder unusable: the second ends too."""
    path = write_config(tmp_path / "bad")
    (tmp_path / "bad" / "run").mkdir()
    (tmp_path / "bad" / "run" / "something.txt").write_text("mine")
    for code, _, err in together(["train", str(path)]):
        assert code == 2 and "not empty and not a run" in err


def test_a_half_set_environment_is_refused(monkeypatch):
    monkeypatch.setenv(processes.ADDRESS, "127.0.0.1:1")
    monkeypatch.delenv(processes.COUNT, raising=False)
    with pytest.raises(SealError, match="JAX_COORDINATOR_ADDRESS is set, JAX_NUM_PROCESSES is not"):
        processes.start()
    monkeypatch.setenv(processes.COUNT, "two")
    monkeypatch.setenv(processes.NUMBER, "0")
    with pytest.raises(SealError, match="JAX_NUM_PROCESSES='two'"):
        processes.start()


def test_alone_nothing_is_started_or_shared():
    processes.start()
    value = {"a": [1, None]}
    assert processes.share(value) is value and processes.share_arrays(value) is value and processes.first()
