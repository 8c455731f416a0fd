import html.parser
import json
import re
import subprocess
import time

import pytest

from seal_jax import tasks
from seal_jax.errors import SealError
from seal_jax.runs import lock, report
from seal_jax.runs.report import write_report
from seal_jax.tasks.base import View


class Page(html.parser.HTMLParser):
    """The page's elements, their attributes, and its text."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open == [], "unclosed elements"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data

    @property
    def words(self):
        return " ".join(self.text.split())


@pytest.fixture(scope="module")
def page(made_up, tmp_path_factory):
    return Page(write_report(made_up(tmp_path_factory.mktemp("run"))))


def test_finished_run(page):
    for words in (
        *("made-up", "finished", "some/model", "1 × cpu", "12 min 5 s", "begun 2025-01-02 10:00 UTC"),
        *("no adaptation", "passage only", "after round 2", "40.0 [34.0, 48.7]", "+33.8 [+28.8, +38.8]"),
        *("Over 6 contexts with 30 questions.", "K = 3; best of K is chosen on seed 0 and scored on seed 1."),
        *("Reward by round", "Reward spread over candidates", "M-step", "evaluation of the base policy", "3 × empty passage"),
        *("Largest gain", "Median gain", "Smallest gain", "training sequences, 1 line dropped", "80 steps, loss 2.900 → 0.400"),
        *("writing self-edits 50 s", "M-steps 1 min 20 s", "Who built part 4 of evaluate-after-"),
    ):
        assert words in page.words, words
    assert sum(tag == "svg" for tag, _ in page.tags) == 3
    assert sum(tag == "article" for tag, _ in page.tags) == report.EXAMPLES
    assert {"right: ", "wrong: "} <= set(re.findall(r"(?:right|wrong): ", page.text))
    assert "✓" in page.text and "✗" in page.text


def test_needs_nothing_but_itself(page):
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "action", "data"} & attributes.keys()
        assert (attributes.get("href") or "#").startswith("#"), (tag, attributes)
        assert "//" not in (attributes.get("style") or "")
        assert not any(name.startswith("on") for name in attributes)
    assert "default-src 'none'" in page.source
    assert "@import" not in page.source and not re.search(r"url\((?!#)", page.source)
    assert "prefers-color-scheme: dark" in page.source and "@media print" in page.source


def test_counts_are_those_of_the_files(made_up, tmp_path):
    run = made_up(tmp_path / "run")
    view = report.view(run)
    for counts in view["counts"]:
        phase = {"round 1": "rounds/1/e_step", "round 2": "rounds/2/e_step"}.get(counts["phase"])
        phase = (
            phase or {"evaluation of the base policy": "evaluate/before", "evaluation after training": "evaluate/after"}[counts["phase"]]
        )
        contexts = [c for path in sorted((run / phase).glob("*.json")) for c in json.loads(path.read_text())["contexts"]]
        edits = [e for c in contexts for e in c["edits"]]
        verdicts = re.findall(r"(true|false|null)", "".join(re.findall(r'"verdicts": (\[[^]]*\])', json.dumps(contexts))))
        assert counts["contexts"] == len(contexts) == 6
        assert counts["edits"] == len(edits) == 18
        assert counts["unusable"] == len([e for e in edits if e["problem"]])
        assert counts["dropped"] == sum(e["dropped"] for e in edits) == 18
        assert counts["answers"] == len(verdicts)
        assert counts["ungraded"] == verdicts.count("null")
    assert sum(c["ungraded"] for c in view["counts"]) > 0 and view["problems"]
    first = json.loads((run / "rounds/1/e_step/000.json").read_text())["contexts"]
    means = [sum(known) / len(known) for c in first if (known := [e["reward"] for e in c["edits"] if e["reward"] is not None])]
    mean, low, high = view["rounds"][0]["mean"]
    assert mean == pytest.approx(sum(means) / len(means))
    assert min(means) <= low < mean < high <= max(means)
    assert view["rounds"][0]["kept"] == 6


def test_untrusted_text_stays_text(made_up, tmp_path):
    run = made_up(tmp_path / "run", contexts=2)
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp; {{ 7*7 }}\x00\x1b"
    path = run / "evaluate/after/000.json"
    data = json.loads(path.read_text())
    for context in data["contexts"]:
        context["title"] = context["passage"] = evil
        context["questions"] = [[evil, evil]] * 5
        for edit in context["edits"]:
            edit |= {"text": evil, "problem": evil, "sequences": [evil]}
            for trial in edit["trials"]:
                trial["outputs"] = [evil] * 5
    path.write_text(json.dumps(data))
    (run / "config.yaml").write_text(f"name: {json.dumps(evil)}\nmodel:\n  name: </pre><script>\n")
    table = json.loads((run / "table.json").read_text())
    table["rows"][0]["method"] = table["notes"][0] = evil
    (run / "table.json").write_text(json.dumps(table))
    with open(run / "events.jsonl", "a") as file:
        file.write(json.dumps({"time": evil, "event": "stopped", "error": evil}) + "\n")
    page = Page(write_report(run))
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    shown = evil.replace("\x00", "\N{REPLACEMENT CHARACTER}").replace("\x1b", "\N{REPLACEMENT CHARACTER}")
    assert page.text.count(shown) > 20
    assert "\x00" not in page.source


def test_a_task_draws_its_own_texts(made_up, tmp_path, monkeypatch):
    run, asked = made_up(tmp_path / "run", contexts=2), set()

    def html(kind, text):
        asked.add(kind)
        return f"<svg role='img'><title>{len(text)}</title></svg>" if kind in ("question", "answer") else None

    monkeypatch.setattr(tasks, "view", lambda name: View(context="Puzzle", html=html))
    page = Page(write_report(run))
    drawn = [tag for tag, attributes in page.tags if tag == "svg" and attributes == {"role": "img"}]
    assert asked == {"context", "edit", "sequence", "question", "reference", "answer"}
    assert len(drawn) == 2 * 3 * 5, "the question and both answers, of five questions of two contexts"
    assert "Puzzle" in page.text


def test_unfinished_run(made_up, tmp_path):
    run = made_up(tmp_path / "run", finished=False)
    page = Page(write_report(run))
    for words in ("not finished; continue it", "No result table yet", "10 min 0 s", "From the evaluation of the base policy"):
        assert words in page.words
    assert report.view(run)["counts"][1]["contexts"] == 3
    (run / "evaluate/before/000.json").unlink()
    assert "From round 2: contexts" in Page(write_report(run)).words
    with open(run / "events.jsonl", "a") as file:
        file.write('{"time": "2025-01-02T10:10:05+00:00", "event": "stopped", "error": "disk full"}\n{"time": "2025-0')  # torn
    assert "stopped: disk full" in Page(write_report(run)).words


def test_empty_run(tmp_path):
    (tmp_path / "config.yaml").write_text("name: fresh\n")
    (tmp_path / "versions.json").write_text("{}")
    page = Page(write_report(tmp_path))
    for words in ("fresh", "No result table yet", "Nothing measured yet.", "None yet."):
        assert words in page.words
    assert not any(tag == "svg" for tag, _ in page.tags)


@pytest.mark.parametrize(("dtype", "told"), [("auto", "Weightsauto: bfloat16 "), ("float32", "Weightsfloat32 ")])
def test_the_head_tells_the_weights_dtype_and_the_cpu(tmp_path, dtype, told):
    (tmp_path / "config.yaml").write_text(f"name: fresh\nmodel: {{dtype: {dtype}}}\n")
    found = {"device": "cpu", "devices": 1, "platform": "Linux x86_64", "cpu": "Some <CPU> 9", "auto_dtype": "bfloat16"}
    (tmp_path / "versions.json").write_text(json.dumps(found))
    words = Page(write_report(tmp_path)).words
    assert told in words and "1 × cpu (Linux x86_64, Some <CPU> 9)" in words


def test_a_run_of_nothing_but_failures(made_up, tmp_path):
    run = made_up(tmp_path / "run", contexts=2, rounds=1)
    for path in run.rglob("[0-9]*.json"):
        data = json.loads(path.read_text())
        for context in data["contexts"]:
            context["methods"]["no adaptation"][0] |= {"reward": None, "verdicts": [None] * 5}
            for edit in context["edits"]:
                edit |= {"trials": [], "reward": None, "problem": "no usable line"}
            del context["passage"]
        path.write_text(json.dumps(data))
    (run / "rounds/1/m_step.json").write_text(json.dumps({"pairs": 0, "steps": 0, "losses": [], "seconds": 0.0}))
    page = Page(write_report(run))
    assert "✗ Unusable: no usable line" in page.words and "ungraded: " in page.text
    assert not any(tag == "svg" for tag, _ in page.tags)


def test_a_damaged_file_is_left_out_and_named(made_up, tmp_path):
    run = made_up(tmp_path / "run")
    (run / "evaluate/after/000.json").write_text('{"contexts": [')
    assert "000.json: damaged, not JSON" in Page(write_report(run)).words


def test_a_file_of_another_form_is_told_in_one_line(made_up, tmp_path):
    run = made_up(tmp_path / "run")
    (run / "table.json").write_text('{"rows": [{"method": "x", "contexts": 1, "questions": 1}], "notes": []}')
    with pytest.raises(SealError, match="a file here is not of the form that this version writes"):
        write_report(run)


def test_not_a_run(tmp_path):
    with pytest.raises(SealError, match=r"not a run folder \(no config\.yaml in it\)"):
        write_report(tmp_path)
    with pytest.raises(SealError, match="not a run folder"):
        write_report(tmp_path / "missing")


def test_states(made_up, tmp_path):
    def status(*events, table=False):
        return report._status(tmp_path, [{"time": "", "event": e, "error": "why"} for e in events], table)[1]

    assert status("created", "finished") == "finished"
    assert status("created", "stopped") == "stopped: why"
    assert status("created", "stopped", "opened").startswith("not finished")
    assert status("created", "stopped", "opened", "finished") == "finished"
    assert status(table=True) == "finished", "of a folder without a log"
    assert status("created", "finished", "opened", table=True).startswith("not finished"), "the table is an earlier command's"
    (tmp_path / "lock").write_text("")
    holder = subprocess.Popen(["flock", "-x", tmp_path / "lock", "cat"], stdin=subprocess.PIPE)
    try:
        for _ in range(200):
            if lock.in_use(tmp_path):
                break
            time.sleep(0.01)
        assert status("created") == "running"
    finally:
        holder.communicate()


def test_notices_of_a_continued_run(made_up, tmp_path):
    run = made_up(tmp_path / "run", contexts=1, rounds=1)
    with open(run / "events.jsonl", "a") as file:
        for event in (
            {"event": "versions_changed", "changes": {"device": ["cpu", "TPU v5e"]}},
            {"event": "config_changed", "changes": {"fit.slots": [64, 8]}},
            {"event": "unit_damaged", "unit": "rounds/1/m_step", "moved_to": "m_step.json.damaged"},
            {"event": "warning", "message": "2 of 9 items skipped"},
            {"event": "warning", "message": "2 of 9 items skipped"},
        ):
            file.write(json.dumps({"time": "2025-01-03T09:02:06+00:00", **event}) + "\n")
    page = Page(write_report(run))
    assert "Continued with other versions or devices: device cpu → TPU v5e." in page.words
    assert "Continued with another config: fit.slots 64 → 8." in page.words
    assert "rounds/1/m_step was set aside as m_step.json.damaged" in page.words
    assert page.words.count("2 of 9 items skipped") == 1


def test_best_of_k_in_the_table_is_only_spoken_of_where_it_is(made_up, page, tmp_path):
    told = "the result table has one that is scored on other seeds"
    assert told in page.words
    folder = made_up(tmp_path)
    table = json.loads((folder / "table.json").read_text())
    table["rows"] = [row for row in table["rows"] if row["statistic"] != "best of K"]
    (folder / "table.json").write_text(json.dumps(table))
    words = Page(write_report(folder)).words
    assert told not in words and "so it flatters, the more the noisier rewards are." in words


def test_duration():
    assert [report.duration(s) for s in (0.04, 9.94, 59.4, 59.6, 200, 3600, 7530)] == [
        *("0.0 s", "9.9 s", "59 s", "1 min 0 s", "3 min 20 s", "1 h 0 min", "2 h 5 min")
    ]
