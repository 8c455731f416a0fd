import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "accelerator.sh"


@pytest.fixture
def without(tmp_path):
    """`without(*packages)`: the environment of a Python that lacks them."""

    def environment(*packages):
        (tmp_path / "lacking").mkdir()
        lines = [f"sys.modules[{name!r}] = None\n" for name in packages]
        (tmp_path / "lacking" / "sitecustomize.py").write_text("import sys\n" + "".join(lines))
        path = os.pathsep.join([str(tmp_path / "lacking"), str(ROOT)])
        return os.environ | {"PYTHONPATH": path, "PYTHON": sys.executable, "OUT": str(tmp_path), "JAX_PLATFORMS": "cpu"}

    return environment


def test_benchmarks_need_no_package_that_only_other_models_and_constraints_need(without):
    call = [sys.executable, "-c", "import benchmarks.fit, benchmarks.sample, benchmarks.round, benchmarks.kernels"]
    environment = without("gguf", "outlines_core")
    done = subprocess.run(call, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_says_in_a_line_what_is_missing(without):
    done = subprocess.run([SCRIPT], env=without("omegaconf"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr == "missing, and not installed by this script: omegaconf\n"


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_says_what_the_benchmarks_themselves_lack(without):
    done = subprocess.run([SCRIPT], env=without("seal_jax.fit.plan"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.strip().endswith("seal_jax.fit.plan (for benchmarks.fit)")


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
