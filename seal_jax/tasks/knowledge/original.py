"""Files that the original implementation published, read into our records. Host code.

    passages with self-edits    a list of {title, context, questions: [{question, answer}], completions: [text], prompt}
                                (`make_squad_data.py`; its folder data/synthetic_data)
    a run over passages         {articles: [{title, context, completions: [{text, questions: [{rep, question, answer, baseline_answer,
                                adapter_answer, baseline_correct, adapter_correct}]}]}], ...}: an evaluation, or the "rank" file of a
                                round of ReST-EM (`query_server.py`; results/query_server)
    continued pretraining       {server_reply: {baseline_correct: [verdict], adapter_correct: [verdict]}, n_articles, per_article, ...}
                                (`CPT.py`; results/cpt)

All are JSON, gzipped (.gz) or not. The first two are data sources too (`task.train`, `task.validation`), and their self-edits stand in
for the policy's with `task.train_edits=given` and `task.validation_edits=given`. A "rank" file is one for `rest_em.rewards`. Any run, and
continued pretraining, is one for `evaluate.beside`; the latter has one list of verdicts for all passages, and `PATH@PASSAGES` names the
passages or the run over them whose numbers of questions tell which verdicts belong together. Whatever is not of this form is refused in
one line that names the place in the file.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import pathlib
import statistics
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from seal_jax.errors import SealError
from seal_jax.tasks.base import Context, Figure, Recorded, Score, Trial

KINDS = {
    str: "text",
    list: "a list",
    dict: "an object",
    int: "a whole number",
}


@dataclasses.dataclass(frozen=True)
class Article:
    """A passage of a run with what was measured on it: its questions and reference answers, and the trials of each self-edit."""

    title: str
    context: str
    questions: tuple[tuple[str, str], ...]
    results: Recorded


def read_json(path: str | os.PathLike[str], where: str) -> Any:
    """The JSON data of a file. `where` stands before what is wrong with it."""
    path = pathlib.Path(path).expanduser()
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise SealError(f"{where}: no such file" + ("" if where.endswith(f"={path}") else f": {path}")) from None
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:  # ValueError: not JSON, not UTF-8
        raise SealError(f"{where}: {path} is not readable as JSON: {' '.join(str(error).split())[:300]}") from None


def passages(data: Any) -> list[Any] | None:
    """The items of a passage file, or those that the articles of a run would be in one; None if the data are neither.

    Nothing is checked but what must be there to tell: what an item lacks is for its reader to find.
    """
    if isinstance(data, Mapping) and isinstance(data.get("articles"), list):
        return [_passage(article) for article in data["articles"]]
    return data if isinstance(data, list) else None


def _passage(article: Any) -> Any:
    completions = article.get("completions") if isinstance(article, Mapping) else None
    if not isinstance(completions, list) or not all(isinstance(c, Mapping) for c in completions):
        return article
    asked = [q for c in completions[:1] for q in (c.get("questions") or []) if isinstance(q, Mapping)]
    once = [q for q in asked if q.get("rep") == asked[0].get("rep")]  # the others are the same questions again
    return {**article, "questions": once, "completions": [c.get("text") for c in completions]}


# ---- a run over passages ------------------------------------------------------------------------------------------------------------


def recorded(path: str, contexts: Sequence[Context]) -> list[Recorded]:
    """What the run in the file `path` measured on each of `contexts`, found by title and passage.

    The trials of a self-edit are the repetitions of the file, all of them. Raises `SealError` if a context is not in the file, or has
    other questions there.
    """
    where = f"rest_em.rewards={path}"
    found: dict[tuple[str, str], Article] = {}
    for article in _articles(read_json(path, where), where):
        found.setdefault((article.title.strip(), article.context.strip()), article)
    keys = [(c.title.strip(), c.payload["context"].strip()) for c in contexts]
    if missing := [c.id for c, key in zip(contexts, keys, strict=True) if key not in found]:
        raise SealError(
            f"{where}: {len(missing)} of the {len(contexts)} train contexts are not among its {len(found)} passages ({missing[0]}); "
            "set task.train to the passages that it was made from, and rest_em.contexts to their number or less"
        )
    for context, key in zip(contexts, keys, strict=True):
        if [q for q, _ in found[key].questions] != [q["question"] for q in context.payload["questions"]]:
            raise SealError(f"{where}: the questions about {context.id} are others than those of task.train")
    return [found[key].results for key in keys]


def _articles(data: Any, where: str) -> list[Article]:
    if not isinstance(data, dict) or "articles" not in data:
        raise SealError(f"{where}: no run over passages of the original's (an object with articles)")
    articles = _get(data, "articles", list, f"{where}: ")
    if not articles:
        raise SealError(f"{where}: articles: expected some, found none")
    return [_article(article, f"{where}: articles[{i}]") for i, article in enumerate(articles)]


def _article(data: Any, where: str) -> Article:
    title, context = _get(data, "title", str, where), _get(data, "context", str, where)
    edits, asked = [], []
    for i, completion in enumerate(_get(data, "completions", list, where)):
        here = f"{where}.completions[{i}]"
        by_rep: dict[int, list[Any]] = {}
        for j, entry in enumerate(_get(completion, "questions", list, here)):
            by_rep.setdefault(_get(entry, "rep", int, f"{here}.questions[{j}]"), []).append((entry, f"{here}.questions[{j}]"))
        reps = [by_rep[rep] for rep in sorted(by_rep)]
        asked += [tuple((_get(e, "question", str, at).strip(), _get(e, "answer", str, at).strip()) for e, at in rep) for rep in reps]
        edits.append((_get(completion, "text", str, here), reps))
    if not asked:
        raise SealError(f"{where}: expected a self-edit with questions, found none")
    if len(set(asked)) > 1:
        raise SealError(f"{where}: the questions differ between its self-edits or their repetitions")
    first = next(reps[0] for _, reps in edits if reps)
    results = Recorded(_trial(first, "baseline"), tuple((text, tuple(_trial(rep, "adapter") for rep in reps)) for text, reps in edits))
    return Article(title, context, asked[0], results)


def _trial(entries: Sequence[tuple[Any, str]], whose: str) -> Trial:
    """The answers and verdicts of one repetition: the "baseline"'s or the "adapter"'s.

    The reward is rounded to four places, as the original's server sends it: its choice among nearly equal self-edits hangs on that.
    """
    outputs = tuple(_get(entry, f"{whose}_answer", str, at) for entry, at in entries)
    verdicts = [v for entry, at in entries for v in _verdicts([entry.get(f"{whose}_correct")], f"{at}.{whose}_correct")]
    score = Score.of(verdicts)
    return Trial(outputs, score if score.reward is None else dataclasses.replace(score, reward=round(score.reward, 4)))


# ---- rows of the result table -------------------------------------------------------------------------------------------------------


def figures(line: str) -> list[Figure]:
    """The rows that the results in a file are, of a run or of continued pretraining. `line` is its path, or `PATH@PASSAGES`.

    Continued pretraining without its passages gives means over questions, without an interval.
    Raises `SealError` for a file that is missing or of another form, and for passages that are not those of the file.
    """
    where = f"evaluate.beside={line}"
    # A file may have an @ in its name.
    path, _, about = (line, "", "") if os.path.isfile(os.path.expanduser(line)) else line.partition("@")
    data = read_json(path, where)
    name = data.get("exp_name") if isinstance(data, dict) else None
    policy = f"original: {name if isinstance(name, str) and name else _stem(path)}"
    if isinstance(data, dict) and "server_reply" in data:
        return _pretraining(data, about, policy, where)
    if about:
        raise SealError(f"{where}: what follows @ is for files of continued pretraining; leave it out")
    if not isinstance(data, dict) or "articles" not in data:
        raise SealError(f"{where}: neither an evaluation of the original's (articles) nor its continued pretraining (server_reply)")
    articles = _articles(data, where)
    unadapted = [a.results.unadapted.score for a in articles]
    edits = [[[trial.score for trial in trials] for _, trials in a.results.edits] for a in articles]
    questions = sum(len(a.questions) for a in articles)

    def figure(method: str, statistic: str, values: list[float | None], scores: list[Score]) -> Figure:
        return Figure(policy, method, statistic, len(values), questions, sum(s.verdicts.count(None) for s in scores), tuple(values))

    means = [_mean([_mean([score.reward for score in trials]) for trials in article]) for article in edits]
    return [
        figure("no adaptation", "single", [score.reward for score in unadapted], unadapted),
        figure("passage + self-edit", "mean of K", means, [score for article in edits for trials in article for score in trials]),
    ]


def _pretraining(data: Mapping[str, Any], about: str, policy: str, where: str) -> list[Figure]:
    reply, count = _get(data, "server_reply", dict, f"{where}: "), _get(data, "n_articles", int, f"{where}: ")
    methods = {"no adaptation": "baseline_correct", "continued pretraining": "adapter_correct"}
    verdicts = {
        key: _verdicts(_get(reply, key, list, f"{where}: server_reply"), f"{where}: server_reply.{key}") for key in methods.values()
    }
    questions = len(verdicts["adapter_correct"])
    if len(verdicts["baseline_correct"]) != questions or not questions:
        raise SealError(f"{where}: server_reply: expected as many verdicts of both models, and some")
    overall = {key: Score.of(found).reward for key, found in verdicts.items()}
    sizes = _sizes(about, verdicts["adapter_correct"], data.get("per_article"), where) if about else None
    note = "means over questions; which belong to one passage is not in the file" if sizes is None else (
        f"means over passages; over the {questions} questions, as the file has it, they are "
        + " and ".join("–" if mean is None else f"{100 * mean:.1f}" for mean in overall.values())
    )  # fmt: skip
    found = []
    for method, key in methods.items():
        values = () if sizes is None else tuple(Score.of(part).reward for part in _cut(verdicts[key], sizes))
        contexts = count if sizes is None else len(sizes)
        found.append(
            Figure(policy, method, "single", contexts, questions, verdicts[key].count(None), values, overall[key], f"{policy}: {note}")
        )
    return found


def _sizes(about: str, verdicts: Sequence[bool | None], last: Any, where: str) -> list[int]:
    """How many questions each passage has. `last`: the verdicts of the last passage of each title, by which the order can be checked."""
    items = passages(read_json(about, where))
    titles, sizes = [], []
    for i, item in enumerate(items if items is not None else [None]):
        titles.append(_get(item, "title", str, f"{where}: passage {i}"))
        sizes.append(len(_get(item, "questions", list, f"{where}: passage {i}")))
    parts = dict(zip(titles, _cut(verdicts, sizes), strict=True))  # of equal titles the last remains, as in the original
    known = {t: v.get("adapter_correct") for t, v in last.items() if isinstance(v, Mapping)} if isinstance(last, Mapping) else {}
    if sum(sizes) != len(verdicts) or 0 in sizes or any(title not in parts or list(parts[title]) != known[title] for title in known):
        raise SealError(f"{where}: {about} has other passages, or in another order, than the file is about ({len(verdicts)} questions)")
    return sizes


def _cut(verdicts: Sequence[bool | None], sizes: Sequence[int]) -> list[Sequence[bool | None]]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [verdicts[end - size : end] for size, end in zip(sizes, ends, strict=True)]


# ---- checked access -----------------------------------------------------------------------------------------------------------------


def _get(data: Any, key: str, kind: type, where: str) -> Any:
    """The value of `key`, of a kind in `KINDS`. `where` is the place of `data`: "PATH: articles[3]", or "PATH: " for the file itself."""
    value = data.get(key) if isinstance(data, Mapping) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        found = type(value).__name__ if isinstance(data, Mapping) and key in data else "nothing"
        raise SealError(f"{where}{'' if where.endswith(': ') else '.'}{key}: expected {KINDS[kind]}, found {found}")
    return value


def _verdicts(values: Sequence[Any], where: str) -> list[bool | None]:
    for value in values:
        if value is not None and not isinstance(value, bool):
            raise SealError(f"{where}: expected true, false or null, found {type(value).__name__}")
    return list(values)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _stem(path: str) -> str:
    return pathlib.Path(path).name.removesuffix(".gz").removesuffix(".json")
