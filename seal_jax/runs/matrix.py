"""The continual experiment's accuracy matrices. Host code, numpy only.

A matrix of T passages is [T + 1, T]: row 0 is the policy before any edit on every passage, row t the policy after t edits on the first
t passages, so that below row 0 it is lower triangular. Cells above the diagonal, and cells of which nothing is known, are NaN.

Source: `continual_self_edits.py` and `average_results.py` of the original, which write 0 above the diagonal; the measures are those of
Lopez-Paz and Ranzato (2017), "Gradient episodic memory for continual learning".
"""

from __future__ import annotations

import gzip
import json
import os
import pathlib
import random
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from seal_jax.errors import SealError


class Summary(NamedTuple):
    """Matrices of several sequences of passages, cell by cell."""

    mean: np.ndarray  # [T + 1, T] float64, accuracy in [0, 1]
    std: np.ndarray  # [T + 1, T] float64, the sample's; 0 where one sequence is known
    sequences: int
    model: str | None = None  # what an imported summary names as its model


def sequences(count: int, length: int, size: int, seed: int) -> list[list[int]]:
    """`count` sequences of `length` indices of passages out of `size`, no passage twice in one sequence.

    They are those that the original's `main` draws with `--seed`. Raises `SealError` if there are fewer passages than a sequence has.
    """
    if length > size:
        raise SealError(f"continual: a sequence of {length} passages was asked for, but there are {size}; ask for fewer or give more data")
    draw = random.Random(seed)
    return [draw.sample(range(size), length) for _ in range(count)]


def from_rows(rows: Sequence[Sequence[float | None]] | np.ndarray) -> np.ndarray:
    """One matrix from its rows of T, 1, 2, ... cells (what follows in a row is not read; None: not known). Last rows may be missing."""
    length = len(rows[0])
    matrix = np.full((length + 1, length), np.nan)
    for t, row in enumerate(rows):
        cells = row if t == 0 else row[:t]
        matrix[t, : len(cells)] = [np.nan if cell is None else cell for cell in cells]
    return matrix


def from_records(start: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The matrices [S, T + 1, T] of each method, from the units "continual/start" and "continual/steps/..." of a run, finished or not."""
    order = start["sequences"]
    base = [[start["answers"][name]["reward"] for name in names] for names in order]
    blank = np.stack([from_rows([row]) for row in base])
    found: dict[str, np.ndarray] = {}
    for step in steps:
        t = step["step"] + 1
        for lane in step["lanes"]:
            names = order[lane["sequence"]][:t]
            rewards = [lane["answers"][name]["reward"] for name in names]
            found.setdefault(lane["method"], blank.copy())[lane["sequence"], t, :t] = [np.nan if r is None else r for r in rewards]
    return found


def aggregate(matrices: np.ndarray) -> Summary:
    """Mean and sample standard deviation of each cell over the sequences that know it, of matrices [S, T + 1, T]."""
    known = np.isfinite(matrices).sum(axis=0)
    mean = _mean(matrices, axis=0)
    squares = np.nansum((matrices - mean) ** 2, axis=0)
    std = np.where(known > 1, np.sqrt(squares / np.maximum(known - 1, 1)), np.where(known == 1, 0.0, np.nan))
    return Summary(mean, std, len(matrices))


def average(summaries: Sequence[Summary]) -> Summary:
    """Summaries of runs with equally many sequences as one, as `average_results.py` does: plain means, of the deviations too."""
    return Summary(
        np.mean([s.mean for s in summaries], axis=0),
        np.mean([s.std for s in summaries], axis=0),
        sum(s.sequences for s in summaries),
        summaries[0].model,
    )


# ---- measures: matrices [..., T + 1, T] -> [...], NaN where nothing is known ---------------------------------------------------------


def shown(matrices: Mapping[str, np.ndarray]) -> dict[str, dict[str, list[list[float | None]]]]:
    """Mean and standard deviation over sequences of each method's matrices [S, T + 1, T], as JSON data: null for what is not known."""
    summaries = {method: aggregate(values) for method, values in matrices.items()}
    return {method: {"mean": plain(summary.mean), "std": plain(summary.std)} for method, summary in summaries.items()}


def plain(values: np.ndarray) -> list[list[float | None]]:
    """A matrix as JSON data."""
    return [[float(v) if np.isfinite(v) else None for v in row] for row in values]


def newest(matrices: np.ndarray) -> np.ndarray:
    """The mean of the diagonal: each passage right after its own edit."""
    return _mean(_diagonal(matrices), axis=-1)


def earlier(matrices: np.ndarray) -> np.ndarray:
    """The mean of the last row without the last passage: what is left of earlier passages at the end. NaN for one passage."""
    return _mean(matrices[..., -1, :-1], axis=-1)


def backward(matrices: np.ndarray) -> np.ndarray:
    """Backward transfer: the mean over the passages before the last of (at the end - right after its own edit). Forgetting is below 0."""
    return _mean(matrices[..., -1, :-1] - _diagonal(matrices)[..., :-1], axis=-1)


def _diagonal(matrices: np.ndarray) -> np.ndarray:
    return np.diagonal(matrices[..., 1:, :], axis1=-2, axis2=-1)


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """`np.nanmean`, without its warning where all are NaN."""
    known = np.isfinite(values).sum(axis=axis)
    return np.where(known > 0, np.nansum(values, axis=axis) / np.maximum(known, 1), np.nan)


# ---- the original's files -------------------------------------------------------------------------------------------------------------


def read_original(path: str | os.PathLike[str]) -> Summary:
    """A result of the original: its `overall_results.json` or a `summary_*.json` (either may be .gz), or a folder of summaries.

    Those under a folder are put together by `average`. Raises `SealError` if there is none, one is malformed, or two do not fit together.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_dir():
        return _read(path)
    files = sorted(file for pattern in ("summary_*.json", "summary_*.json.gz") for file in path.rglob(pattern))
    if not files:
        raise SealError(f"{path}: no summary_*.json of the original in this folder")
    found = [_read(file) for file in files]
    for file, summary in zip(files, found, strict=True):
        for what, one, other in (
            ("passages", summary.mean.shape[1], found[0].mean.shape[1]),
            ("sequences", summary.sequences, found[0].sequences),
            ("model", summary.model, found[0].model),
        ):
            if one != other:
                raise SealError(f"{file}: {what} {one}, but {other} in {files[0]}; only equal runs can be averaged")
    return average(found)


def _read(path: pathlib.Path) -> Summary:
    try:
        data = path.read_bytes()
        content = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    except (EOFError, gzip.BadGzipFile, zlib.error, ValueError, RecursionError) as error:
        raise SealError(f"{path}: not readable as JSON: {error}") from None
    except OSError as error:
        raise SealError(f"{path}: cannot read: {(error.strerror or str(error)).lower()}") from None
    try:
        tables = [np.asarray(content[f"{what}_over_sequences"], np.float64) for what in ("mean", "std")]
        for cells in tables:
            if cells.ndim != 2 or cells.shape[0] != cells.shape[1] + 1 or cells.shape != tables[0].shape:
                raise ValueError(f"a matrix of shape {cells.shape}, expected T + 1 rows of T cells")
        count, model = content["n_sequences"], content.get("base_model")
        if type(count) is not int or count < 1:
            raise ValueError(f"n_sequences is {count!r}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise SealError(f"{path}: not a result file of the original's continual experiment: {what}") from None
    mean, std = (from_rows(cells) for cells in tables)
    return Summary(mean, std, count, None if model is None else str(model))
