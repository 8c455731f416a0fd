"""Writes docs/configuration.md from the dataclasses of `seal_jax.config` and the comments beside their fields.

python docs/configuration.py
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import pathlib
import textwrap
from typing import Any

from seal_jax import config
from seal_jax.sweep import config as sweep_config
from seal_jax.sweep import lanes
from seal_jax.tasks.arc import sources as arc_sources
from seal_jax.tasks.knowledge import original, prompts, sources

PAGE = pathlib.Path(__file__).with_suffix(".md")
INTRODUCTION = """\
# Configuration

A config is a YAML file with these keys; what is left out has the default below, which is the paper's where it has one (knowledge
incorporation with Qwen2.5-7B). Any key can be set on the command line too, after the file:

    seal-jax train configs/quickstart.yaml rest_em.rounds=2 fit.learning_rate=5e-4

Unknown keys, wrong types and values out of range are refused in one line. The whole configuration of a run, defaults included, is in
`config.yaml` of its run folder.

This page is written by `python docs/configuration.py` (`make docs`) from `seal_jax/config.py`.
"""

KNOWLEDGE = f"""\
### Data sources of the knowledge task

{inspect.cleandoc(sources.__doc__)}

### Prompts of the knowledge task

`task.prompt`: {", ".join(f"`{style}`" for style in prompts.EDIT_STYLES)}.

`task.answer_prompt`: {", ".join(f"`{style}`" for style in prompts.ANSWER_STYLES)}.

`facts` and `chat` are chat messages, for models with a chat template. `instruct` writes Qwen's chat markup as text. The others are plain
text, for base models. All of them stand in `seal_jax/tasks/knowledge/prompts.py`.

### Files of the original's

{inspect.cleandoc(original.__doc__)}
"""


ARC = f"""\
### Data sources of the ARC task

{inspect.cleandoc(arc_sources.__doc__)}
"""
SWEEPS = f"""\
## Sweep files

What `seal-jax sweep FILE` reads (`seal_jax/sweep/config.py`), with `KEY=VALUE` overrides after it. Keys of a config stand in `set` and
`space` under dotted names, or in sections as there:

{textwrap.indent(inspect.cleandoc(sweep_config.__doc__).partition(chr(10))[2].strip(), "    ")}

`search: grid` tries every combination of the lists; `random` draws `trials` settings; `optuna` proposes `trials`, by what is known so far.
`search: lanes` takes all combinations, or `trials` random draws where the space has a range, and differs in
{", ".join(f"`{key}`" for key in lanes.KEYS)} alone. All lanes of `evaluate.group` contexts are in memory at once. Self-edits that choose
hyperparameters by themselves (those of the task `arc`, or with `task.directives`) keep what they chose, so that no sweep over it is taken.

`asha` compares trials by the mean reward of a round's self-edits; a trial is never stopped after its last round. A trial with neither
`gpu` nor `tpu` runs on the CPU. With `RAY_ADDRESS` set, trials run on that cluster, whose hosts must share the folder; otherwise on this
machine.
"""
MORE = {"knowledge": KNOWLEDGE, "arc": ARC}  # after the keys of a task


def comments(cls: type) -> dict[str, str]:
    """The comment at the end of each field's definition, by field name, those of its base included; "" where there is none."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines = source.encode().splitlines()  # ast counts columns in bytes
    found = comments(cls.__base__) if dataclasses.is_dataclass(cls.__base__) else {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            rest = lines[node.end_lineno - 1][node.end_col_offset :].decode()
            found[node.target.id] = rest.partition("#")[2].strip()
    return found


def default(value: Any) -> str:
    """A default as one would write it in YAML."""
    if value is None:
        return "null"
    return json.dumps(value) if isinstance(value, str | bool | list) else repr(value)


def rows(instance: Any, prefix: str = "") -> list[tuple[str, str, str]]:
    """(key, default, meaning) of every key of a config dataclass and of those inside it, but for the sections of a run."""
    said, found = comments(type(instance)), []
    for field in dataclasses.fields(instance):
        value, key = getattr(instance, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            found += rows(value, f"{key}.")
        elif isinstance(value, dict):  # sections of one kind, by name
            found += [row for name, section in value.items() for row in rows(section, f"{key}.{name}.")]
        else:
            found.append((key, default(value), said[field.name]))
    return found


def table(found: list[tuple[str, str, str]]) -> list[str]:
    cells = [(f"`{key}`", f"`{value}`", meaning.replace("|", "\\|")) for key, value, meaning in found]
    return ["| key | default | meaning |", "| --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in cells)]


def describe(cls: type) -> list[str]:
    """The class's docstring; nothing if it has none of its own (dataclasses make one of the signature)."""
    text = inspect.cleandoc(cls.__doc__ or "")
    return [] if text.startswith(f"{cls.__name__}(") else [text, ""]


def render() -> str:
    """The page."""
    run = config.RunConfig()
    sections = {f.name: getattr(run, f.name) for f in dataclasses.fields(run) if dataclasses.is_dataclass(getattr(run, f.name))}
    plain = [(f.name, default(getattr(run, f.name)), comments(type(run))[f.name]) for f in dataclasses.fields(run)]
    lines = [INTRODUCTION, *table([row for row in plain if row[0] not in sections and row[0] != "task"]), ""]
    for name in config.task_names():
        cls = importlib.import_module(f"seal_jax.tasks.{name}").Config
        lines += [f"## task, with task.name={name}", "", *describe(cls), *table(rows(cls(), "task.")), ""]
        lines += [MORE[name]] if name in MORE else []
    for name, section in sections.items():
        lines += [f"## {name}", "", *describe(type(section)), *table(rows(section, f"{name}.")), ""]
    lines += [SWEEPS, *table([*rows(sweep_config.SweepConfig()), *rows(sweep_config.AshaConfig(), "asha.")]), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(PAGE)
