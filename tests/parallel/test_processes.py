import http.server
import json
import os
import socket
import subprocess
import sys
import threading

import jax  # before a test sets the environment: where there is no TPU, the import sets TPU_SKIP_MDS_QUERY
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


@pytest.fixture
def metadata(monkeypatch):
    """A metadata server as TPU VMs have one; what it is asked, and its attributes."""
    attributes, asked = {}, []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Metadata-Flavor"]))
            value = attributes.get(self.path.rsplit("/", 1)[1])
            self.send_response(404 if value is None else 200)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "SLURM_NTASKS", processes.ADDRESS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
    monkeypatch.setattr(processes, "_has_tpu", lambda: True)
    yield attributes, asked
    server.shutdown()
    server.server_close()


def test_tpu_vms_of_a_slice_join_each_other(metadata, monkeypatch):
    """They have no variables; JAX, asked without arguments, finds the hosts by the metadata server, as here."""
    attributes, asked = metadata
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: joined.append(arguments))
    processes.start()
    assert not joined, "no such attribute"
    attributes["worker-network-endpoints"] = "10.0.0.1"
    processes.start()
    assert not joined, "a single host"
    attributes["worker-network-endpoints"] = "unknown:8470:10.0.0.1,unknown:8470:10.0.0.2"
    processes.start()
    assert joined == [{"heartbeat_timeout_seconds": 260}], "no address"
    assert set(asked) == {("/computeMetadata/v1/instance/attributes/worker-network-endpoints", "Google")}


def test_pods_are_counted_by_their_variables_and_nobody_is_asked_without_a_tpu(metadata, monkeypatch):
    attributes, asked = metadata
    attributes["worker-network-endpoints"] = "10.0.0.1,10.0.0.2"
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b,c")
    assert processes._tpu_hosts() == 3
    monkeypatch.setenv("TPU_PROCESS_ADDRESSES", "a:1,a:2")  # two processes a host
    assert processes._tpu_hosts() == 2
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES")
    monkeypatch.delenv("TPU_PROCESS_ADDRESSES")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    assert processes._tpu_hosts() == 0
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
    monkeypatch.setattr(processes, "_has_tpu", lambda: False)
    assert processes._tpu_hosts() == 0 and not asked


def test_alone_nothing_is_started_or_shared():
    processes.start()
    value = {"a": [1, None]}
    assert processes.share(value) is value and processes.share_arrays(value) is value and processes.first()
