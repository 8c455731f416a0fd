"""Runs one seal-jax command on the hosts of a Ray cluster: started on its head, one process a host, all results on the head.

    python launch/ray_hosts.py --hosts 4 --resource TPU=4 --folder runs/squad -- train configs/squad.yaml run_dir=runs/squad

Hosts of a TPU slice find each other by themselves (`seal_jax.parallel.processes`); hosts with GPUs are told by JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID. Ray numbers hosts as it likes, so any host may be the one that writes the run folder: an earlier one
is taken to all, and it comes back from the one where it grew. One in a bucket (gs://, s3://) is there for all.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pathlib
import socket
import subprocess
import sys
import tarfile
import time
from typing import Any

POLL, SYNC = 10, 300  # seconds


class Host:
    """What runs on a host, as an actor of Ray, in the root of an installed checkout."""

    def __init__(self, root: str, folder: str):
        os.chdir(root)
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    def address(self) -> str:
        """host:port for a coordinator here."""
        with socket.socket() as free:
            free.bind(("", 0))
            return f"{socket.gethostbyname(socket.gethostname())}:{free.getsockname()[1]}"

    def start(self, arguments: list[str], environment: dict[str, str], before: bytes | None) -> None:
        """Starts seal-jax, from the run folder in the archive `before` if there is one."""
        if before is not None:
            unpack(before)
        self.started = time.time()
        self.process = subprocess.Popen([sys.executable, "-m", "seal_jax.cli", *arguments], env={**os.environ, **environment})

    def status(self) -> int | None:
        """The exit code of seal-jax here; None: it runs."""
        assert self.process is not None
        return self.process.poll()

    def results(self) -> bytes | None:
        """The run folder as an archive; None if nothing was written here."""
        for path in there(self.folder):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime >= self.started:
                    return pack(self.folder)
        return None

    def node(self) -> str:
        """The machine, as Ray names it."""
        import ray

        return ray.get_runtime_context().get_node_id()


def there(folder: str) -> list[pathlib.Path]:
    """The files in `folder`, as far as they do not come and go meanwhile."""
    return [pathlib.Path(parent) / name for parent, _, names in os.walk(folder) for name in names]


def pack(folder: str) -> bytes:
    """`folder` as an archive. Units (*.json) first, then the checkpoints that they speak of; files that are not finished stay behind."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz", compresslevel=1) as archive:
        found = [path for path in there(folder) if not path.match(".*.tmp") and ".new" not in "".join(hidden(path))]
        for path in sorted(found, key=lambda path: path.suffix != ".json"):
            with contextlib.suppress(FileNotFoundError):  # replaced meanwhile
                archive.add(path, recursive=False)
    return data.getvalue()


def hidden(path: pathlib.Path) -> list[str]:
    return [part for part in path.parts if part.startswith(".")]


def unpack(archive: bytes) -> None:
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        opened.extractall(".", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # Python 3.11.4 and newer


def environments(kind: str, address: str, hosts: int) -> list[dict[str, str]]:
    """What each host's process is told of the others; `kind` is the resource, TPU or GPU."""
    if kind == "TPU" or hosts == 1:
        return [{} for _ in range(hosts)]
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(hosts)}
    return [{**shared, "JAX_PROCESS_ID": str(number)} for number in range(hosts)]


def variables(text: str) -> dict[str, str]:
    """KEY=VALUE lines; blank ones and comments are skipped."""
    lines = [line.strip() for line in text.splitlines()]
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def place(kind: str, amount: int, count: int, folder: str) -> list[Any]:
    """A `Host` on each of `count` machines with `amount` of `kind`; waits until there are as many."""
    import ray
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    ray.init(address="auto")
    group = placement_group([{kind: amount}] * count, strategy="STRICT_SPREAD")
    ray.get(group.ready())
    resources = {"num_gpus": amount} if kind == "GPU" else {"resources": {kind: amount}}
    actor = ray.remote(Host)
    return [
        actor.options(
            num_cpus=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=number),
            **resources,
        ).remote(os.getcwd(), folder)
        for number in range(count)
    ]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, required=True)
    parser.add_argument("--resource", required=True, help="what a host has, say TPU=4 or GPU=8")
    parser.add_argument("--folder", required=True, help="the run folder")
    parser.add_argument("--env-file", help="KEY=VALUE lines for the environment of seal-jax")
    parser.add_argument("arguments", nargs="+", help="of seal-jax, after --")
    given = parser.parse_args(argv)
    kind, amount = given.resource.split("=")
    more = variables(pathlib.Path(given.env_file).read_text(encoding="utf-8")) if given.env_file else {}
    before = pack(given.folder) if pathlib.Path(given.folder).is_dir() else None  # not of a bucket, of which nothing is here

    hosts = place(kind, int(amount), given.hosts, given.folder)
    import ray

    told = environments(kind, ray.get(hosts[0].address.remote()), given.hosts)
    ray.get([host.start.remote(given.arguments, {**more, **own}, before) for host, own in zip(hosts, told, strict=True)])

    own, nodes = ray.get_runtime_context().get_node_id(), ray.get([host.node.remote() for host in hosts])

    def fetch() -> None:
        """From the other machines: a host that is this one has written here."""
        for archive in ray.get([host.results.remote() for host, node in zip(hosts, nodes, strict=True) if node != own]):
            if archive is not None:
                unpack(archive)

    fetched = time.monotonic()
    while True:
        codes = ray.get([host.status.remote() for host in hosts])
        # A process that failed is waited for by the others: none of them will end well.
        if all(code is not None for code in codes) or any(codes):
            fetch()
            return max((abs(code) for code in codes if code is not None), default=0)
        if time.monotonic() - fetched >= SYNC:
            try:
                fetch()
            except Exception as error:  # of a host, as Ray raises it
                print(f"this copy of the results failed ({' '.join(str(error).split())[:200]}); the next may not", file=sys.stderr)
            fetched = time.monotonic()
        time.sleep(POLL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
