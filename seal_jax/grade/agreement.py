"""How far a grader can be trusted: its verdicts against recorded ones.

The file of cases is JSON, gzipped or not:

    {"answer_fields": ["prediction", "verdict", ...],
     "cases": [{"title": ..., "question": ..., "gold": ..., "answers": [[prediction, verdict, ...], ...]}, ...]}

A case may have a "split". Where none has, titles are split in two halves, "dev" and "held", by a hash of the title, so that a rule made
on one half can be measured on the other.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import math
import os
import zlib
from collections.abc import Sequence
from typing import Any

from seal_jax import rng
from seal_jax.errors import SealError
from seal_jax.grade.base import GradeItem, Grader
from seal_jax.progress import bar

BATCH = 256  # items a call of the grader; the progress bar moves once a batch


@dataclasses.dataclass(frozen=True)
class RecordedCase:
    """One answer with the verdict that someone else gave it."""

    item: GradeItem
    verdict: bool
    split: str


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Rates in [0, 1] over the graded cases, "right" being the positive class; nan where a denominator is 0.

    `n` counts all cases, `ungraded` those that are left out of the rates. `kappa` is Cohen's.
    """

    n: int
    ungraded: int
    accuracy: float
    precision: float
    recall: float
    kappa: float


def split_of(title: str) -> str:
    """The half that a title belongs to where the file does not say: "held" for an odd first byte of its sha256, else "dev"."""
    return "held" if hashlib.sha256(title.encode("utf-8", "surrogatepass")).digest()[0] % 2 else "dev"


def read_cases(path: str | os.PathLike[str]) -> list[RecordedCase]:
    """The recorded cases in the file. Raises `SealError` that names the file, the case and the fault."""
    data = _read_json(path)
    if not isinstance(data, dict) or not isinstance(data.get("cases"), list):
        raise SealError(f"{path}: expected a JSON object with a list 'cases'")
    fields = data.get("answer_fields", ["prediction", "verdict"])
    if not isinstance(fields, list) or not {"prediction", "verdict"} <= {f for f in fields if isinstance(f, str)}:
        raise SealError(f"{path}: 'answer_fields' must be a list that has 'prediction' and 'verdict'")
    prediction_at, verdict_at = fields.index("prediction"), fields.index("verdict")
    recorded = []
    for index, case in enumerate(data["cases"]):
        where = f"{path}: case {index}"
        if not isinstance(case, dict):
            raise SealError(f"{where}: expected an object, found {type(case).__name__}")
        for key in ("title", "question", "gold"):
            if not isinstance(case.get(key), str):
                raise SealError(f"{where}: {key!r} must be text" if key in case else f"{where}: has no {key!r}")
        split = case.get("split", split_of(case["title"]))
        if not isinstance(split, str):
            raise SealError(f"{where}: 'split' must be text")
        if not isinstance(case.get("answers"), list):
            raise SealError(f"{where}: 'answers' must be a list")
        for number, answer in enumerate(case["answers"]):
            if not isinstance(answer, list) or len(answer) <= max(prediction_at, verdict_at):
                raise SealError(f"{where}, answer {number}: expected a list of {', '.join(map(str, fields))}")
            prediction, verdict = answer[prediction_at], answer[verdict_at]
            if not isinstance(prediction, str):
                raise SealError(f"{where}, answer {number}: 'prediction' must be text")
            if not isinstance(verdict, bool):
                raise SealError(f"{where}, answer {number}: 'verdict' must be true or false")
            recorded.append(RecordedCase(GradeItem(case["title"], case["question"], case["gold"], prediction), verdict, split))
    return recorded


def agreement(verdicts: Sequence[bool | None], references: Sequence[bool]) -> Agreement:
    """How well `verdicts` agree with `references`, one to one."""
    if len(verdicts) != len(references):
        raise ValueError(f"{len(verdicts)} verdicts for {len(references)} references")
    graded = [(v, r) for v, r in zip(verdicts, references, strict=True) if v is not None]
    n = len(graded)
    both = sum(v and r for v, r in graded)
    said = sum(v for v, _ in graded)
    true = sum(r for _, r in graded)
    accuracy = _ratio(sum(v == r for v, r in graded), n)
    chance = _ratio(said * true + (n - said) * (n - true), n * n)
    kappa = _ratio(accuracy - chance, 1.0 - chance)
    return Agreement(len(verdicts), len(verdicts) - n, accuracy, _ratio(both, said), _ratio(both, true), kappa)


def run(cases_path: str | os.PathLike[str], grader: Grader, split: str | None = None, limit: int | None = None) -> str:
    """Grades the recorded cases and returns a printable table; a bar shows the progress of a slow grader.

    `split` keeps the cases of one split; `limit` keeps that many, drawn at random, always the same. Raises `SealError` for a malformed file
    or if no case is left.
    """
    if limit is not None and limit < 1:
        raise SealError(f"limit={limit}: expected at least 1")
    recorded = read_cases(cases_path)
    if split is not None:
        known = sorted({case.split for case in recorded})
        recorded = [case for case in recorded if case.split == split]
        if not recorded:
            raise SealError(f"{cases_path}: no case of split {split!r}; it has: {', '.join(known) or 'no cases'}")
    if not recorded:
        raise SealError(f"{cases_path}: no cases")
    if limit is not None and limit < len(recorded):
        # Not each n-th: a file may list the answers of each case in an order, unadapted ones first, say.
        recorded = [recorded[i] for i in sorted(rng.generator(0, "agreement").choice(len(recorded), limit, replace=False))]
    verdicts: list[bool | None] = []
    with bar(f"grading ({grader.name})", len(recorded), "answer") as progress:
        for start in range(0, len(recorded), BATCH):
            items = [case.item for case in recorded[start : start + BATCH]]
            verdicts += grader.grade(items)
            progress.update(len(items))
    return table(grader.name, agreement(verdicts, [case.verdict for case in recorded]))


def table(name: str, result: Agreement) -> str:
    """One grader's agreement as two lines of text."""
    header = ("grader", "cases", "ungraded", "accuracy", "precision", "recall", "kappa")
    rates = (result.accuracy, result.precision, result.recall, result.kappa)
    row = (name, str(result.n), str(result.ungraded), *("-" if math.isnan(rate) else f"{rate:.3f}" for rate in rates))
    widths = [max(len(h), len(v)) for h, v in zip(header, row, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True)))
        for line in (header, row)
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _read_json(path: str | os.PathLike[str]) -> Any:
    """The JSON in a file that may be gzipped, whatever its name."""
    try:
        with open(path, "rb") as file:
            raw = file.read()
        if raw[:2] == b"\x1f\x8b":  # gzip's magic number
            raw = gzip.decompress(raw)
        return json.loads(raw)
    except FileNotFoundError:
        raise SealError(f"{path}: no such file of cases") from None
    except (OSError, EOFError, zlib.error) as error:
        raise SealError(f"{path}: not readable: {error}") from None
    except (ValueError, RecursionError) as error:
        raise SealError(f"{path}: not valid JSON: {error}") from None
