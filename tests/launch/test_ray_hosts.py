"""The driver on a Ray cluster's head, with a stand-in for Ray whose actors are objects of this process, each in a folder of its own."""

import importlib.util
import os
import pathlib
import sys
import types

import pytest

ROOT = pathlib.Path(__file__).parents[2]

# Stands in for seal-jax: the process that is told number 1 goes on with what it finds, and fails if asked to.
SEAL = """
import os, pathlib, sys
if os.environ["JAX_PROCESS_ID"] == "1":
    path = pathlib.Path("runs/squad/events.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + " ".join(sys.argv[1:]) + os.environ["HF_TOKEN"] + "\\n")
    sys.exit(int(os.environ.get("CODE", "0")))
"""


class Context:
    """The node is the folder in which one works."""

    def get_node_id(self):
        return os.getcwd()


@pytest.fixture
def module(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("ray_hosts", ROOT / "launch" / "ray_hosts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.POLL = 0.02

    class Host(module.Host):
        """A host: its methods run in its own folder, and it knows its own seal-jax."""

        def __getattribute__(self, name):
            found = super().__getattribute__(name)
            return types.SimpleNamespace(remote=lambda *given: self.inside(found, given)) if callable(found) and name != "inside" else found

        def inside(self, method, given):
            before = os.getcwd()
            os.chdir(self.root)
            try:
                return method(*given)
            finally:
                os.chdir(before)

    def place(kind, amount, count, folder):
        placed.append((kind, amount, count))
        made = []
        for number in range(count):
            root = tmp_path / f"host{number}"
            (root / "seal_jax").mkdir(parents=True, exist_ok=True)
            (root / "seal_jax" / "__init__.py").touch()
            (root / "seal_jax" / "cli.py").write_text(SEAL)
            before = os.getcwd()
            host = Host(str(root), folder)
            os.chdir(before)
            host.root = root
            made.append(host)
        return made

    placed = module.placed = []
    monkeypatch.setattr(module, "place", place)
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(get=lambda given: given, get_runtime_context=lambda: Context()))
    head = tmp_path / "head"
    head.mkdir()
    monkeypatch.chdir(head)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (head / "keys").write_text("# mine\nHF_TOKEN=abc=\n\n")
    return module


def test_the_run_folder_goes_to_all_hosts_and_comes_back_from_the_one_that_wrote(module):
    asked = ["--hosts", "2", "--resource", "GPU=8", "--folder", "runs/squad", "--env-file", "keys", "--", "train", "squad.yaml"]
    assert module.main(asked) == 0 and module.placed == [("GPU", 8, 2)]
    found = pathlib.Path("runs/squad/events.jsonl")
    assert found.read_text() == "train squad.yamlabc=\n"
    assert module.main(asked) == 0
    assert found.read_text() == "train squad.yamlabc=\n" * 2, "the second goes on with the first"


def test_a_failed_process_ends_the_run_with_its_code_and_its_results(module, monkeypatch):
    monkeypatch.setenv("CODE", "2")
    asked = ["--hosts", "2", "--resource", "GPU=8", "--folder", "runs/squad", "--env-file", "keys", "--", "train", "squad.yaml"]
    assert module.main(asked) == 2
    assert pathlib.Path("runs/squad/events.jsonl").exists()


def test_a_host_that_is_the_head_has_written_there_already(module, monkeypatch):
    """Nothing older is put over what grows."""
    monkeypatch.setattr(module.Host, "node", lambda self: str(pathlib.Path("../head").resolve()))
    asked = ["--hosts", "2", "--resource", "GPU=8", "--folder", "runs/squad", "--env-file", "keys", "--", "train", "squad.yaml"]
    assert module.main(asked) == 0 and not pathlib.Path("runs").exists()


def test_a_copy_that_fails_does_not_end_the_run(module, monkeypatch, capsys):
    module.SYNC, calls = 0, []

    def results(self):
        calls.append(1)
        if len(calls) == 1:
            raise OSError("gone\nfor now")

    monkeypatch.setattr(module.Host, "results", results)
    monkeypatch.setattr(module.Host, "status", lambda self: 0 if calls else None)
    asked = ["--hosts", "1", "--resource", "TPU=4", "--folder", "runs/squad", "--", "train", "squad.yaml"]
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    assert module.main(asked) == 0 and len(calls) == 2
    assert "this copy of the results failed (gone for now); the next may not" in capsys.readouterr().err


def test_files_that_go_while_a_folder_is_read_are_no_fault(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a.json").write_text("{}")
    monkeypatch.setattr(module, "there", lambda folder: [pathlib.Path("runs/gone.json"), pathlib.Path("runs/a.json")])
    host = module.Host(str(tmp_path), "runs")
    host.started = 0.0
    with module.tarfile.open(fileobj=module.io.BytesIO(host.results())) as opened:
        assert opened.getnames() == ["runs/a.json"]


def test_what_hosts_are_told_of_each_other(module):
    assert module.environments("TPU", "a:1", 4) == [{}] * 4, "JAX asks the TPU's own environment"
    assert module.environments("GPU", "a:1", 1) == [{}]
    assert module.environments("GPU", "a:1", 2)[1] == {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    host, port = module.Host(os.getcwd(), "runs/x").address().split(":")
    assert host.count(".") == 3 and 1024 < int(port) < 65536


def test_archives_have_units_first_and_nothing_unfinished(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("policy/1/.zarray", "policy/1/data", "policy/.2.new/data", "rounds/1/m_step.json", ".a.json.7.tmp", "events.jsonl"):
        path = tmp_path / "runs" / "squad" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    archive = module.pack("runs/squad")
    with module.tarfile.open(fileobj=module.io.BytesIO(archive)) as opened:
        names = opened.getnames()
    assert names[0] == "runs/squad/rounds/1/m_step.json"
    assert set(names) == {f"runs/squad/{name}" for name in ("policy/1/.zarray", "policy/1/data", "rounds/1/m_step.json", "events.jsonl")}
