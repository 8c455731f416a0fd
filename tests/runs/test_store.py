import fcntl
import hashlib
import json
import logging
import os
import subprocess
import sys

import pytest
import yaml

from seal_jax import config as config_lib
from seal_jax.errors import SealError
from seal_jax.models.dtypes import resolve_dtype
from seal_jax.runs import lock, store
from seal_jax.runs.events import read_events
from seal_jax.runs.store import RunStore


def make_config(**changes):
    return config_lib.build({"name": "test", "task": {"name": "knowledge"}, **changes})


def events(folder, *names):
    return [e for e in read_events(folder / "events.jsonl") if e["event"] in names]


def never():
    raise AssertionError("computed again")


def listed(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(anywhere):
    return anywhere / "runs" / "test"


@pytest.fixture
def disk(tmp_path):
    return tmp_path / "runs" / "test"


def test_results_are_of_one_data_set(folder):
    data = {"task.train": [["a", "1"], ["b", "2"]], "continual.texts": [["0", "3"]]}
    with RunStore.create_or_open(folder, make_config()) as run:
        run.same_data({"task.train": [["z", "9"]]})
        run.same_data(data)  # nothing has been computed: other data than at first does no harm
        assert run.names() == [] and not run.has("one")
        run.once("one", lambda: {})
        run.same_data({"task.validation": [["v", "4"]]})  # read for the first time
        run.same_data({"task.validation": [["v", "4"]], **data})
        for changed, named in (
            ([["a", "1"], ["b", "0"]], "b"),
            ([["b", "2"], ["a", "1"]], "a"),
            ([["a", "1"]], "b"),
            ([["a", "1"], ["b", "2"], ["c", "3"]], "c"),
        ):
            with pytest.raises(SealError, match=f"holds results of other data than task.train now has, at '{named}'; bring the data back"):
                run.same_data({"task.train": changed})
        run.same_data(data)
    assert RunStore(folder).names() == ["one"]


def test_creation_writes_config_and_versions(folder):
    with RunStore.create_or_open(folder, make_config()) as run:
        run.log("hello", n=1)
    assert config_lib.load(folder / "config.yaml") == make_config()
    versions = json.loads((folder / "versions.json").read_text())
    assert {
        "python",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "transformers",
        "numpy",
        "seal_jax",
        "platform",
        "device",
        "devices",
    } <= versions.keys()
    assert versions["devices"] >= 1
    assert versions["auto_dtype"] == str(resolve_dtype("auto"))
    assert ("cpu" in versions) == (versions["backend"] == "cpu")
    assert [e["event"] for e in read_events(folder / "events.jsonl")] == ["created", "hello", "finished"]


def test_once_computes_once_and_returns_what_is_in_the_file(folder):
    calls = []

    def compute():
        calls.append(1)
        return {"pair": (1, 2), "reward": float("nan"), 3: None}

    with RunStore.create_or_open(folder, make_config()) as run:
        first = run.once("rounds/1/e_step/000", compute)
        assert first == run.once("rounds/1/e_step/000", compute)
    with RunStore.create_or_open(folder, make_config()) as run:
        assert run.once("rounds/1/e_step/000", compute) == first
    assert calls == [1]
    assert first == {"pair": [1, 2], "reward": None, "3": None}
    assert json.loads((folder / "rounds/1/e_step/000.json").read_text()) == first
    assert [e["unit"] for e in events(folder, "unit_done")] == ["rounds/1/e_step/000"]
    assert len(events(folder, "unit_reused")) == 2


def test_an_error_of_compute_passes_and_leaves_no_file(folder):
    with pytest.raises(ZeroDivisionError), RunStore.create_or_open(folder, make_config()) as run:
        run.once("unit", lambda: {"x": 1 / 0})
    assert not RunStore(folder).has("unit")
    assert events(folder, "stopped")[0]["error"] == "ZeroDivisionError: division by zero"
    with pytest.raises(TypeError, match="unit odd: expected a dict"), RunStore.create_or_open(folder, make_config()) as run:
        run.once("odd", lambda: [1])


def test_a_damaged_unit_is_set_aside_and_computed_anew(folder):
    damages = {f"evaluate/before/{i:03d}": data for i, data in enumerate((b"", b'{"a": ', b"[1]", b"\xff\x00"))}
    with RunStore.create_or_open(folder, make_config()) as run:
        for name in damages:
            run.once(name, lambda: {"a": 1})
    for name, data in damages.items():
        (folder / f"{name}.json").write_bytes(data)
        with pytest.raises(SealError, match=r"00\d\.json: damaged, not .*computed anew"):
            RunStore(folder).read(name)
    with RunStore.create_or_open(folder, make_config()) as run:
        for name in damages:
            assert run.once(name, lambda: {"a": 2}) == {"a": 2}
        assert run.names() == list(damages)
    for name, data in damages.items():
        assert (folder / f"{name}.json.damaged").read_bytes() == data
    assert [e["unit"] for e in events(folder, "unit_damaged")] == list(damages)


def test_a_unit_that_cannot_be_read_is_not_taken_for_damaged(disk):
    with RunStore.create_or_open(disk, make_config()) as run:
        run.once("unit", lambda: {"a": 1})
        (disk / "unit.json").unlink()
        (disk / "unit.json").mkdir()
        with pytest.raises(SealError, match=r"unit\.json: cannot read: is a directory"):
            run.once("unit", never)


def test_read_and_names(folder):
    with RunStore.create_or_open(folder, make_config()) as run:
        for name in ("table", "rounds/10/e_step/000", "rounds/2/e_step/1000", "rounds/2/e_step/999", "rounds/2/m_step"):
            run.once(name, lambda name=name: {"name": name})
    (folder / "policy/2").mkdir(parents=True)
    (folder / "policy/2/manifest.json").write_bytes(b"{}")
    reader = RunStore(folder)
    assert reader.names() == ["rounds/2/e_step/999", "rounds/2/e_step/1000", "rounds/2/m_step", "rounds/10/e_step/000", "table"]
    assert reader.names("rounds/2/e_step/") == ["rounds/2/e_step/999", "rounds/2/e_step/1000"]
    assert reader.names("rounds/1") == ["rounds/10/e_step/000"]
    assert reader.names("evaluate/") == []
    assert reader.read("rounds/2/m_step") == {"name": "rounds/2/m_step"}
    with pytest.raises(SealError, match=r"rounds/3/m_step\.json: no such file"):
        reader.read("rounds/3/m_step")
    for bad in ("../config", "/etc/x", "a//b", "", ".hidden", "a/.b", "versions", "a b"):
        with pytest.raises(ValueError, match="not the name of a unit"):
            reader.read(bad)


def test_another_config_is_refused_with_the_first_key_and_both_values(folder):
    with RunStore.create_or_open(folder, make_config()) as run:
        run.once("evaluate/before/000", lambda: {})
    other = make_config(rest_em={"edits": 7}, fit={"lora": {"rank": 16, "targets": ["q_proj"]}})
    with pytest.raises(SealError, match=r"runs/test: holds a run with fit\.lora\.rank=32, the config has fit\.lora\.rank=16; continue"):
        RunStore.create_or_open(folder, other)
    assert config_lib.load(folder / "config.yaml") == make_config()
    RunStore.create_or_open(folder, make_config()).close()  # the refusal has unlocked the folder


def test_a_run_without_results_may_change_its_config(folder):
    RunStore.create_or_open(folder, make_config()).close()
    other = make_config(task={"name": "knowledge", "train": "right.json"}, fit={"epochs": 3})
    RunStore.create_or_open(folder, other).close()
    assert config_lib.load(folder / "config.yaml") == other
    assert events(folder, "config_changed")[0]["changes"]["task.train"] == ["fictional", "right.json"]


def test_keys_that_cannot_change_results_may_differ(folder):
    with RunStore.create_or_open(folder, make_config()) as run:
        run.once("evaluate/before/000", lambda: {})
    other = make_config(name="renamed", grade={"retries": 9}, fit={"slots": 8})
    RunStore.create_or_open(folder, other).close()
    assert config_lib.load(folder / "config.yaml") == other
    changes = events(folder, "config_changed")[0]["changes"]
    assert changes["fit.slots"] == [None, 8]
    assert changes.keys() == {"name", "run_dir", "grade.retries", "fit.slots"}


def test_free_keys_are_keys(folder):
    known = store._flatten(config_lib.to_dict(make_config()))
    for free in store.FREE_KEYS:
        assert any(store.fnmatch.fnmatch(key, free) for key in known), free


def test_other_versions_are_noted(folder):
    RunStore.create_or_open(folder, make_config()).close()
    assert not events(folder, "versions_changed")
    data = json.loads((folder / "versions.json").read_text())
    (folder / "versions.json").write_bytes(json.dumps({**data, "jax": "0.1"}).encode())
    RunStore.create_or_open(folder, make_config()).close()
    assert events(folder, "versions_changed")[0]["changes"] == {"jax": ["0.1", data["jax"]]}
    (folder / "versions.json").write_bytes(json.dumps({key: data[key] for key in data if key != "auto_dtype"}).encode())
    RunStore.create_or_open(folder, make_config()).close()
    assert len(events(folder, "versions_changed")) == 1, "what an earlier version did not write down has not changed"


def test_a_folder_that_is_no_run_stays_as_it_is(anywhere):
    (anywhere / "notes.txt").write_bytes(b"mine")
    (anywhere / "config.yaml").write_bytes(b"name: of another program")
    with pytest.raises(SealError, match=r"not empty and not a run \(it holds 'config\.yaml'\); choose another run_dir"):
        RunStore.create_or_open(anywhere, make_config())
    assert listed(anywhere) == ["config.yaml", "notes.txt"]
    with pytest.raises(SealError, match=r"notes\.txt: cannot be a run folder: not a directory"):
        RunStore.create_or_open(anywhere / "notes.txt", make_config())


def test_a_run_killed_while_it_was_made(folder, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(config_lib, "to_yaml", die)
        with pytest.raises(KeyboardInterrupt):
            RunStore.create_or_open(folder, make_config())
    (folder / ".config.yaml.123.tmp").write_bytes(b"na")
    assert set(listed(folder)) - {"lock"} == {".config.yaml.123.tmp", "versions.json"}  # a lease is given back, a lock's file stays
    with RunStore.create_or_open(folder, make_config()) as run:
        assert run.once("unit", lambda: {"a": 1}) == {"a": 1}
    assert not [name for name in listed(folder) if name.startswith(".")], "what a killed process left is removed"
    assert next(e["event"] for e in read_events(folder / "events.jsonl")) == "created"


def test_config_is_damaged(folder):
    RunStore.create_or_open(folder, make_config()).close()
    (folder / "config.yaml").write_bytes(b"task: [")
    with pytest.raises(SealError, match=r"config\.yaml: not readable as YAML"):
        RunStore.create_or_open(folder, make_config())


HOLD = """
import sys, fcntl
file = open(sys.argv[1], "r+")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_one_process_at_a_time(folder):
    with RunStore.create_or_open(folder, make_config()):
        assert lock.in_use(folder)
        with pytest.raises(SealError, match=rf"in use by another process \(process {os.getpid()} on .*\); wait for its end"):
            RunStore.create_or_open(folder, make_config())
    assert not lock.in_use(folder)


def test_the_kernel_unlocks_what_a_killed_process_held(disk):
    RunStore.create_or_open(disk, make_config()).close()
    child = subprocess.Popen([sys.executable, "-c", HOLD, disk / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"held\n"
    assert lock.in_use(disk)
    with pytest.raises(SealError, match="in use by another process"):
        RunStore.create_or_open(disk, make_config())
    child.kill()
    RunStore.create_or_open(disk, make_config()).close()  # SIGKILL unlocks; the store waits a moment for it
    child.communicate()


def test_a_file_system_without_locks(disk, monkeypatch):
    def flock(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    with RunStore.create_or_open(disk, make_config()) as run:
        run.once("unit", lambda: {})
    assert events(disk, "unlocked")


def test_full_disk_loses_nothing(disk):
    with pytest.raises(SealError), RunStore.create_or_open(disk, make_config()) as run:
        run.once("a", lambda: {"n": 1})
        os.symlink("/dev/full", disk / f".b.json.{os.getpid()}.tmp")
        run.once("b", lambda: {"n": 2})
    assert "b.json: cannot write: no space left on device" in events(disk, "stopped")[0]["error"]
    with RunStore.create_or_open(disk, make_config()) as run:
        assert run.once("a", never) == {"n": 1}
        assert run.once("b", lambda: {"n": 2}) == {"n": 2}


def test_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SealError, match="not a directory"):
        RunStore.create_or_open(tmp_path / "file" / "run", make_config())


def test_warnings_of_the_package_go_to_the_log(folder):
    with RunStore.create_or_open(folder, make_config()):
        logging.getLogger("seal_jax.tasks").warning("%d items skipped", 3)
    logging.getLogger("seal_jax.tasks").warning("after the end")
    assert [e["message"] for e in events(folder, "warning")] == ["3 items skipped"]


def test_read_only_store_does_not_write(folder):
    RunStore.create_or_open(folder, make_config()).close()
    with pytest.raises(AssertionError):
        RunStore(folder).log("x")


def test_a_unit_is_waited_for_while_the_next_is_computed(folder):
    said = []

    def compute(name):
        said.append(f"compute {name}")
        if name == "plain":
            return {"unit": name}

        def wait():
            said.append(f"wait {name}")
            return {"unit": name}

        return wait

    names = ["a", "b", "plain", "c"]
    with RunStore.create_or_open(folder, make_config()) as run:
        run.keep("b", {"unit": "b"}, 0.0)
        assert run.each(names, compute) == [{"unit": name} for name in names]
        assert said == ["compute a", "compute plain", "wait a", "compute c", "wait c"]
        assert run.each(names, lambda name: never()) == [{"unit": name} for name in names]


def test_what_a_unit_waits_for_is_kept_when_the_next_one_fails(folder):
    def compute(name):
        if name == "b":
            raise SealError("no room")
        return lambda: {"unit": name}

    with RunStore.create_or_open(folder, make_config()) as run:
        with pytest.raises(SealError, match="no room"):
            run.each(["a", "b"], compute)
        assert run.read("a") == {"unit": "a"} and not run.has("b")


# A run of 12 units, each computed from the one before. The kernel ends children at another moment of their processor time each, so that a
# busy machine changes nothing, until one comes to the end.
KILL = """
import hashlib, os, pathlib, random, signal, sys
from seal_jax import config
from seal_jax.parallel import processes
from seal_jax.runs import lock, store
# No accelerator in forked children, and no JAX, whose import would outlive most of them.
store.versions, processes.first, processes.share = dict, lambda: True, lambda value: value
folder, made = pathlib.Path(sys.argv[1]), config.build({"name": "test", "task": {"name": "knowledge"}})

def work():
    with store.RunStore.create_or_open(folder, made) as run:
        last = "start"
        for i in range(12):
            last = run.once(f"rounds/1/e_step/{i:03d}", lambda: {"digest": hashlib.sha256(last.encode()).hexdigest() * 20000})["digest"]

draw, killed = random.Random(0), 0
while True:
    child = os.fork()
    moment = 0.004 * (1 + killed * draw.random())
    if child == 0:
        signal.setitimer(signal.ITIMER_PROF, moment)  # its signal has no handler, and ends as SIGKILL does
        work()
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
    killed += 1
print(killed)
"""


def test_killed_and_continued_equals_unbroken(tmp_path):
    out = subprocess.run([sys.executable, "-c", KILL, tmp_path / "killed"], capture_output=True, text=True, timeout=60, check=False)
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) >= 5, "too few kills to show anything"
    broken = RunStore(tmp_path / "killed")
    assert len(events(tmp_path / "killed", "created", "opened")) >= 3, "killed before the work began: the test shows nothing"
    with RunStore.create_or_open(tmp_path / "unbroken", make_config()) as run:
        last = "start"
        for i in range(12):
            digest = hashlib.sha256(last.encode()).hexdigest() * 20000
            last = run.once(f"rounds/1/e_step/{i:03d}", lambda digest=digest: {"digest": digest})["digest"]
    assert broken.names() == run.names()
    for name in run.names():
        assert (tmp_path / "killed" / f"{name}.json").read_bytes() == (tmp_path / "unbroken" / f"{name}.json").read_bytes()
    assert len(events(tmp_path / "killed", "unit_damaged")) == 0
    assert not list((tmp_path / "killed").rglob("*.tmp"))
    assert yaml.safe_load((tmp_path / "killed" / "config.yaml").read_text())["name"] == "test"
