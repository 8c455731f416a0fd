"""A launch from its beginning to its end, whatever happens between: results are here, and nothing is left behind (launch/common.sh)."""

import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import tarfile
import threading
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")


@pytest.mark.parametrize(
    ("way", "fails", "last"),
    [
        ("tpu_vm", "queued-resources create", "queued-resources delete"),
        ("tpu_vm", "worker=all --command=mkdir", "queued-resources delete"),
        ("tpu_vm", "seal-jax train", "queued-resources delete"),
        ("tpu_vm_direct", "seal-jax train", "tpu-vm delete"),
        ("jobset_pool", "kubectl create", "resource-policies delete"),
        ("xpk", "xargs|touch", "workload delete"),
        ("sky_gpu", "sky launch", "sky down"),
        ("kuberay", "job submit", "delete raycluster"),
        ("launcher", "ray up", "ray down"),
    ],
)
def test_what_was_made_is_deleted_after_an_error(way, fails, last, checkout):
    done = checkout(way, fails=fails)
    assert done.code != 0
    assert last in done.calls[-1]
    assert "the same command goes on with runs/squad" in done.err[-1]
    if "seal-jax" in fails:
        assert (checkout.path / "runs" / "squad" / "config.yaml").exists(), "what there was of results is here"


def test_the_exit_code_of_seal_jax_is_told(checkout):
    done = checkout("jobset", ended="2")
    assert done.code == 2 and "delete jobset" in done.calls[-1]


def test_what_cannot_be_deleted_or_copied_is_told(checkout):
    done = checkout("tpu_vm", fails="queued-resources delete|scp squad:run.tgz")
    assert done.code == 1
    assert any("NOT DELETED" in line for line in done.err) and any("could not be copied back" in line for line in done.err)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_an_interruption_brings_results_back_and_deletes(sent, checkout):
    """While seal-jax runs, results are copied back (a stand-in makes seven minutes short); the signal then ends it."""
    sleep = checkout.tools / "sleep"
    sleep.write_text(f'#!/bin/sh\n[ "$1" = 420 ] && set -- 0.2\nexec {shutil.which("sleep")} "$1"\n')
    sleep.chmod(0o755)
    process = checkout.start("tpu_vm", "--sync", "7", hangs="seal-jax train")
    for _ in range(500):
        if sum("scp squad:run.tgz" in call for call in checkout.calls()) >= 2:
            break
        time.sleep(0.02)
    assert sum("scp squad:run.tgz" in call for call in checkout.calls()) >= 2 and not any("delete" in call for call in checkout.calls())
    process.send_signal(sent)
    started = time.monotonic()
    done = checkout.end(process)
    assert time.monotonic() - started < 20, "it does not wait for the command to end"
    assert done.code == 128 + sent
    assert "scp squad:run.tgz" in done.calls[-2] and "queued-resources delete" in done.calls[-1]
    assert (checkout.path / "runs" / "squad" / "config.yaml").exists()


def test_what_exists_already_is_neither_used_nor_deleted(checkout):
    for way, thing in [("tpu_vm", "queued resource"), ("jobset", "JobSet"), ("sky_gpu", "cluster"), ("kuberay", "RayCluster")]:
        done = checkout(way, there=0)
        assert done.code == 2 and f"the {thing} squad exists already" in done.err[-1]
        assert not any(word in call for call in done.calls for word in ("delete", "down", "create squad"))


def test_what_cannot_be_looked_at_is_neither_made_nor_deleted(checkout):
    """It may be somebody else's, who has a machine of that name."""
    for way in ("tpu_vm", "tpu_vm_direct", "jobset", "sky_gpu", "kuberay", "launcher"):
        done = checkout(way, absent="ERROR: the server is unavailable")
        assert done.code == 2 and done.err[-1].endswith("squad exists cannot be told: ERROR: the server is unavailable")
        assert not any(word in call for call in done.calls for word in ("delete", "down", "create squad"))


def test_what_somebody_else_has_made_meanwhile_is_not_deleted(checkout):
    for way, said in (
        ("tpu_vm", "ALREADY_EXISTS: squad"),
        ("tpu_vm_direct", "already exists"),
        ("jobset", "Error (AlreadyExists): jobset"),
    ):
        done = checkout(way, created=said)
        assert done.code == 2 and said in done.err and "it exists already" in "".join(done.err)
        assert not any("delete" in call for call in done.calls)


def test_of_what_was_made_before_that_all_is_deleted(checkout):
    """A pool that has somebody else's name is theirs; the policy that was made for it is not."""
    done = checkout("jobset_pool", created="already exists", which="node-pools create")
    assert done.code == 2 and not any("node-pools delete" in call for call in done.calls)
    assert any("resource-policies create" in call for call in done.calls) and "resource-policies delete" in done.calls[-1]


def there(checkout, way, part, *flags):
    """The line of shell that a dry run would have a machine run."""
    line = next(line for line in checkout(way, "--dry-run", *flags).out if part in line)
    return next(word for word in shlex.split(line) if word.startswith("--command=")).removeprefix("--command=")


def test_the_run_folder_is_packed_while_it_grows(checkout, tmp_path):
    """tar says 1 of a file that changes as it is read. What is not finished stays behind, and nothing is left there."""
    run = tmp_path / "there" / "seal_jax" / "runs" / "squad"
    for name in ("policy/1/.zarray", "policy/1/data", "policy/.2.new/data", "rounds/1/m_step.json", ".a.json.7.tmp", "events.jsonl"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    line, ended = there(checkout, "tpu_vm", "transform"), threading.Event()

    def grow():
        with open(run / "events.jsonl", "a") as log:
            while not ended.wait(0.002):
                log.write("x" * 1000)
                log.flush()

    thread = threading.Thread(target=grow)
    thread.start()
    try:
        for _ in range(5):
            done = subprocess.run(["bash", "-c", line], cwd=tmp_path / "there", capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
            with tarfile.open(tmp_path / "there" / "run.tgz") as archive:
                names = archive.getnames()
            assert names[0] == "squad/rounds/1/m_step.json"
            assert set(names) == {f"squad/{name}" for name in ("policy/1/.zarray", "policy/1/data", "rounds/1/m_step.json", "events.jsonl")}
    finally:
        ended.set()
        thread.join()
    assert sorted(path.name for path in run.parent.iterdir()) == ["squad"]
    shutil.rmtree(run)
    assert subprocess.run(["bash", "-c", line], cwd=tmp_path / "there", timeout=60).returncode == 0, "no run yet"


def test_the_environment_is_what_the_file_says(checkout, tmp_path):
    keys = tmp_path / "seal.env"
    keys.write_text("# mine\n\nOPENAI_BASE_URL=https://h/v1?a=1&d=x y\nKEY=$HOME'\"#\nLAST=1")
    line = there(checkout, "tpu_vm", "done <../seal.env", "--env-file", str(keys))
    (tmp_path / "seal_jax").mkdir()
    line = line[: line.index(" && .venv")] + " && env"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert {"OPENAI_BASE_URL=https://h/v1?a=1&d=x y", "KEY=$HOME'\"#", "LAST=1"} <= set(done.stdout.splitlines())


def test_a_newer_run_there_is_not_overwritten(checkout, tmp_path):
    (checkout.path / "runs" / "squad").mkdir(parents=True)
    line = there(checkout, "tpu_vm", "[ -d seal_jax/runs", "--reuse")
    home = tmp_path / "there"
    (home / "squad").mkdir(parents=True)
    (home / "squad" / "events.jsonl").write_text("older")
    subprocess.run(["tar", "-czf", "before.tgz", "squad"], cwd=home, check=True)
    for text in ("older", "newer"):  # not there yet; there
        subprocess.run(["bash", "-c", line], cwd=home, check=True, timeout=60)
        log = home / "seal_jax" / "runs" / "squad" / "events.jsonl"
        assert log.read_text() == text
        log.write_text("newer")


def test_a_name_is_not_the_end_of_a_job(checkout):
    """Ray tells of a job by its name."""
    for way in ("kuberay", "launcher"):
        good, bad = re.search(r"until it says (.*), every 30 s; (.*) ends it:", "\n".join(checkout(way, "--dry-run").out)).groups()
        for said, fits in (
            ("Status for job 'retry-failed': RUNNING", (False, False)),
            ("Status for job 'succeeded': PENDING", (False, False)),
            ("Status for job 'a': SUCCEEDED\nJob 'a' succeeded", (True, False)),
            ("Status for job 'a': FAILED\nJob 'a' failed", (False, True)),
            ("Job 'a' was stopped", (False, True)),
        ):
            assert tuple(re.fullmatch(part, said, re.DOTALL) is not None for part in (good, bad)) == fits


@pytest.mark.parametrize(
    ("way", "flags", "fails", "said"),
    [
        ("tpu_vm", [], "auth list", "gcloud has no account; sign in with: gcloud auth login"),
        ("tpu_vm", [], "get-value", "gcloud has no project; give --project, or run: gcloud config set project PROJECT"),
        ("tpu_vm", ["--project", "mine"], "auth list|get-value", "gcloud has no account"),
        ("jobset", [], "auth list", "gcloud has no account"),
        ("jobset_pool", [], "auth list", "gcloud has no account"),
        ("kuberay", [], "get-value", "gcloud has no project"),
    ],
)
def test_without_an_account_or_a_project_nothing_is_begun(way, flags, fails, said, checkout):
    done = checkout(way, *flags, fails=fails)
    assert done.code == 2 and said in done.err[-1]
    assert done.calls and all("auth list" in call or "get-value" in call for call in done.calls)


def test_a_project_that_is_given_is_not_asked_for(checkout):
    done = checkout("tpu_vm_direct", fails="get-value")
    assert done.code == 0 and not any("get-value" in call for call in done.calls)


def packed(checkout):
    assert checkout("tpu_vm").code == 0
    with tarfile.open(checkout.path / "build/launch/squad.source.tgz") as archive:
        return {name.removeprefix("./") for name in archive.getnames()}


def test_what_git_ignores_or_has_lost_is_not_sent(checkout):
    shutil.copy(ROOT / ".gitignore", checkout.path)
    for name in ("data/my passages.json", "sweeps/a/sweep.json", "exported/model.safetensors", "adapter/x", "runs/other/x", "old.txt"):
        (checkout.path / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout.path / name).write_text("x")
    beside = {"launch/tpu_vm.sh", "configs/squad.yaml", "data/my passages.json"}
    names = packed(checkout)
    assert beside | {"old.txt"} <= names, "without git"
    assert not any(name.startswith(("sweeps", "exported", "adapter", "runs", "build")) for name in names)
    git = ["git", "-C", str(checkout.path)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "launch", "old.txt"], check=True)
    (checkout.path / "old.txt").unlink()
    names = packed(checkout)
    assert beside | {".gitignore"} <= names and "old.txt" not in names, "with git: also what it does not know yet"
    assert not any(name.startswith(("sweeps", "exported", "adapter", "runs", "build", ".git/")) for name in names)


def test_kept_machines_are_named_and_reused(checkout):
    done = checkout("tpu_vm", "--keep")
    assert done.code == 0 and not any("delete" in call for call in done.calls)
    assert "gcloud compute tpus queued-resources delete squad --zone=us-east5-b --quiet --force" in done.err
    again = checkout("tpu_vm", "--reuse", there=0)
    assert again.code == 0 and sum("create" in call for call in again.calls) == 1, "not a second time"
    pool = checkout("jobset_pool", "--keep", "--dry-run")
    assert "kubectl delete jobset squad --ignore-not-found" in pool.out and not any("node-pools delete" in line for line in pool.out)
