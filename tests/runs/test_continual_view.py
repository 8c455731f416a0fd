import html.parser
import json
import re

import pytest

from seal_jax.errors import SealError
from seal_jax.experiments.continual_table import table
from seal_jax.runs import continual_view, report
from seal_jax.runs.matrix import Summary, from_rows

BASE = [[0.25, 0.0, 0.5], [0.0, 0.5, 0.25]]
PLAIN = [
    [BASE[0], [1.0], [0.5, 1.0], [0.25, 0.5, 0.75]],
    [BASE[1], [0.75], [0.5, 0.5], [0.5, 0.0, None]],
]
KEPT = [[BASE[0], [1.0], [1.0, 0.75], [1.0, 0.75, 0.5]], [BASE[1], [0.75], [0.75, 0.5], [0.75, 0.5, 0.75]]]
ORIGINAL = Summary(from_rows(PLAIN[0]), from_rows(PLAIN[0]), 64, "models/iter2")


class Page(html.parser.HTMLParser):
    """The page's elements with their attributes, and its text but for the style sheet's."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.style = [], "", False
        self.feed(path.read_text(encoding="utf-8"))
        self.words = " ".join(self.text.split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.style = tag == "style"

    def handle_endtag(self, tag):
        self.style = False

    def handle_data(self, data):
        self.text += "" if self.style else data


def write(folder, start, steps, result=None, events=("created",)):
    """A run folder with these units."""
    (folder / "continual" / "steps").mkdir(parents=True)
    (folder / "config.yaml").write_text("name: made-up\nmodel:\n  name: some/model\ntask:\n  name: knowledge\n")
    (folder / "versions.json").write_text("{}")
    (folder / "continual" / "start.json").write_text(json.dumps(start))
    for step in steps:
        (folder / "continual" / "steps" / f"{step['step']:03d}.json").write_text(json.dumps(step))
    if result:
        (folder / "table.json").write_text(json.dumps(result))
    (folder / "events.jsonl").write_text("".join(json.dumps({"time": "2025-01-02T10:00:00+00:00", "event": e}) + "\n" for e in events))
    return folder


@pytest.fixture(scope="module")
def records(continual_records):
    start, steps = continual_records({"sequential": PLAIN, "kept": KEPT}, bits={"sequential": [4.0, 5.0]})
    refused = next(lane for lane in steps[1]["lanes"] if lane["method"] == "kept")
    refused |= {"scale": 0.0, "gate": "earlier passages fell by 25 points"}
    next(lane for lane in steps[2]["lanes"] if lane["method"] == "sequential")["problem"] = "no usable line"
    return start, steps


@pytest.fixture(scope="module")
def run(records, tmp_path_factory):
    result = table(*records, resamples=100, seed=0, beside=[ORIGINAL])
    return write(tmp_path_factory.mktemp("continual") / "run", *records, result, ("created", "finished"))


@pytest.fixture(scope="module")
def page(run):
    return Page(report.write_report(run))


def test_finished_run(page):
    for words in (
        *("finished", "some/model", "writing self-edits 1.0 s"),
        *("no adaptation", "original: models/iter2, 64 sequences", "0.0 [0.0, 0.0]", "22.6 [16.0, 32.0]", "Refused", "Unusable", "64 × 3"),
        *("backward: backward transfer", "before any", "after 3"),
        *("sequential: 6 edits", "kept: 6 edits", "earlier passages fell by 25 points", "✗ unusable: no usable line"),
        *("sequential, step 3", "kept, step 3", "Edit of 0-2 by kept.", "The newest passage: Passage 0-2", "Text of 0-2."),
        *("The first passage of the sequence: Passage 0-0", "answer 0 at 0.25", "answer 0 at 1.0", "2 training sequences"),
    ):
        assert words in page.words, words
    for words in ("Reward by round", "Counts", "Nothing measured yet", "No result table yet"):
        assert words not in page.words, words
    assert not {"script", "img", "link", "svg"} & {tag for tag, _ in page.tags}


def test_matrices_are_shaded_and_lower_triangular(page, run):
    view = report.view(run)["continual"]
    assert [m["method"] for m in view["matrices"]] == ["sequential", "kept", "original: models/iter2, 64 sequences"]
    rows = view["matrices"][0]["rows"]
    assert rows[0] == (0, [(0.125, pytest.approx(0.1767767)), (0.25, pytest.approx(0.3535534)), (0.375, pytest.approx(0.1767767))])
    assert [[cell is None for cell in cells] for _, cells in rows[1:]] == [[False, True, True], [False, False, True], [False] * 3]
    assert rows[3][1][2] == (0.75, 0.0), "of the other sequence it is not known"
    shares = [float(a["style"].removeprefix("--share:")) for tag, a in page.tags if tag == "td" and a.get("style")]
    assert len(shares) == 3 * (3 + 1 + 2 + 3)
    assert shares[:4] == [0.125, 0.25, 0.375, 0.875]
    assert sum("own" in (a.get("class") or "").split() for tag, a in page.tags if tag == "td") == 3 * 3, "the diagonal"


def test_an_unfinished_run(records, tmp_path):
    start, steps = records
    run = write(tmp_path / "run", start, steps[:2])
    page = Page(report.write_report(run))
    for words in (
        "not finished",
        "No result table yet: it is made when the run ends. 2 of 3 steps are done.",
        "sequential: 4 edits",
        "after 2",
    ):
        assert words in page.words, words
    assert "after 3" not in page.words and "sequential, step 2" in page.words
    (run / "continual/steps/000.json").write_text("{")
    page = Page(report.write_report(run))
    assert "000.json: damaged, not JSON" in page.words and "sequential: 2 edits" in page.words
    for path in (run / "continual/steps").iterdir():
        path.unlink()
    page = Page(report.write_report(run))
    assert "0 of 3 steps are done" in page.words and "What each edit did" not in page.words
    (run / "continual/start.json").unlink()
    assert "Nothing measured yet." in Page(report.write_report(run)).words


def test_steps_come_in_any_order(records):
    start, steps = records
    assert continual_view.view(start, steps[::-1], None) == continual_view.view(start, steps, None)


def test_one_sequence_of_one_passage(continual_records, tmp_path):
    start, steps = continual_records({"sequential": [[[0.5], [1.0]]]}, start_bits=None)
    for context in start["contexts"]:
        del context["passage"]
    page = Page(report.write_report(write(tmp_path / "run", start, steps, table(start, steps, resamples=10, seed=0))))
    assert "of which this run has 1." in page.words and "±" not in page.words and "The first passage" not in page.words


def test_untrusted_text_stays_text(records, tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp; {{ 7*7 }}\x00"
    start, steps = json.loads(json.dumps(records))
    for context in start["contexts"]:
        context |= {"title": evil, "passage": evil, "questions": [[evil, evil]] * 4}
    for trial in [*start["answers"].values(), *(t for s in steps for lane in s["lanes"] for t in lane["answers"].values())]:
        trial["outputs"] = [evil] * 4
    for step in steps:
        for lane in step["lanes"]:
            lane |= {"method": evil + lane["method"], "edit": evil, "problem": evil, "gate": evil, "sequences": [evil]}
    original = ORIGINAL._replace(model=evil)
    page = Page(report.write_report(write(tmp_path / "run", start, steps, table(start, steps, resamples=10, seed=0, beside=[original]))))
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count(evil.replace("\x00", "\N{REPLACEMENT CHARACTER}")) > 50 and "\x00" not in page.text
    assert not re.search(r"\b49\b", page.text)


def test_a_unit_of_another_form_is_told_in_one_line(records, tmp_path):
    start, steps = json.loads(json.dumps(records))
    lane = steps[0]["lanes"][0]
    trial = lane["answers"].pop(lane["context"])
    with pytest.raises(SealError, match="a file here is not of the form that this version writes"):
        report.write_report(write(tmp_path / "without", start, steps))
    lane["answers"][lane["context"]] = trial | {"reward": "much"}
    with pytest.raises(SealError, match="a file here is not of the form that this version writes"):
        report.write_report(write(tmp_path / "other", start, steps))
