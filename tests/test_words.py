from seal_jax.words import counted


def test_counted():
    assert [counted(n, "host") for n in (0, 1, 2, 4096)] == ["0 hosts", "1 host", "2 hosts", "4,096 hosts"]
