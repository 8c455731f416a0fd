"""The devices that a program can be compiled for: TPUs and GPUs by name, which need not be there, or those of this process."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax

from seal_jax.errors import SealError
from seal_jax.fit import memory
from seal_jax.parallel import chips
from seal_jax.parallel import mesh as mesh_lib

# libtpu's environment where there is no TPU: what it would otherwise ask a metadata server for, or complain that it did not get.
COMPILER = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # the lock is for the chips, of which none is used: several plans may be made at once
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
# Of a GPU's memory: what JAX takes unless XLA_CLIENT_MEM_FRACTION says otherwise (docs.jax.dev, "GPU memory allocation").
PREALLOCATED = 0.75


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices to plan for. A device is a chip, or one of the `per_chip` parts that JAX sees of it; the figures are one device's."""

    name: str
    devices: tuple[Any, ...]
    per_chip: int
    memory: float  # bytes
    limit: float  # bytes of them that programs may take
    flops: float | None  # bf16 FLOP/s; None: unknown
    bandwidth: float | None  # bytes/s
    links: float | None  # bytes/s sent


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA's compiler asks of a GPU that is not there."""

    kind: str  # as JAX calls the device
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    ghz: float
    l2: int  # bytes
    units: int = 128  # float32 units of a core
    shared: int = 228  # KiB of a core's shared memory, of which one KiB is the system's


# Sources: NVIDIA's architecture white papers (A100, H100) and data sheets; shared memory and units of a core by compute capability from the
# CUDA programming guide, "Compute Capabilities".
GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 1.41, 40 << 20, 64, 164),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98, 50 << 20),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 1.98, 50 << 20),
}
KNOWN = ", ".join(("v5e:2x4", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1", *GPUS, "h200:8"))


def named(name: str) -> Target:
    """The TPU topology `name`, say "v5p:2x2x4", or GPUs of one machine, say "h200" or "h200:8".

    Raises `SealError` if there is none of that name, or no compiler for it.
    """
    if gpu := re.fullmatch(rf"({'|'.join(GPUS)})(?::([1-9]\d*))?", name):
        return _gpus(name, gpu[1], int(gpu[2] or 1))
    if re.match(r"v\d|tpu", name):
        return _tpus(name)
    raise SealError(f"--topology {name}: neither a TPU nor a GPU of those known, say {KNOWN}")


def _tpus(name: str) -> Target:
    if importlib.util.find_spec("libtpu") is None:
        raise SealError('compiling for TPUs needs the package libtpu: pip install "seal_jax[tpu]"; or --devices cpu')
    for key, value in COMPILER.items():
        os.environ.setdefault(key, value)
    devices = _described(name, platform="tpu")
    chip = chips.TPUS.get(devices[0].device_kind)
    if chip is None:
        known = ", ".join(c.name for c in chips.TPUS.values())
        raise SealError(f"--topology {name}: nothing is known of {devices[0].device_kind}; known: {known}")
    parts = chips.per_chip(devices)
    share = chip.memory / parts
    return Target(name, devices, parts, share, memory.SHARE * share, chip.flops / parts, chip.bandwidth / parts, chip.links / parts)


def _gpus(name: str, which: str, count: int) -> Target:
    found = [x for x in ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12") if _installed(x)]
    if not found:
        raise SealError('compiling for GPUs needs JAX\'s plugin for CUDA: pip install "seal_jax[plan-gpu]"')
    chip = chips.GPUS[GPUS[which].kind]
    # The plugin refuses to load where it finds no cuDNN, of which compiling has no need. (JAX loads it at its first question for devices.)
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    devices = _described(name, platform="cuda", topology=f"1x1x{count}", target_config=description(which))
    share = os.environ.get("XLA_CLIENT_MEM_FRACTION") or os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or PREALLOCATED
    limit = memory.SHARE * float(share) * chip.memory
    return Target(name, devices, 1, chip.memory, limit, chip.flops, chip.bandwidth, chip.links)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package above it
        return False


def _described(name: str, **description: str) -> tuple[Any, ...]:
    from jax.experimental import topologies

    try:
        return tuple(topologies.get_topology_desc(name, **description).devices)
    except Exception as error:  # jaxlib's, of several kinds
        said = " ".join(str(error).split())[:200]
        raise SealError(f"--topology {name}: {said}; known are, say, {KNOWN}") from None


def description(which: str) -> str:
    """The GPU `which` as XLA's compiler takes it (a GpuTargetConfigProto, as text)."""
    gpu = GPUS[which]
    chip, (major, minor) = chips.GPUS[gpu.kind], gpu.capability
    return f"""
        platform_name: "CUDA"
        device_description_str: "{gpu.kind}"
        dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          core_count: {gpu.cores}
          clock_rate_ghz: {gpu.ghz}
          fpus_per_core: {gpu.units}
          memory_bandwidth: {int(chip.bandwidth)}
          device_memory_size: {int(chip.memory)}
          l2_cache_size: {gpu.l2}
          shared_memory_per_core: {gpu.shared << 10}
          shared_memory_per_block_optin: {gpu.shared - 1 << 10}
          shared_memory_per_block: {48 << 10}
          registers_per_core_limit: {64 << 10}
          registers_per_block_limit: {64 << 10}
          threads_per_core_limit: 2048
          threads_per_block_limit: 1024
          threads_per_warp: 32
          block_dim_limit_x: {2**31 - 1}
          block_dim_limit_y: {2**16 - 1}
          block_dim_limit_z: {2**16 - 1}
        }}"""


def here() -> Target:
    """The devices of this process, of whose speed nothing is known."""
    devices = tuple(jax.devices())
    limit = memory.device_limit(mesh_lib.single())
    return Target(devices[0].device_kind, devices, 1, limit, limit, None, None, None)
