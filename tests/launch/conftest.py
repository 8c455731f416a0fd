import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TOOLS = ("gcloud", "kubectl", "xpk", "sky", "ssh", "sbatch", "ray", "docker")
IMAGE = "--image example/seal-jax:1"
CLUSTER = f"--cluster pods --location us-east5 {IMAGE}"
SEAL = ["train", "configs/squad.yaml", "task.directives={learning_rates: [1e-3, 4e-3], epochs: [2]}"]

# Every way, with a slice of several hosts where there are hosts.
WAYS = {
    "tpu_vm": "tpu_vm.sh --tpu v6e:4x4 --zone us-east5-b --spot",
    "tpu_vm_direct": "tpu_vm.sh --tpu v5p:2x2x2 --zone us-east5-a --project mine --direct",
    "jobset": f"gke.sh --tpu v5e:4x4 {CLUSTER}",
    "jobset_pool": f"gke.sh --tpu tpu7x:2x2x2 {CLUSTER} --create-pool --node-zone us-east5-c --spot --project mine",
    "xpk": f"gke.sh --tpu v5p:2x2x4 {CLUSTER} --through xpk --node-zone us-east5-a",
    "sky_tpu": "sky.sh --tpu v6e:4x4 --spot",
    "sky_gpu": "sky.sh --gpus H100:8 --nodes 2",
    "slurm": "slurm.sh --nodes 2 --gpus 8 --time 1:00:00 --partition gpu",
    "kuberay": f"ray.sh --through kuberay --tpu v4:2x2x2 {CLUSTER} --spot",
    "launcher": "ray.sh --through launcher --tpu v6e:4x4 --zone us-east5-b --project mine",
}

# Stands in for every tool: writes down what it is asked, and answers as the tool would where a script reads the answer.
FAKE = r"""#!/usr/bin/env bash
line="${0##*/} $*"
printf '%s\n' "$line" >>"$CALLS"
if [[ $line =~ $FAILS ]]; then exit 3; fi
if [[ $line =~ $HANGS ]]; then exec sleep 60; fi
case $line in
  *'-T -'*) # the results are packed
    case $line in
      kubectl*' > '* | kubectl*/tmp/run.tgz* | gcloud* | ray*) ;;
      *) tar -czf - -C "$RESULTS" . ;;
    esac ;;
  *scp*:run.tgz* | 'kubectl cp '*:/tmp/run.tgz* | *rsync-down*)
    for word in "$@"; do case $word in build/*.run.tgz) tar -czf "$word" -C "$RESULTS" . ;; esac; done ;;
  'gcloud auth list'*) echo me@example.com ;;
  'gcloud config get-value project'*) echo mine ;;
  *state.state*) echo ACTIVE ;;
  *replicatedJobsStatus*) echo 1/0 ;;
  *status.state*) echo ready ;;
  *items*) echo pod-0 ;;
  *'get pods'*) echo pod/pod-0; echo pod/pod-1 ;;
  *ended*) echo "$ENDED" ;;
  *'job status'*) printf "Status for job 'squad': SUCCEEDED\nJob 'squad' succeeded\n" ;;
  *' describe '* | *' get jobset '* | *' get raycluster '* | *' get secret '* | *get-head-ip* | 'sky status'*)
    [ "$THERE" = 0 ] || echo "${ABSENT-NOT_FOUND: there is no such thing}" >&2
    exit "$THERE" ;;
  *' create '*) [[ -z $CREATED || ! $line =~ $WHICH ]] || { echo "$CREATED" >&2; exit 1; } ;;
esac
"""


@dataclasses.dataclass
class Done:
    code: int
    out: list[str]
    err: list[str]
    calls: list[str]


@pytest.fixture
def checkout(tmp_path):
    """What a launcher needs of the checkout, and stand-ins for all tools; `checkout(way, flags...)` runs one."""
    home, stand_ins = tmp_path / "checkout", tmp_path / "tools"
    shutil.copytree(ROOT / "launch", home / "launch")
    (home / "configs").mkdir()
    shutil.copy(ROOT / "configs" / "squad.yaml", home / "configs")
    stand_ins.mkdir()
    for name in TOOLS:
        (stand_ins / name).write_text(FAKE)
        (stand_ins / name).chmod(0o755)
    (tmp_path / "results" / "squad").mkdir(parents=True)
    (tmp_path / "results" / "squad" / "config.yaml").write_text("from there")
    environment = {
        **os.environ,
        "PATH": f"{stand_ins}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "CALLS": str(tmp_path / "calls"),
        "RESULTS": str(tmp_path / "results"),
    }

    class Checkout:
        path, tools, seal = home, stand_ins, SEAL

        @staticmethod
        def start(way, *flags, seal=SEAL, fails="^$", hangs="^$", there=1, ended="0", absent="NOT_FOUND", created="", which="create"):
            script, *given = WAYS.get(way, way).split()
            command = [home / "launch" / script, *given, "--name", "squad", *flags, "--", *seal]
            more = {
                "FAILS": fails,
                "HANGS": hangs,
                "THERE": str(there),
                "ENDED": ended,
                "ABSENT": absent,
                "CREATED": created,
                "WHICH": which,
            }
            return subprocess.Popen(command, env=environment | more, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

        @staticmethod
        def calls():
            file = tmp_path / "calls"
            return file.read_text().splitlines() if file.exists() else []

        def end(self, process):
            out, err = process.communicate(timeout=60)
            return Done(process.returncode, out.splitlines(), err.splitlines(), self.calls())

        @staticmethod
        def documents(lines):
            """The texts between <<'END' and END in what a dry run printed."""
            return re.findall(r"<<'END'\n(.*?)\nEND$", "\n".join(lines), re.MULTILINE | re.DOTALL)

        def __call__(self, way, *flags, **more):
            return self.end(self.start(way, *flags, **more))

    return Checkout()
