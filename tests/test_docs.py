"""The pages of docs/ are true where code can tell."""

import dataclasses
import importlib.util
import pathlib
import re
import shlex
import sys

import pytest

from seal_jax import cli, config
from seal_jax.sweep import config as sweep_config

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def load(name):
    """docs/NAME.py."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page():
    """docs/configuration.py, which writes configuration.md."""
    return load("configuration")


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


# --- Scale -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scale():
    """docs/scale.py, which writes scale.md."""
    return load("scale")


def test_scale_is_what_its_records_say(scale):
    assert scale.PAGE.read_text(encoding="utf-8") == scale.render(scale.read_all()), "run: make scale"
    written = {path.name for path in scale.RECORDS.iterdir()}
    assert written == {f"{cell.name}.json" for cell in scale.read_all()}, "a record that no cell of docs/scale.py has, or of other keys"


def test_a_record_is_of_its_cell(scale):
    """What the page says of a cell was compiled for it."""
    for cell, found in scale.read_all().items():
        assert (found["model"], found["topology"]) == (cell.model, cell.topology) and found["versions"].keys() == {"jax", "libtpu"}
        assert found["devices_per_chip"] == scale.PARTS[cell.generation] and found["mesh"]["edit"] >= 2
        chips = found["devices"] // found["devices_per_chip"]
        assert scale.SLICES[cell.generation][chips] == cell.slice
        assert [p["name"] for p in found["programs"]] == ["fit", "prefill", "decode", "M-step", "write"]


def test_replicas_are_alike_and_apart(scale):
    """The step from one replica to many: on four times as many, the same program, and nothing between them but reports."""
    records = scale.read_all()
    for found in records.values():
        assert all(scale.between(p) < 4096 for p in found["programs"] if p["name"] != "M-step")
        tune = found["programs"][3]
        assert scale.between(tune) > tune["bytes"]["adapters"] / 3 / 2, "gradients of the adapter, in bfloat16 at least"
    base, larger = records[scale.CELLS[0]], records[scale.PROOF]
    assert larger["mesh"] == base["mesh"] | {"edit": 4 * base["mesh"]["edit"]}
    for program, shares in zip(base["programs"], scale.differences(base, larger), strict=True):
        assert all(abs(share) < scale.TOLERANCE for share in shares), (program["name"], shares)
    assert scale.between(larger["programs"][3]) == pytest.approx(scale.reckoned(base, larger), rel=scale.TOLERANCE)


def test_scale_says_what_was_not_compiled(scale):
    records = scale.read_all()
    fewer = scale.render({cell: found for cell, found in records.items() if cell not in (scale.CELLS[0], scale.PROOF)})
    assert fewer.count("| not compiled |") == 1 + scale.render(records).count("| not compiled |")
    assert "Not compiled." in fewer


def test_a_memory_that_holds_few_edits_is_the_bottleneck(scale):
    spent = [scale.scale.Time(2.0, {"fit: memory bandwidth": 2.0})]
    few = {"programs": [{"items": 5}], "slots": 5, "edits_per_shard": 15}
    assert scale.bottleneck(few, spent) == "fit: HBM size"
    assert scale.bottleneck(few | {"slots": 12}, spent) == scale.bottleneck(few | {"edits_per_shard": 5}, spent) == "fit: memory bandwidth"
