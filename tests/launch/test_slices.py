"""The shapes of slices as Google's tools name them (launch/slices.sh)."""

import shutil

import pytest
import yaml

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")

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
