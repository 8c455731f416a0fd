import importlib
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

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
def script(tmp_path):
    """`script(**environment)`: the script's end, with a Python that only writes down in `calls` what it is asked."""
    if shutil.which("bash") is None:
        pytest.skip("no bash here")
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\n[ "$1" = - ] || echo "$@" >>{tmp_path}/calls\n[ "$2" != pip ] || echo "$PYTHONPATH" >>{tmp_path}/calls\n')
    fake.chmod(0o755)

    def run(**environment):
        environment = os.environ | {"PYTHON": str(fake), "OUT": str(tmp_path), "MINUTES": "20"} | environment
        return subprocess.run([SCRIPT], env=environment, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)

    return run


@pytest.fixture
def calls(tmp_path, script):
    """[(seconds, module, options)] of the script's cases."""
    done = script()
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
    assert module is round_ and second >= 240 and first + second + third <= 9.7 * 60


def test_some_cases_alone(script, tmp_path):
    done = script(CASES="sample-7b fit-0.5b")
    assert done.returncode == 0 and [line.split()[2] for line in done.stdout.splitlines() if line.startswith("# --- ")] == [
        "sample-7b,",
        "fit-0.5b,",
    ]
    done = script(CASES="sample-8b")
    assert done.returncode == 2 and 'CASES="sample-8b": none of fit-7b round-7b' in done.stderr


def test_programs_stay_for_the_next_call_where_that_is_asked_for(script, tmp_path):
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nmkdir -p "$JAX_COMPILATION_CACHE_DIR" && echo "$JAX_COMPILATION_CACHE_DIR"\n')
    for given, stays in (({}, False), ({"CACHE": str(tmp_path / "programs")}, True)):
        done = script(CASES="sample-7b", **given)
        where = next(line for line in done.stdout.splitlines() if line.startswith("/"))
        assert pathlib.Path(where).exists() == stays and done.returncode == 0


def test_wheels_of_a_folder_are_importable(tmp_path, without):
    """Where nothing may be installed; here a package that the script finds missing, and then does not."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "strange_package-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("strange_package.py", "")
        for name, text in (("WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"), ("RECORD", "")):
            wheel.writestr(f"strange_package-1.0.dist-info/{name}", text)
        wheel.writestr("strange_package-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: strange-package\nVersion: 1.0\n")
    environment = without("omegaconf")
    (tmp_path / "lacking" / "sitecustomize.py").write_text(
        "import sys\nif sys.argv[0] == '-':\n    import strange_package\n    print('found it')\n"
    )
    done = subprocess.run([SCRIPT], env=environment | {"WHEELS": str(wheels)}, capture_output=True, text=True, timeout=120)
    assert "found it" in done.stdout, done.stderr


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
