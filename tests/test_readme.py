"""The README is true: its commands exist and take what they are given, its links lead somewhere, and its Python runs (on a tiny model)."""

import pathlib
import re
import shlex
import shutil
import subprocess

import pytest

from seal_jax import cli, config
from seal_jax.sweep import config as sweep_config

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if line.strip()]


def test_the_readme_has_what_the_others_look_at():
    assert {"bash", "python"} <= {kind for kind, _ in BLOCKS}
    assert {"make run", "make test"} <= set(COMMANDS)
    assert {shlex.split(line, comments=True)[1] for line in COMMANDS if line.startswith("seal-jax")} == {
        *("train", "evaluate", "pretrain", "continual", "sweep", "generate", "grade", "export", "report", "plan")
    }


@pytest.mark.parametrize("line", COMMANDS)
def test_shell_commands_exist(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *arguments = shlex.split(line, comments=True)
    if program == "make":
        if shutil.which("make") is None:
            pytest.skip("no make here")
        done = subprocess.run(["make", "--dry-run", *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return
    assert program == "seal-jax"
    given = cli.parser().parse_args(arguments)
    if arguments[0] == "grade":
        config.build({"task": {"name": "knowledge"}}, [f"grade.{item}" for item in given.overrides])
    elif arguments[0] == "sweep":
        sweep_config.load(given.file, given.overrides)
    elif path := getattr(given, "config", None):
        if path.endswith(".yaml"):
            config.load(path, given.overrides)
        else:
            assert path.startswith("runs/")
    elif run := getattr(given, "run_folder", None):
        assert run.startswith(("runs/", "gs://", "s3://"))


def test_no_two_commands_make_the_same_run_folder():
    lines = [shlex.split(line, comments=True) for line in COMMANDS]
    names = [word for line in lines if line[:2] != ["seal-jax", "grade"] for word in line if word.startswith("name=")]
    assert names and len(set(names)) == len(names)


def test_inline_commands_are_those_of_the_command_line():
    inline = re.findall(r"`(seal-jax [^`]+)`", README)
    assert inline
    for line in inline:
        assert shlex.split(line)[1] in (
            "train",
            "evaluate",
            "pretrain",
            "continual",
            "sweep",
            "generate",
            "grade",
            "export",
            "report",
            "plan",
        )


@pytest.mark.parametrize("code", [text for kind, text in BLOCKS if kind == "python"])
def test_python_runs(code, tiny_model, monkeypatch, capsys, tmp_path):
    from seal_jax.models import load

    monkeypatch.chdir(tmp_path)

    real = load.load_model
    monkeypatch.setattr(load, "load_model", lambda settings: real(config.ModelConfig(name=str(tiny_model), dtype="float32")))
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(names["jobs"]) == 3
    losses = names["fitted"].losses
    assert all(len(x) == 10 for x in losses), "ten epochs of one sequence"
    assert all(x[-1] < x[0] for x in losses), "every edit learns"
    assert losses[0][-1] != losses[1][-1], "with its own learning rate"
    assert {path.name for path in (tmp_path / "second").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_links_lead_somewhere():
    titles = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    headings = {"#" + re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    for link in links:
        assert link in headings or (ROOT / link.split("#")[0]).is_file(), link
