"""How the programs that run a model are compiled: what XLA is asked for, several at a time, and once for all runs."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import Mesh

from seal_jax import cpu
from seal_jax.models.embedded import cache_folder

# A layer's kernels lie in a stack of all layers' [N, in, out]. cuBLAS takes its part of the stack where it lies (from JAX 0.11 on); for a
# product by Triton, and for small products of the same input that it would make one of, XLA for GPUs first copies it out, so that a decoded
# token moves all weights three times. Compilers for other devices let the options be.
OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}
THREADS = 8  # at most; a program of a 7B model takes its compiler a GiB or two


def keep() -> None:
    """Has JAX keep what it compiles in the user's cache folder: a run that goes on, and the next one, find their programs there.

    Where JAX has been told a folder (JAX_COMPILATION_CACHE_DIR; empty: none), it stays that one. All programs are kept, those too that are
    compiled in less than JAX's second: there are many.
    """
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "programs" / _processor()))


def _processor() -> str:
    """A name for this kind of processor: programs made for another, found in a folder that machines share, might not run."""
    told = " ".join(sorted(cpu.features())) or platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"


def threads(mesh: Mesh) -> int:
    """How many programs to compile at a time for the devices of `mesh`; 0: as they come. XLA's compiler for CPUs keeps all cores busy with
    one; for GPUs one keeps a single core busy."""
    return 0 if mesh.devices.flat[0].platform == "cpu" else min(THREADS, os.cpu_count() or 1)


class Ahead:
    """Compiles programs of one jitted function in threads, in the order in which they will be needed: `with Ahead(...) as programs:`.

    `lower(key)` gives a program by what sets it apart. JAX keeps what was compiled so, and finds it when the function is called: call it
    after `ready(key)`. A fault of the compiler is raised there. Leaving the block drops what has not been begun.
    """

    def __init__(self, lower: Callable[[Any], jax.stages.Lowered], keys: Iterable[Hashable], threads: int):
        self._lower, self._keys, self._threads = lower, list(dict.fromkeys(keys)) if threads else [], threads
        self._programs: dict[Hashable, Future[None]] = {}

    def __enter__(self) -> Ahead:
        if len(self._keys) > 1:  # one alone is compiled by its call
            self._pool = ThreadPoolExecutor(min(self._threads, len(self._keys)), "compile")
            self._programs = {key: self._pool.submit(self._compile, key) for key in self._keys}
        return self

    def __exit__(self, *_: object) -> None:
        if self._programs:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, key: Hashable) -> None:
        self._lower(key).compile()

    def ready(self, key: Hashable) -> None:
        """Waits until the program is there, if it is one of those to compile."""
        if key in self._programs:
            self._programs[key].result()
