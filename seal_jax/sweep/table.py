"""The table of a sweep: a row a trial, best first, whatever measured it. Host code, plain Python.

A trial's record is JSON data:

    {"trial": short digest of its settings, "settings": {key: value}, "does": "train" or "evaluate",
     "status": "done", "stopped" (by ASHA), "failed" or "running",
     "problem": why it failed or null, "rewards": [mean reward of each round], "table": the run's result table or null,
     "result": of its rows the one about the final policy's self-edits or null, "seconds": float or null, "run": the folder of its results}

and a row of the table is that without "table".
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from seal_jax.runs.table import Column, aligned, estimates, percent, signed
from seal_jax.sweep import space as space_lib

Record = dict[str, Any]


def reward(records: Sequence[Mapping[str, Any]]) -> float | None:
    """The reward of a round from its E-step's records: the mean over contexts of the mean over candidates; None if nothing was graded.

    Where rewards count what an edit harms (`rest_em.retention`), less that.
    """
    found = [[e.get("score", e["reward"]) for e in record["edits"]] for record in records]  # a score is there where harm counts
    known = [[reward for reward in rewards if reward is not None] for rewards in found]
    means = [statistics.mean(rewards) for rewards in known if rewards]
    return statistics.mean(means) if means else None


def result(table: Mapping[str, Any], policy: str) -> dict[str, Any] | None:
    """The row of a run's table that says how well `policy` does with self-edits; None where nothing was evaluated."""
    return next((row for row in table["rows"] if row["policy"] == policy and row["statistic"] == "mean of K"), None)


def score(record: Mapping[str, Any]) -> float | None:
    """What finished trials are compared by: the accuracy, or where nothing is evaluated the reward of the last round; else None."""
    if record["result"] is not None:
        return record["result"]["mean"]
    return record["rewards"][-1] if record["rewards"] and record["table"] is not None else None


def build(records: Sequence[Record], notes: Sequence[str] = (), folder: str = "run folder") -> dict[str, Any]:
    """The table, as plain JSON data: {"kind": "sweep", "rows": [record without "table"], "notes": [text], "folder": text}.

    `folder` is the word for what "run" names: lanes share one run folder, and have no more than a folder of results each in it. Equally
    good trials stay in the order of `records`.
    """

    def order(record: Record) -> tuple[Any, ...]:
        found, last = score(record), record["rewards"][-1:]
        return (found is None, -(found or 0.0), record["status"] == "failed", not last, -((last or [0.0])[0] or 0.0))

    said = ["accuracy: of questions about the validation contexts after training on self-edits; [95 % bootstrap interval over contexts]"]
    if any(record["rewards"] for record in records):
        said.append("reward: of each round's self-edits, mean over contexts of the mean over candidates, in %")
    if any(record["status"] == "stopped" for record in records):
        said.append("stopped: by ASHA, after the last round that has a reward")
    rows = [{key: value for key, value in record.items() if key != "table"} for record in sorted(records, key=order)]
    return {"kind": "sweep", "rows": rows, "notes": [*said, *notes], "folder": folder}


def format_table(table: Mapping[str, Any]) -> str:
    """The table for a terminal."""
    rows = table["rows"]
    results = [row["result"] or {} for row in rows]
    columns: list[Column] = []
    for key in dict.fromkeys(key for row in rows for key in row["settings"]):
        columns.append((key, ">", [space_lib.shown(row["settings"].get(key)) for row in rows]))
    if any(results):
        columns.append(("accuracy %", ">", estimates([[r.get(k) for k in ("mean", "low", "high")] for r in results], percent)))
        gains = [[r.get(k) for k in ("gain", "gain_low", "gain_high")] for r in results]
        columns.append(("gain over no adaptation", ">", estimates(gains, signed)))
    if any(row["rewards"] for row in rows):
        columns.append(("reward by round", "<", [" ".join(map(percent, row["rewards"])) or "–" for row in rows]))
    if any(r.get("ungraded") for r in results):
        columns.append(("ungraded", ">", [str(r.get("ungraded", "–")) for r in results]))
    columns.append(("seconds", ">", ["–" if row["seconds"] is None else f"{row['seconds']:.0f}" for row in rows]))
    columns.append((table["folder"], "<", [row["run"] for row in rows]))
    columns.append(("status", "<", [row["status"] + (f": {row['problem']}" if row["problem"] else "") for row in rows]))
    return aligned(columns, table["notes"])


def outcome(record: Record) -> str:
    """What became of a trial, in a few words."""
    if record["status"] == "failed":
        return f"failed: {record['problem']}"
    parts = [record["status"]]
    if record["result"] is not None:
        parts.append(f"accuracy {percent(record['result']['mean'])} %")
    if record["rewards"]:
        parts.append(f"reward by round {' '.join(map(percent, record['rewards']))}")
    return ", ".join([*parts, f"{record['seconds'] or 0.0:.0f} s"])
