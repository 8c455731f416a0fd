"""Where passages come from: one line of a config each.

    fictional                                   the project's own demo passages, of the split that is asked for
    path/to/file.json                           a list of {title, context, questions: [{question, answer}]}, gzipped (.json.gz) or not,
                                                or an evaluation that the original wrote (`query_server.py`), gzipped or not
    datasets:rajpurkar/squad                    a data set on the Hugging Face hub; `@CONFIG` after the id picks a configuration
    datasets:/local/folder                      a folder that `datasets` can load, or one that `save_to_disk` wrote
    tfds:squad/v1.1@/data/dir                   a builder that `tensorflow_datasets` has prepared; TensorFlow itself is not needed

Each may end in `#SPLIT` (default: the split that is asked for, "train" or "validation") and then in `[START:STOP]`, which counts
passages. Rows are passages with their questions, or questions with SQuAD's columns (title, context, question, answers), which are
grouped by (title, context) in order of first appearance. Passages may come with self-edits, a list of texts under `completions`.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import pathlib
import random
import re
import unicodedata
import urllib.parse
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from seal_jax.errors import SealError
from seal_jax.tasks.base import Context
from seal_jax.tasks.knowledge import original

log = logging.getLogger(__name__)

DATA = pathlib.Path(__file__).parent / "data"
FORM = "a list of {title, context, questions: [{question, answer}]}"
LINES = "fictional, a JSON file, datasets:HUB_ID_OR_FOLDER or tfds:NAME@DATA_DIR"


@dataclasses.dataclass(frozen=True)
class Source:
    """A source line, taken apart. `folder` is what follows `@`: the configuration of `datasets`, the data directory of `tfds`."""

    line: str
    kind: str  # "fictional", "json", "datasets" or "tfds"
    name: str
    folder: str | None
    split: str | None
    start: int
    stop: int | None


def parse(line: str) -> Source:
    """Takes a source line apart; `SealError` if it has no name."""
    match = re.fullmatch(r"(.+?)(?:#([\w.\-]+))?(?:\[(\d*):(\d*)\])?", line.strip())
    if not match:
        raise SealError(f"data source {line!r}: expected {LINES}")
    body, split, start, stop = match.groups()
    if os.path.isfile(line):  # a file whose name looks as if it had a split
        body, split, start, stop = line, None, None, None
    kind, _, name = body.partition(":")
    if kind not in ("datasets", "tfds"):
        kind, name = ("fictional" if body == "fictional" else "json"), body
    folder = None
    if kind in ("datasets", "tfds") and not os.path.exists(name):
        name, _, folder = name.partition("@")
    if not name:
        raise SealError(f"data source {line!r}: nothing follows {kind!r}")
    return Source(line, kind, name, folder or None, split, int(start or 0), int(stop) if stop else None)


def original_order(n: int, seed: int = 42) -> list[int]:
    """The order in which the original takes the `n` passages of a file (`make_squad_data.py`, `main`): a seeded shuffle of indices."""
    order = list(range(n))
    random.Random(seed).shuffle(order)
    return order


def load(line: str, split: str, shuffle: int | None = None) -> list[Context]:
    """The usable passages of a source line, as stored or in `original_order` with the seed `shuffle`, before `[START:STOP]` applies.

    An item that cannot be used is skipped; one warning tells how many there were, why, and names examples. `Context.id` holds the
    item's position in the source, and `Context.payload` is {"context": str, "questions": [{"question": str, "answer": str}]}, with
    "completions": [str] where the item has self-edits.
    Raises `SealError` for a source that is missing, unreadable or holds nothing usable.
    """
    source = parse(line)
    reader = {"fictional": _read_fictional, "json": _read_json, "datasets": _read_datasets, "tfds": _read_tfds}[source.kind]
    try:
        items = group_rows(reader(source, split))
    except SealError:
        raise
    except Exception as error:  # what `datasets` and `tensorflow_datasets` raise is of many kinds, down to pyarrow's and protobuf's
        raise SealError(f"data source {line}, split {source.split or split!r}: {_one_line(error)}") from error
    order = list(range(len(items))) if shuffle is None else original_order(len(items), shuffle)
    chosen = order[source.start : source.stop]
    if not chosen:
        raise SealError(f"data source {line}: no passages ({len(items)} in the source); expected {FORM}")
    skipped: dict[str, list[str]] = defaultdict(list)
    contexts = [c for c in (_read_item(items[i], i, skipped) for i in chosen) if c is not None]
    report = "; ".join(f"{len(where)} {reason} ({', '.join(where[:2])}{', ...' * (len(where) > 2)})" for reason, where in skipped.items())
    if not contexts:
        raise SealError(f"data source {line}: none of its {len(chosen)} items is usable: {report}; expected {FORM}")
    if skipped:
        counts = [{"source": line, "reason": _whole(reason), "count": len(where)} for reason, where in skipped.items()]
        lost = len(chosen) - len(contexts)
        log.warning("data source %s: %d of %d items skipped: %s", line, lost, len(chosen), report, extra={"skipped": counts})
    return contexts


# ---- rows -> passages -----------------------------------------------------------------------------------------------------------


def group_rows(rows: Iterable[Any]) -> list[Any]:
    """Rows with SQuAD's columns as one item a passage, in order of first appearance; any other row is an item as it is."""
    items: list[Any] = []
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for row in map(_plain, rows):
        if not isinstance(row, Mapping) or "questions" in row or "question" not in row:
            items.append(row)
            continue
        key = (str(row.get("title") or ""), str(row.get("context") or ""))
        if key not in groups:
            # SQuAD's columns hold titles as in a Wikipedia address: "Jehovah%27s_Witnesses".
            groups[key] = {"title": urllib.parse.unquote(key[0]).replace("_", " "), "context": key[1], "questions": []}
            items.append(groups[key])
        groups[key]["questions"].append(row)
    return items


def _plain(value: Any) -> Any:
    """Bytes as text and arrays as lists, at any depth (tensorflow_datasets gives both); text is made encodable."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, str):  # JSON can hold lone surrogates, which no tokenizer and no file takes
        return value.encode("utf-8", errors="replace").decode("utf-8")
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return _plain(value.tolist()) if hasattr(value, "tolist") else value


def _read_item(item: Any, index: int, skipped: dict[str, list[str]]) -> Context | None:
    """One passage; None, with the reason noted in `skipped`, if it cannot be used. Questions that cannot be used are noted too."""
    if not isinstance(item, Mapping):
        skipped[f"not a record but {type(item).__name__}"].append(f"item {index}")
        return None
    title, context = item.get("title"), item.get("context")
    title = "" if title is None else title
    where = f"item {index} {str(title)[:40]!r}"
    if not isinstance(title, str):
        skipped["with a title that is not text"].append(where)
        return None
    if context is None or (isinstance(context, str) and not context.strip()):
        skipped["with an empty passage"].append(where)
        return None
    if not isinstance(context, str):
        skipped["with a passage that is not text"].append(where)
        return None
    given = item.get("questions")
    if isinstance(given, Mapping):  # `datasets` and `tfds` store a sequence of records as a record of sequences
        columns = [value if isinstance(value, list) else [value] for value in given.values()]
        given = [dict(zip(given, values, strict=True)) for values in zip(*columns, strict=False)]
    questions = []
    for entry in given if isinstance(given, list) else []:
        question, answer = (_text(entry.get("question")), _answer(entry)) if isinstance(entry, Mapping) else ("", "")
        if question and answer:
            questions.append({"question": question, "answer": answer})
        else:
            reason = "question without an answer" if question else "question without text"
            skipped[reason].append(f"{where}: {question[:60]!r}" if question else where)
    if not questions:
        skipped["with no usable question"].append(where)
        return None
    payload: dict[str, Any] = {"context": context, "questions": questions}
    if isinstance(completions := item.get("completions"), list):
        payload["completions"] = [text for text in completions if isinstance(text, str) and text.strip()]
        if lost := len(completions) - len(payload["completions"]):
            skipped["self-edit without text"] += [where] * lost
    return Context(f"{index:05d}-{_slug(title)}", title, payload)


def _whole(reason: str) -> str:
    """A reason that stands alone: "item with an empty passage"."""
    return reason if reason.startswith(("question", "self-edit")) else f"item {reason}"


def _text(value: Any) -> str:
    """Text or a number as stripped text, anything else as ""."""
    return str(value).strip() if isinstance(value, (str, int, float)) and not isinstance(value, bool) else ""


def _answer(entry: Mapping[str, Any]) -> str:
    """The reference answer of {answer: ...} or of SQuAD's {answers: {text: [...]}} (the first), or ""."""
    answers: Any = entry.get("answer", entry.get("answers"))
    if isinstance(answers, Mapping):
        answers = answers.get("text")
    if isinstance(answers, list):
        answers = answers[0] if answers else ""
        answers = answers.get("text") if isinstance(answers, Mapping) else answers
    return _text(answers)


def _slug(title: str) -> str:
    ascii_title = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_title).strip("-")[:40].strip("-") or "untitled"


# ---- readers: source -> rows ----------------------------------------------------------------------------------------------------


def _read_fictional(source: Source, split: str) -> list[Any]:
    split = source.split or split
    path = DATA / f"fictional_{split}.json"
    if not path.is_file():
        known = sorted(p.stem.removeprefix("fictional_") for p in DATA.glob("fictional_*.json"))
        raise SealError(f"data source {source.line}: no split {split!r}; there are: {', '.join(known) or 'none'}")
    return _json_list(path, source)


def _read_json(source: Source, split: str) -> list[Any]:
    path = pathlib.Path(source.name).expanduser()
    if os.path.isdir(path):
        raise SealError(f"data source {source.line}: {path} is a folder; for a data set of `datasets` write datasets:{path}")
    if not os.path.isfile(path):
        close = difflib.get_close_matches(source.name.partition(":")[0], ["fictional", "datasets", "tfds"], 1, 0.6)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        named = "" if str(path) == source.line else f": {path}"
        raise SealError(
            f"data source {source.line}: no such file{named}{hint}; expected fictional, a JSON file, datasets:NAME or tfds:NAME@DIR"
        )
    if source.split:
        raise SealError(f"data source {source.line}: a JSON file has no splits; leave out #{source.split}")
    return _json_list(path, source)


def _json_list(path: pathlib.Path, source: Source) -> list[Any]:
    data = original.read_json(path, f"data source {source.line}")
    items = original.passages(data)
    if items is None:
        raise SealError(f"data source {source.line}: {path} holds {type(data).__name__}; expected {FORM}")
    return items


def _read_datasets(source: Source, split: str) -> Iterable[Any]:
    import datasets  # here, because importing it takes seconds

    split, path = source.split or split, pathlib.Path(source.name).expanduser()
    if os.path.isfile(path / "dataset_dict.json") or os.path.isfile(path / "state.json"):
        data = datasets.load_from_disk(str(path))
        if not isinstance(data, datasets.DatasetDict):
            if source.split and source.split != str(data.split):
                raise SealError(f"data source {source.line}: this saved data set has no split {source.split!r}; leave out the #")
            return data
        if split not in data:
            raise SealError(f"data source {source.line}: no split {split!r}; there are: {', '.join(data)}; add #SPLIT to choose one")
        return data[split]
    if os.path.isdir(path):
        return datasets.load_dataset(str(path), source.folder, split=split)
    if os.path.exists(path) or source.name.count("/") > 1 or source.name.startswith((".", "~", "/")):
        raise SealError(f"data source {source.line}: {path} is not a folder; expected {LINES}")
    return _load_from_hub(source, split)


def _load_from_hub(source: Source, split: str) -> Iterable[Any]:
    import datasets
    import huggingface_hub

    # Asked once and briefly, because `datasets` itself tries for half a minute before it gives up.
    unreachable = None
    try:
        huggingface_hub.HfApi().dataset_info(source.name, timeout=10.0)
    except huggingface_hub.errors.RepositoryNotFoundError:
        raise SealError(f"data source {source.line}: the hub has no data set {source.name!r}, or it needs a login") from None
    except Exception as error:  # no network, offline mode, a proxy's refusal: a copy in the cache may still serve
        unreachable = error
    offline = datasets.config.HF_HUB_OFFLINE
    try:
        datasets.config.HF_HUB_OFFLINE = offline or unreachable is not None
        return datasets.load_dataset(source.name, source.folder, split=split)
    except ConnectionError as error:
        raise SealError(
            f"data source {source.line}: the hub cannot be reached and no copy is in the cache ({_one_line(unreachable or error)}); "
            "give a local folder or a JSON file"
        ) from None
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _read_tfds(source: Source, split: str) -> Iterable[Any]:
    import tensorflow_datasets as tfds
    from etils import epath

    split = source.split or split
    root = epath.Path(source.folder or "~/tensorflow_datasets").expanduser()
    folder = root / source.name.replace(":", "/")
    if not (folder / "dataset_info.json").exists():
        versions = [p for p in folder.iterdir() if re.fullmatch(r"\d+\.\d+\.\d+", p.name)] if folder.exists() else []
        if not versions:
            raise SealError(f"data source {source.line}: no prepared builder in {folder}; expected tfds:NAME/CONFIG@DATA_DIR")
        folder = max(versions, key=lambda p: [int(part) for part in p.name.split(".")])
    builder = tfds.builder_from_directory(folder)
    if split not in builder.info.splits:
        known = ", ".join(builder.info.splits)
        raise SealError(f"data source {source.line}: no split {split!r}; there are: {known}; add #SPLIT to choose one")
    if builder.info.file_format == tfds.core.FileFormat.TFRECORD:
        return _tfrecord_rows(builder, split)
    return builder.as_data_source(split)


def _tfrecord_rows(builder: Any, split: str) -> Iterable[Any]:
    """The rows of a split in TFRecord files, the format that builders prepare by default; `as_data_source` cannot read it.

    A record is: its length (uint64, little-endian), a checksum of that (4 bytes), the data, a checksum of it (4 bytes). The checksums
    are not verified; a length that does not fit the file is an error.
    """
    from etils import epath

    for part in builder.info.splits[split].file_instructions:
        with epath.Path(part.filename).open("rb") as file:
            while header := file.read(12):
                length = int.from_bytes(header[:8], "little")
                record = file.read(length + 4)
                if len(record) != length + 4:
                    raise ValueError(f"{part.filename} is cut off or not a TFRecord file")
                yield builder.info.features.deserialize_example_np(record[:length])


def _one_line(error: object, limit: int = 300) -> str:
    text = " ".join(str(error).split())
    return (text if len(text) <= limit else text[: limit - 3] + "...") or type(error).__name__
