import importlib
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest

from benchmarks import fit, workload
from benchmarks import round as round_

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


@pytest.fixture
def calls(tmp_path):
    """[(seconds, module, options)] of the script's cases, from a Python that only writes down what it is asked."""
    if shutil.which("bash") is None:
        pytest.skip("no bash here")
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\n[ "$1" = - ] || echo "$@" >>{tmp_path}/calls\ncat >/dev/null </dev/null\n')
    fake.chmod(0o755)
    environment = os.environ | {"PYTHON": str(fake), "OUT": str(tmp_path)}
    done = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    seconds = [int(line.split(" at most ")[1].split()[0]) for line in done.stdout.splitlines() if line.startswith("# --- ")]
    lines = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    return [(s, importlib.import_module(module), options) for s, (_, module, *options) in zip(seconds, lines, strict=True)]


def test_every_case_is_a_command_that_the_benchmarks_take(calls):
    assert len(calls) >= 5 and calls[0][1] is fit and calls[0][2][:2] == ["--model", "qwen2.5-7b"]
    for _, module, options in calls:
        assert module.parse(options).minutes > 0


def test_the_most_valuable_cases_have_their_time(calls):
    (first, *_), (second, module, _), (third, *_) = calls[:3]
    assert module is round_ and second >= 240 and first + second + third < 9.5 * 60


def test_cases_have_little_padding_and_few_programs(calls, monkeypatch):
    """As planned, where the device has room for the slots; the round finds nearly all of its programs compiled by the fits before it."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    edits = workload.make_round()

    def planned(args, some, slots):
        how = {"lengths": fit.numbers(args.lengths), "tokens_per_step": args.tokens_per_step, "epochs": args.epochs}
        return workload.planned(some, slots=slots, **how)

    (_, _, fits), (_, _, rounds) = calls[:2]
    args, compiled = fit.parse(fits), {}
    for k in fit.numbers(args.k):
        assert fit.count(args, k) == max(k, 8)
        waste, compiled[k] = planned(args, workload.spread(edits, fit.count(args, k)), k)
        assert waste.share <= 0.25 and len(compiled[k]) <= 16
    args = round_.parse(rounds)
    waste, programs = planned(args, workload.near_mean(edits, args.contexts), args.slots)
    assert waste.share <= 0.2 and len(programs - compiled[args.slots]) <= 4
