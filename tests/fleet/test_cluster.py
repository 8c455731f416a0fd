"""Ray, where there is none to be had."""

import socket

import pytest

from seal_jax.errors import SealError
from seal_jax.fleet import cluster


def test_an_address_where_nobody_listens_is_told_at_once():
    """Ray would try for minutes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(SealError, match=rf"^RAY_ADDRESS=127.0.0.1:{port}: nobody answers there \(.*refused\); is the cluster up\?$"):
        cluster._reach(f"127.0.0.1:{port}")
    with pytest.raises(SealError, match="nobody answers there"):
        cluster._reach("127.0.0.1:99999")
    with socket.create_server(("127.0.0.1", 0)) as server:
        cluster._reach(f"127.0.0.1:{server.getsockname()[1]}")
    for other in (None, "", "auto", "local", "ray://127.0.0.1:1", "host"):
        cluster._reach(other)  # which Ray takes, or refuses, by itself
