"""Published figures of accelerators, by the kind that JAX gives their devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

GIB = float(2**30)


@dataclasses.dataclass(frozen=True)
class Chip:
    """Of one chip: dense bf16 FLOP/s, bytes/s and bytes of its memory, and bytes/s out of it over its links to others, if looked up."""

    name: str
    flops: float
    bandwidth: float
    memory: float
    links: float | None = None


# Sources: Google Cloud's pages on each TPU, tables of key specifications. Of the interconnect they give both directions together
# (400, 1200, 800 and 1200 GBps), of which half goes out.
TPUS = {
    "TPU v5 lite": Chip("v5e", 197e12, 819e9, 16 * GIB, 200e9),  # cloud.google.com/tpu/docs/v5e: 197 TFLOPs, 16 GB, 819 GBps
    "TPU v5": Chip("v5p", 459e12, 2765e9, 95 * GIB, 600e9),  # cloud.google.com/tpu/docs/v5p: 459 TFLOPs, 95 GB, 2765 GBps
    "TPU v6 lite": Chip("v6e", 918e12, 1638e9, 32 * GIB, 400e9),  # cloud.google.com/tpu/docs/v6e: 918 TFLOPs, 32 GB, 1638 GBps
    "TPU7x": Chip("tpu7x", 2307e12, 7380e9, 192 * GIB, 600e9),  # cloud.google.com/tpu/docs/tpu7x: 2307 TFLOPs, 192 GiB, 7380 GBps
}
# Sources: NVIDIA's data sheets; where they give operations with sparsity, half of that. Of NVLink (PCIe for the L4) they give both
# directions together, of which half goes out.
GPUS = {
    "NVIDIA A100-SXM4-40GB": Chip("A100-40GB", 312e12, 1555e9, 40e9, 300e9),
    "NVIDIA A100-SXM4-80GB": Chip("A100", 312e12, 2039e9, 80e9, 300e9),
    "NVIDIA H100 80GB HBM3": Chip("H100", 989e12, 3350e9, 80e9, 450e9),
    "NVIDIA H100 PCIe": Chip("H100 PCIe", 756e12, 2000e9, 80e9, 300e9),
    "NVIDIA H200": Chip("H200", 989e12, 4800e9, 141e9, 450e9),
    "NVIDIA L4": Chip("L4", 121e12, 300e9, 24e9, 32e9),
}


def per_chip(devices: Iterable[Any]) -> int:
    """How many of JAX's devices are parts of one chip: those of one place in the topology. Elsewhere than on TPUs, 1."""
    places = [tuple(device.coords) for device in devices if hasattr(device, "coords")]
    return len(places) // len(set(places)) if places else 1


def peak(devices: Iterable[Any]) -> float | None:
    """The dense bf16 FLOP/s of all `devices`, which are of one kind; None where nothing is known of them."""
    devices = list(devices)
    chip = {**TPUS, **GPUS}.get(devices[0].device_kind)
    return None if chip is None else len(devices) * chip.flops / per_chip(devices)
