"""`report.html` of a run: one file that needs nothing else, made from what the run folder holds, finished or not.

Texts of contexts, self-edits and answers are untrusted: the template escapes all of them, unless their task makes pictures of them
(`tasks.base.View`), and the page allows no script.
"""

from __future__ import annotations

import collections
import datetime
import functools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
import markupsafe
import numpy as np
import yaml

from seal_jax import tasks
from seal_jax.errors import SealError
from seal_jax.runs import charts, continual_view, files, health, lock, store, table
from seal_jax.runs.events import read_events
from seal_jax.runs.places import Place
from seal_jax.tasks.base import View
from seal_jax.words import counted

EXAMPLES = 5  # contexts shown in full
SEQUENCES = 60  # training sequences shown of one self-edit
EVALUATIONS = {"before": "the evaluation of the base policy", "after": "the evaluation after training"}  # others: by their folder
ROUNDS = 6  # panels of the reward spread: the last rounds
SWEEP = "sweep.json"  # the table in a sweep's folder
STAGES = {
    "sample": "writing self-edits",
    "adapt": "inner loops, and answers with their adapters",
    "bare": "answers without adaptation",
    "grade": "grading",
    "m_step": "M-steps",
}


def write_report(run_folder: str | os.PathLike[str] | Place) -> Place:
    """Writes `report.html` into the run folder and returns its path.

    Raises `SealError` if this is no run, or one of a sweep's lanes, or it cannot be written.
    """
    folder = store.RunStore(run_folder).folder
    try:
        found = store.existing(run_folder)
    except SealError:
        if (folder / SWEEP).is_file():
            raise SealError(f"{folder}: holds a sweep, whose table is {folder / SWEEP}; a report is of one run") from None
        raise
    if found.names("shared/") or found.names("settings/"):
        raise SealError(f"{folder}: holds the lanes of a sweep, which have no report; see {folder.parent / SWEEP}")
    loader = jinja2.PackageLoader("seal_jax", "runs")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"clean": clean, "percent": table.percent, "interval": table.interval}
    environment.filters |= {"duration": duration, "number": "{:,}".format, "counted": counted, "bytes": in_bytes}
    try:
        page = environment.get_template("report.html.j2").render(view(folder))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, jinja2.UndefinedError) as error:
        raise SealError(
            f"{folder}: a file here is not of the form that this version writes ({type(error).__name__}: {error}); "
            "report it with the version that made the run"
        ) from error
    path = folder / "report.html"
    files.write_atomic(path, page.encode("utf-8", errors="replace"))
    return path


def clean(text: Any) -> str:
    """Untrusted text with control characters, which HTML forbids, made visible. Escaping is the template's."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", str(text))


def show(task: View, kind: str, text: str) -> markupsafe.Markup:
    """A text as its task wants it shown."""
    picture = task.html(kind, text)
    return markupsafe.Markup('<span class="text">{}</span>').format(clean(text)) if picture is None else markupsafe.Markup(picture)


def duration(seconds: float) -> str:
    """ "2 h 5 min", "3 min 20 s", "4.2 s"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def in_bytes(number: float) -> str:
    """ "812 MB", "13.4 GB"."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def view(folder: Place) -> dict[str, Any]:
    """All that the template shows, from the files in `folder`. A damaged file is left out and named under `notices`."""
    notices: list[str] = []

    @functools.cache
    def read(name: str) -> dict[str, Any] | None:
        if not (folder / f"{name}.json").exists():
            return None
        try:
            return store.read_unit(folder / f"{name}.json")
        except SealError as error:
            notices.append(str(error))
            return None

    def groups(prefix: str) -> list[dict[str, Any]]:
        return [group for name in units if name.startswith(prefix) and (group := read(name)) is not None]

    units = store.RunStore(folder).names()
    numbers = sorted({int(name.split("/")[1]) for name in units if re.match(r"rounds/\d+/", name)})
    rounds = [
        {
            "number": n,
            "contexts": [c for group in groups(f"rounds/{n}/e_step/") for c in group["contexts"]],
            "memory": read(f"rounds/{n}/memory"),
            "selection": read(f"rounds/{n}/selection"),
            "m_step": read(f"rounds/{n}/m_step"),
        }
        for n in numbers
    ]
    order = {"before": 0, "after": 1}
    names = sorted({name.split("/")[1] for name in units if name.startswith("evaluate/")}, key=lambda n: (order.get(n, 2), n))
    evaluations = {name: [c for group in groups(f"evaluate/{name}/") for c in group["contexts"]] for name in names}
    seconds: collections.Counter[str] = collections.Counter()
    for group in [*groups("rounds/"), *groups("evaluate/")]:  # selections and M-steps among them
        if "contexts" in group and isinstance(group["contexts"], list):
            seconds.update(group.get("seconds", {}))
    start, steps = read("continual/start"), groups("continual/steps/")
    for unit in [start or {}, *steps]:
        seconds.update(unit.get("seconds", {}))
    seconds["m_step"] = sum(r["m_step"].get("seconds", 0.0) for r in rounds if r["m_step"])
    events = read_events(folder / store.EVENTS)
    results = read("table")
    ordinary = results if results and results.get("kind") != "continual" else None
    sizes = {(row["contexts"], row["questions"]) for row in (ordinary or {}).get("rows", [])}
    phases = [(f"round {r['number']}", r["contexts"]) for r in rounds]
    phases += [(EVALUATIONS.get(name, name).removeprefix("the "), contexts) for name, contexts in evaluations.items()]
    config_text = (folder / store.CONFIG).read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError:
        config = None
        notices.append(f"{store.CONFIG}: not readable as YAML")
    shown_source, shown_contexts = _examples_source(evaluations, rounds)
    summaries = [_round_summary(r) for r in rounds]
    spread = [_spread_panel(f"round {r['number']}", r["contexts"], r["selection"]) for r in rounds if r["contexts"]][-ROUNDS:]
    if not spread:
        spread = [_spread_panel(title, contexts, None) for title, contexts in phases if contexts]
    spread = [panel for panel in spread if any(c["rewards"] for c in panel["contexts"])]
    loss_lines = [(f"round {r['number']}", r["m_step"]["losses"]) for r in rounds if r["m_step"] and r["m_step"].get("losses")]
    measured = [s for s in summaries if s["mean"]]
    header = _header(config if isinstance(config, dict) else {})
    task = tasks.view(str(header["task"]))
    return {
        **header,
        "context_head": task.context,
        "shown": functools.partial(show, task),
        "config_text": config_text,
        "versions": read("versions") or {},
        "status": _status(folder, events, results is not None),
        "started": events[0]["time"][:16].replace("T", " ") if events else None,
        "worked": _worked(events),
        "table": ordinary,
        "sizes": sizes.pop() if len(sizes) == 1 else None,
        "gain": table.GAIN,
        "rounds": summaries,
        "round_chart": charts.reward_by_round(measured) if measured else None,
        "spread_chart": charts.reward_spread(spread) if spread else None,
        "loss_chart": charts.losses(loss_lines) if loss_lines else None,
        "counts": [{"phase": name, **_counts(contexts)} for name, contexts in phases],
        "problems": collections.Counter(e["problem"] for _, cs in phases for c in cs for e in c["edits"] if e["problem"]).most_common(8),
        "skipped": _skipped(events),
        "health": health.summary(events),
        "seconds": [(STAGES.get(stage, stage), spent) for stage, spent in seconds.items() if spent > 0],
        "examples_source": shown_source,
        "examples": [_example(label, context) for label, context in _pick(shown_contexts)],
        "sequences": SEQUENCES,
        "continual": continual_view.view(start, steps, None if ordinary else results) if start else None,
        "answer": _answer,
        "notices": [*notices, *_notices(events)],
    }


def _header(config: Mapping[str, Any]) -> dict[str, Any]:
    parts = {key: config.get(key) if isinstance(config.get(key), dict) else {} for key in ("model", "task")}
    return {
        "name": config.get("name") or "run",
        "model": parts["model"].get("name") or "unknown",
        "dtype": parts["model"].get("dtype") or "unknown",
        "task": parts["task"].get("name") or "unknown",
        "seed": config.get("seed", "unknown"),
    }


def _status(folder: Place, events: Sequence[Mapping[str, Any]], has_table: bool) -> tuple[str, str]:
    """(kind, text) of the run's state."""
    last: Mapping[str, Any] = {}
    for event in events:
        if event["event"] in ("created", "opened"):
            last = {}
        elif event["event"] in ("finished", "stopped"):
            last = event
    if last.get("event") == "stopped":
        return "stopped", f"stopped: {last.get('error', '')}"
    if last or (has_table and not events):
        return "finished", "finished"
    if lock.in_use(folder):
        return "running", "running"
    return "stopped", "not finished; continue it with the command that made it and this folder"


def _worked(events: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds that processes worked on the run: from each opening to the last event before the next."""
    total, start, last = 0.0, None, None
    for event in events:
        try:
            time = datetime.datetime.fromisoformat(event["time"])
        except ValueError:
            continue
        if event["event"] in ("created", "opened"):
            total += (last - start).total_seconds() if start and last else 0.0
            start = time
        last = time
    return total + (last - start).total_seconds() if start and last else None


def _skipped(events: Iterable[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """(what and why, how many) from events "skipped". A continued run tells them again: equal ones count once."""
    found: dict[tuple[tuple[str, str], ...], int] = {}
    for event in events:
        if event["event"] == "skipped":
            key = tuple((k, str(v)) for k, v in event.items() if k not in ("time", "event", "count"))
            found[key] = event.get("count", 1)
    by_reason: collections.Counter[str] = collections.Counter()
    for key, count in found.items():
        by_reason[dict(key).get("reason") or ", ".join(value for _, value in key) or "no reason given"] += count
    return by_reason.most_common()


def _notices(events: Iterable[Mapping[str, Any]]) -> list[str]:
    found = []
    for event in events:
        if event["event"] in ("versions_changed", "config_changed"):
            what = "Continued with other versions or devices" if event["event"] == "versions_changed" else "Continued with another config"
            found.append(f"{what}: {', '.join(f'{key} {old} → {new}' for key, (old, new) in event['changes'].items())}.")
        elif event["event"] == "unit_damaged":
            found.append(f"The damaged result {event['unit']} was set aside as {event['moved_to']} and computed anew.")
        elif event["event"] == "unlocked":
            found.append("The file system knows no locks: nothing kept two processes from working on this run at once.")
        elif event["event"] == "warning":
            found.append(f"Warning: {event['message']}")
    return list(dict.fromkeys(found))


def _unadapted(context: Mapping[str, Any]) -> float | None:
    return _mean(trial["reward"] for trial in context.get("methods", {}).get("no adaptation", []))


def _rewards(context: Mapping[str, Any]) -> list[float]:
    return [edit["reward"] for edit in context["edits"] if edit["reward"] is not None]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _estimate(values: Sequence[float]) -> tuple[float, float | None, float | None] | None:
    """Mean with a 95% percentile bootstrap interval over contexts (2000 resamples, fixed seed); one context gives no interval."""
    if len(values) < 2:
        return (values[0], None, None) if values else None
    x = np.asarray(values)
    draws = x[np.random.default_rng(0).integers(len(x), size=(2000, len(x)))].mean(1)
    return float(x.mean()), *(float(q) for q in np.quantile(draws, [0.025, 0.975]))


def _round_summary(r: Mapping[str, Any]) -> dict[str, Any]:
    contexts, step = r["contexts"], r["m_step"]
    rewards = [found for c in contexts if (found := _rewards(c))]
    known = [value for value in (step or {}).get("losses", []) if value is not None]
    return {
        "round": r["number"],
        "contexts": len(contexts),
        "unadapted": _estimate([u for c in contexts if (u := _unadapted(c)) is not None]),
        "mean": _estimate([sum(found) / len(found) for found in rewards]),
        "best": _estimate([max(found) for found in rewards]),
        "kept": len(r["selection"]["kept"]) if r["selection"] else None,
        "steps": step["steps"] if step else None,
        "loss": (known[0], known[-1]) if known else None,
        "memory": _memory(r["memory"], contexts) if r["memory"] else None,
    }


def _memory(before: Mapping[str, Any], contexts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the policy knew before a round's edits, where rewards count that, and after one, in the mean over contexts."""
    trials = [[t["retention"] for e in c["edits"] for t in e["trials"] if "retention" in t] for c in contexts]
    told: dict[str, Any] = {"accuracy": before["accuracy"], "bits": before["bits"]}
    for key in ("accuracy", "bits"):
        known = [mean for of_context in trials if (mean := _mean(t[key] for t in of_context)) is not None]
        told[f"{key}_after"] = _estimate(known)
    scores = [found for c in contexts if (found := [e["score"] for e in c["edits"] if e.get("score") is not None])]
    return {**told, "score": _estimate([sum(found) / len(found) for found in scores])}


def _spread_panel(title: str, contexts: Sequence[Mapping[str, Any]], selection: Mapping[str, Any] | None) -> dict[str, Any]:
    kept = {(choice["context"], choice["candidate"]) for choice in (selection or {}).get("kept", [])}
    shown = []
    for c in contexts:
        chosen = [edit for edit in c["edits"] if (c["id"], edit["candidate"]) in kept]
        shown.append({"unadapted": _unadapted(c), "rewards": _rewards(c), "kept": _rewards({"edits": chosen})})
    return {"title": title, "contexts": shown}


def _counts(contexts: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    edits = [edit for c in contexts for edit in c["edits"]]
    trials = [t for c in contexts for ts in c.get("methods", {}).values() for t in ts] + [t for e in edits for t in e["trials"]]
    verdicts = [verdict for trial in trials for verdict in (*trial["verdicts"], *trial.get("retention", {}).get("verdicts", ()))]
    return {
        "contexts": len(contexts),
        "edits": len(edits),
        "unusable": sum(edit["problem"] is not None for edit in edits),
        "dropped": sum(edit["dropped"] for edit in edits),
        "answers": len(verdicts),
        "ungraded": sum(verdict is None for verdict in verdicts),
    }


def _examples_source(evaluations: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> tuple[str | None, Sequence[Any]]:
    """Where examples are taken from: the evaluation after training, else before it, else the last round that has contexts."""
    for name in ("after", "before", *evaluations):
        if evaluations.get(name):
            return EVALUATIONS.get(name, name), evaluations[name]
    for r in reversed(rounds):
        if r["contexts"]:
            return f"round {r['number']}", r["contexts"]
    return None, []


def _best(context: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The self-edit of the highest reward, the first of equals; unusable and ungraded ones come last."""
    return max(context["edits"], key=lambda e: (bool(e["trials"]), -1.0 if e["reward"] is None else e["reward"]), default=None)


def _pick(contexts: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Contexts from the largest to the smallest gain of their best self-edit, evenly spaced: not the successes alone."""

    def gain(context: Mapping[str, Any]) -> float:
        best = _best(context)
        return (best["reward"] or 0.0) - (_unadapted(context) or 0.0) if best else -2.0

    ranked = sorted(contexts, key=gain, reverse=True)
    if len(ranked) <= EXAMPLES:
        return [("", context) for context in ranked]
    at = [round(i * (len(ranked) - 1) / (EXAMPLES - 1)) for i in range(EXAMPLES)]
    labels = ["largest gain", *[""] * (EXAMPLES - 2), "smallest gain"]
    labels[EXAMPLES // 2] = "median gain"
    return [(label, ranked[i]) for label, i in zip(labels, at, strict=True)]


def _example(label: str, context: Mapping[str, Any]) -> dict[str, Any]:
    edit = _best(context)
    before = next(iter(context.get("methods", {}).get("no adaptation", [])), None)
    after = edit["trials"][0] if edit and edit["trials"] else None
    return {
        "label": label,
        "title": context["title"],
        "passage": context.get("passage"),
        "edit": edit,
        "rewards": [e["reward"] for e in context["edits"]],
        "score": edit.get("score") if edit else None,
        "unadapted": _unadapted(context),
        "trial": after,
        "trials": len(edit["trials"]) if edit else 0,
        "questions": [
            {"question": question, "gold": gold, "before": _answer(before, i), "after": _answer(after, i)}
            for i, (question, gold) in enumerate(context["questions"])
        ],
    }


def _answer(trial: Mapping[str, Any] | None, i: int) -> dict[str, Any] | None:
    return None if trial is None else {"text": trial.get("answers", trial["outputs"])[i].strip(), "verdict": trial["verdicts"][i]}
