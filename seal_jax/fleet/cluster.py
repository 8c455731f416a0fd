"""Ray, as runs by workers and sweeps use it: the cluster at RAY_ADDRESS, or one of this machine. Imports Ray only where it is asked for."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from seal_jax import preemption
from seal_jax.errors import SealError

# Read by Ray when it is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if "RAY_ADDRESS" not in os.environ:
    # Off, Ray on this machine alone listens on the loopback interface alone, as it does by default on the systems that this is named for.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

# Of this process's environment, which processes on other machines need too.
KEYS = (
    *("HF_TOKEN", "HF_HOME", "HF_HUB_OFFLINE", "OPENAI_API_KEY", "OPENAI_BASE_URL", "WANDB_API_KEY", "GOOGLE_APPLICATION_CREDENTIALS"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION"),
    *("AWS_ENDPOINT_URL", "SEAL_JAX_PEER_TIMEOUT", "SEAL_CACHE"),
)


def ray() -> Any:
    """The module `ray`. Raises `SealError` where it is not installed."""
    try:
        import ray as found
    except ImportError:
        raise SealError('Ray is missing: pip install "seal_jax[ray]"') from None
    return found


@contextlib.contextmanager
def joined(log_to_driver: bool, check: Callable[[dict[str, float]], None] = lambda resources: None) -> Iterator[None]:
    """Ray, as this process has it already, or else until the end of the block. `check` is given the resources of a Ray of this machine.

    Raises `SealError` if there is no cluster at RAY_ADDRESS.
    """
    module, address = ray(), os.environ.get("RAY_ADDRESS")
    if module.is_initialized():
        with preemption.at_steps():
            yield
        return
    _reach(address)
    handler, main = signal.getsignal(signal.SIGTERM), threading.current_thread() is threading.main_thread()
    try:
        options = {"log_to_driver": log_to_driver, "logging_level": "ERROR", **({} if address else {"include_dashboard": False})}
        module.init(address=address or "local", **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise SealError(f"Ray did not start: {' '.join(str(error).split())[:300]}") from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, handler)  # in whose place Ray puts its own
    try:
        if not address:  # a cluster may grow
            check(module.cluster_resources())
        with preemption.at_steps():  # Ray's calls do not bear that a signal's handler raises: `stop_if_told` does
            yield
    finally:
        module.shutdown()


def _reach(address: str | None) -> None:
    """Raises `SealError` if nobody listens at an address HOST:PORT: Ray would try for minutes."""
    host, _, port = (address or "").rpartition(":")
    if not re.fullmatch(r"[\w.-]+", host) or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), 10.0).close()
    except (OSError, OverflowError) as error:
        raise SealError(f"RAY_ADDRESS={address}: nobody answers there ({str(error) or type(error).__name__}); is the cluster up?") from None


def stop_if_told() -> None:
    """Raises `Preempted` if this process was told to end. To be called often by what runs in `joined`."""
    if (notice := preemption.notice()) is not None:
        raise preemption.Preempted(notice.text)


def keys() -> dict[str, str]:
    return {key: os.environ[key] for key in KEYS if key in os.environ}
