"""What is recorded outside this repository: cases in the folder SEAL_GOLDEN (default `../shared/golden`), and files that the original
published in SEAL_ORIGINAL (default `../shared/data/original`)."""

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


@pytest.fixture(scope="session")
def original() -> Callable[[str], str]:
    """`original(name)`: the path of a file that the original published, `__` for `/`; skips the test where there is none."""

    def find(name: str) -> str:
        path = pathlib.Path(os.environ.get("SEAL_ORIGINAL") or ROOT.parent / "shared" / "data" / "original") / name
        if not path.is_file():
            pytest.skip(f"no file of the original's at {path}: set SEAL_ORIGINAL to the folder that has them")
        return str(path)

    return find
