"""Conformance cases are recorded outside this repository: the folder is taken from SEAL_GOLDEN, by default `../shared/golden`."""

import gzip
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def golden_path(name: str) -> pathlib.Path:
    """Where the cases `name` ("grader_verdicts", say) are; skips the test where they are not."""
    folder = pathlib.Path(os.environ.get("SEAL_GOLDEN") or ROOT.parent / "shared" / "golden")
    path = folder / f"{name}.json.gz"
    if not path.is_file():
        pytest.skip(f"no recorded cases at {path}: set SEAL_GOLDEN to the folder that has them")
    return path


def load_golden(name: str) -> Any:
    """The cases `name` as plain JSON data."""
    with gzip.open(golden_path(name), "rt", encoding="utf-8") as file:
        return json.load(file)


@pytest.fixture(scope="session", name="golden_path")
def golden_path_fixture() -> Callable[[str], pathlib.Path]:
    """`golden_path(name)`: the file of the cases `name`; skips the test where there is none."""
    return golden_path


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Any]:
    """`golden(name)`: the cases `name` as plain JSON data; skips the test where there are none."""
    return load_golden
