"""Runs of several processes: started once on each host, the same program everywhere, one mesh over all their devices.

Every process plans the same steps from the same data. What only one may do (write files, ask a grader, print) the first process does,
and tells the others what came of it by `share`.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import sys
import urllib.request
from typing import Any

from seal_jax.errors import SealError
from seal_jax.parallel import peers

# JAX is imported where it is used: the run folder, which imports this module, must not wait for it.

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def start() -> None:
    """Joins the processes of this run, if the environment says that there are several. To be called before JAX is used.

    Either JAX_COORDINATOR_ADDRESS (host:port of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID say so, or a cluster that JAX
    knows by itself: Slurm with several tasks, or the hosts of a TPU slice, be they pods of GKE or TPU VMs. Raises `SealError` if they
    cannot be joined.
    """
    given = [name for name in (ADDRESS, COUNT, NUMBER) if os.environ.get(name)]
    arguments: dict[str, Any] = {}
    if given:
        if missing := [name for name in (ADDRESS, COUNT, NUMBER) if name not in given]:
            raise SealError(f"{given[0]} is set, {missing[0]} is not; a run of several processes needs {ADDRESS}, {COUNT} and {NUMBER}")
        try:
            arguments = {"num_processes": int(os.environ[COUNT]), "process_id": int(os.environ[NUMBER])}
        except ValueError:
            raise SealError(f"{COUNT}={os.environ[COUNT]!r}, {NUMBER}={os.environ[NUMBER]!r}: expected whole numbers") from None
        arguments["coordinator_address"] = os.environ[ADDRESS]
    elif not (int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ) and _tpu_hosts() < 2:
        return
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from `seal_jax.preemption`
    # JAX ends a process with many lines when it misses another's signs of life; `seal_jax.parallel.peers` comes first, with one.
    arguments["heartbeat_timeout_seconds"] = int(2 * peers.timeout()) + 60
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError) as error:
        raise SealError(f"the processes of this run did not find each other: {' '.join(str(error).split())[:300]}") from None


def _tpu_hosts() -> int:
    """How many processes the hosts of this TPU slice run; 0: no slice is known of.

    The names are where JAX looks for them (`jax._src.clusters.cloud_tpu_cluster`): GKE sets variables in each pod, and on TPU VMs, where
    nothing is set, the metadata server knows.
    """
    names = os.environ.get("TPU_PROCESS_ADDRESSES", os.environ.get("TPU_WORKER_HOSTNAMES"))
    if names is None and _has_tpu() and "TPU_SKIP_MDS_QUERY" not in os.environ:
        names = _metadata("worker-network-endpoints")
    return len([host for host in (names or "").split(",") if host])


def _has_tpu() -> bool:
    return any(pathlib.Path("/dev").glob("accel[0-9]*")) or any(pathlib.Path("/dev/vfio").glob("[0-9]*"))


def _metadata(key: str) -> str | None:
    """An attribute of this machine from Google's metadata server; None where there is no such server, or attribute."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    address = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(urllib.request.Request(address, headers={"Metadata-Flavor": "Google"}), timeout=10) as reply:
            return reply.read().decode()
    except (OSError, ValueError):
        return None


def first() -> bool:
    """Whether this process writes and prints."""
    import jax

    return jax.process_index() == 0


def lost(error: Exception) -> bool:
    """Whether `error` is what a computation over several processes says when one of the others is gone."""
    if "jax" not in sys.modules:
        return False
    import jax

    told = re.search(r"Gloo|[Cc]onnection|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED", str(error))
    return isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1 and told is not None


def share(value: Any) -> Any:
    """What the first process has as `value` (JSON data), on every process; all must call it. In a run of one process, `value` itself."""
    import jax
    import numpy as np

    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(value).encode() if first() else b"", np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int64(data.size)))
    held = np.zeros(size, np.uint8)
    held[: data.size] = data
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(held)).astype(np.uint8).tobytes())


def share_tree(tree: Any) -> Any:
    """What the first process has as `tree` (nested dicts of numpy arrays), on every process; the others may have anything."""
    import jax
    import numpy as np

    shapes = share(jax.tree.map(lambda x: [list(x.shape), str(x.dtype)], tree) if first() else None)
    if not first():
        tree = jax.tree.map(lambda x: np.zeros(*x), shapes, is_leaf=lambda x: isinstance(x, list))
    return jax.tree.map(share_arrays, tree)  # one after another: each is on the devices for a moment


def share_arrays(tree: Any) -> Any:
    """What the first process has as `tree` (numpy arrays, or anything of the same shapes elsewhere), on every process."""
    import jax

    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    return jax.device_get(multihost_utils.broadcast_one_to_all(tree))
