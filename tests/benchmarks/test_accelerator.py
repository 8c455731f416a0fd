import os
import pathlib
import shutil
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "accelerator.sh"


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_refuses_a_machine_without_an_accelerator(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "JAX sees no accelerator here" in done.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_every_case_is_a_command_that_the_benchmarks_take(tmp_path):
    """With a Python that writes down what it is asked, every line of the script is run, and parsed by the benchmark that it names."""
    import importlib

    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\n[ "$1" = - ] || echo "$@" >>{tmp_path}/calls\ncat >/dev/null </dev/null\n')
    fake.chmod(0o755)
    environment = os.environ | {"PYTHON": str(fake), "OUT": str(tmp_path)}
    done = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert len(calls) >= 5 and calls[0][:4] == ["-m", "benchmarks.fit", "--model", "qwen2.5-7b"]
    for _, module, *options in calls:
        assert importlib.import_module(module).parse(options).minutes > 0
