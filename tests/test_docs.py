"""The pages of docs/ are true where code can tell."""

import dataclasses
import importlib.util
import pathlib
import re
import shlex

import pytest

from seal_jax import cli, config
from seal_jax.sweep import config as sweep_config

DOCS = pathlib.Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def page():
    """docs/configuration.py, which writes configuration.md."""
    spec = importlib.util.spec_from_file_location("configuration", DOCS / "configuration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_configuration_is_up_to_date(page):
    assert page.PAGE.read_text(encoding="utf-8") == page.render(), "a default or a comment has changed; run: make docs"


def keys(data, prefix=""):
    for key, value in data.items():
        yield from keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]


def rows_of(page, task):
    """(key, default, meaning) of the page's rows for a config of `task`: those of other tasks, and of sweep files, left out."""
    sections = re.split(r"^## ", page.PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    own = [s for s in sections if not s.startswith(("task, with", "Sweep files")) or s.startswith(f"task, with task.name={task}\n")]
    return re.findall(r"^\| `([\w.]+)` \| `(.+?)` \| (.*) \|$", "\n".join(own), re.MULTILINE)


@pytest.mark.parametrize("task", config.task_names())
def test_configuration_has_every_key_with_a_meaning(page, task):
    """Independent of the page's own walk: the keys of a built configuration."""
    known, rows = set(keys(config.to_dict(config.build({"task": {"name": task}})))), rows_of(page, task)
    assert {key for key, _, _ in rows} == known and len(rows) == len(known)
    assert not [key for key, _, meaning in rows if not meaning], "say in a comment beside the field what it means"


@pytest.mark.parametrize("task", config.task_names())
def test_documented_defaults_are_what_a_config_without_the_key_gets(page, task):
    """The page's defaults, given as overrides, change nothing."""
    plain = {"task": {"name": task}}
    assert config.build(plain, [f"{key}={value}" for key, value, _ in rows_of(page, task)]) == config.build(plain)


def test_documented_defaults_of_sweep_files(page, tmp_path):
    section = page.PAGE.read_text(encoding="utf-8").partition("## Sweep files")[2]
    rows = re.findall(r"^\| `([\w.]+)` \| `(.+?)` \| (.+) \|$", section, re.MULTILINE)
    assert {key.split(".")[0] for key, _, _ in rows} == {f.name for f in dataclasses.fields(sweep_config.SweepConfig)}
    (tmp_path / "base.yaml").write_text("task: {name: knowledge}")
    (tmp_path / "sweep.yaml").write_text("{base: base.yaml, space: {fit.epochs: [1, 2]}}")
    given = [f"{key}={value}" for key, value, _ in rows if key not in ("base", "space") and not key.startswith("asha.")]
    assert sweep_config.load(tmp_path / "sweep.yaml", given) == sweep_config.load(tmp_path / "sweep.yaml")


def test_differences_names_keys_and_commands_that_exist():
    text = (DOCS / "differences.md").read_text(encoding="utf-8")
    known = {key for task in config.task_names() for key in keys(config.to_dict(config.build({"task": {"name": task}})))}
    sections = {key.split(".")[0] for key in known if "." in key}
    spans = [part for span in re.findall(r"`([^`]+)`", text) for part in ([span] if span.startswith("seal-jax") else span.split())]
    named = {span.split("=")[0] for span in spans if span.split(".")[0] in sections and "." in span}
    assert len(named) >= 8 and named <= known, named - known
    commands = [span for span in spans if span.startswith("seal-jax")]
    assert commands
    for command in commands:
        cli.parser().parse_args(shlex.split(command)[1:])
