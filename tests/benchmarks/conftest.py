import json
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed with the package

from benchmarks import common  # noqa: E402


@pytest.fixture
def measure(capsys, quick_compile):
    """`measure(main, *options)`: (JSON lines by case, everything printed) of a benchmark's tiny mode."""

    def run(main, *options):
        with quick_compile():
            code = main(["--tiny", "--repeats", "2", *options])
        printed = capsys.readouterr().out
        rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
        assert code == 0 and rows
        for row in rows:
            assert list(row)[: len(common.KEYS)] == list(common.KEYS)
            assert row["model"] == "tiny" and row["device"] and (row["case"] == "learning" or row["tokens_per_s"] > 0)
            assert (row["peer"] is None) == (row["ratio"] is None)
            if "seconds" in row:
                assert row["seconds"] > 0 and row["repeats"] >= 1 and row["spread"] >= 0
        assert printed.count("\n| ") == 1 + len(rows), "the table has a line for each"
        return {row["case"]: row for row in rows}, printed

    return run


@pytest.fixture
def torch_peer():
    """Skips where the other side is not installed."""
    for name in ("torch", "transformers", "accelerate", "peft"):
        pytest.importorskip(name, reason=f"{name} is part of the peer; pip install seal_jax[test]")
