"""The original's files in small, well formed and not. The files themselves: tests/conformance/test_original.py."""

import copy
import json
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_jax.errors import SealError
from seal_jax.tasks.base import Score, Trial
from seal_jax.tasks.knowledge import Config, build, original, sources

QUESTIONS = [("When did it open?", "1802"), ("Who built it?", "Ada"), ("How many wheels?", "3")]


def entry(rep, number, right, before=False):
    question, answer = QUESTIONS[number]
    return {
        **{"rep": rep, "question": question, "answer": answer, "baseline_answer": "?", "adapter_answer": f"answer {number}"},
        **{"baseline_correct": before, "adapter_correct": right},
    }


def completion(text, *reps):
    return {
        "text": text,
        "stats": {},
        "questions": [entry(r, n, right, n == 0) for r, rep in enumerate(reps) for n, right in enumerate(rep)],
    }


def article(title, *completions):
    return {"title": title, "context": f"{title} is a mill.", "completions": list(completions), "prompt": "x"}


T, F = True, False
RUN = {
    "exp_name": "mills",
    "articles": [
        article("Brindle", completion("A.", [T, F, F], [T, T, F]), completion("B.", [T, T, T], [T, T, None])),
        article("Corro", completion("C.", [F, F], [F, F]), completion("D.", [T, F], [F, T])),
    ],
}
CPT = {
    "n_articles": 2,
    "per_article": {"Brindle": {"adapter_correct": [T, F, F]}, "Corro": {"adapter_correct": [T, T]}},
    "server_reply": {"baseline_correct": [F, F, F, T, F], "adapter_correct": [T, F, F, T, T]},
}
PASSAGES = [{"title": t, "context": "c", "questions": [{"question": q, "answer": a} for q, a in QUESTIONS[:n]]} for t, n in
            (("Brindle", 3), ("Corro", 2))]  # fmt: skip


def write(path, data):
    path.write_text(json.dumps(data))
    return str(path)


def changed(change, data=RUN):
    data = copy.deepcopy(data)
    change(data)
    return data


def test_a_run_is_a_source_of_passages_with_self_edits(tmp_path):
    first, second = sources.load(write(tmp_path / "run.json", RUN), "train")
    assert (first.title, first.payload["context"]) == ("Brindle", "Brindle is a mill.")
    assert first.payload["questions"] == [{"question": q, "answer": a} for q, a in QUESTIONS], "each once, not once a repetition"
    assert [c.payload["completions"] for c in (first, second)] == [["A.", "B."], ["C.", "D."]]


def test_given_edits_are_those_of_the_split_that_asks_for_them(tmp_path):
    path = write(tmp_path / "run.json", RUN)
    plain = write(tmp_path / "plain.json", [{**PASSAGES[0], "completions": ["X."]}, PASSAGES[1]])
    task = build(Config(train=path, validation=plain, validation_edits="given"), None)
    assert [task.given_edits(c) for c in task.contexts("train")] == [None, None]
    assert [task.given_edits(c) for c in task.contexts("validation")] == [["X."], []], "the policy does not step in for a passage with none"
    with pytest.raises(SealError, match=r"task.train_edits='give' is unknown \(did you mean 'given'\?\); one of: policy, given"):
        build(Config(train_edits="give"), None)


def test_recorded_rewards_are_found_by_title_and_passage(tmp_path):
    path = write(tmp_path / "rank.json", RUN)
    contexts = sources.load(path, "train")
    second, first = original.recorded(path, contexts[::-1])
    assert [text for text, _ in first.edits] == ["A.", "B."]
    assert first.unadapted == Trial(("?",) * 3, Score((T, F, F), 0.3333)), "rounded as the original does"
    trials = [[(t.score.verdicts, t.score.reward) for t in trials] for _, trials in first.edits]
    assert trials == [[((T, F, F), 0.3333), ((T, T, F), 0.6667)], [((T, T, T), 1.0), ((T, T, None), 1.0)]]
    assert first.edits[0][1][1].outputs == ("answer 0", "answer 1", "answer 2")
    assert [t.score.reward for _, trials in second.edits for t in trials] == [0.0, 0.0, 0.5, 0.5]
    other = sources.load(write(tmp_path / "others.json", PASSAGES), "train")
    with pytest.raises(
        SealError, match=r"rest_em.rewards=.*: 2 of the 2 train contexts are not among its 2 passages \(00000-brindle\); set"
    ):
        original.recorded(path, other)
    payload = {**contexts[0].payload, "questions": contexts[0].payload["questions"][:2]}
    with pytest.raises(SealError, match="the questions about 00000-brindle are others than"):
        original.recorded(path, [type(contexts[0])(contexts[0].id, contexts[0].title, payload)])


def test_figures_of_an_evaluation(tmp_path):
    none, edit = original.figures(write(tmp_path / "run.json", RUN))
    assert (none.policy, none.method, none.statistic, none.contexts, none.questions) == ("original: mills", "no adaptation", "single", 2, 5)
    assert none.values == (0.3333, 0.5) and (none.ungraded, edit.ungraded) == (0, 1)
    assert (edit.method, edit.statistic) == ("passage + self-edit", "mean of K")
    assert edit.values == pytest.approx(((0.5 + 1.0) / 2, 0.25)) and edit.note is None
    unnamed, _ = original.figures(write(tmp_path / "base run.json", {"articles": RUN["articles"]}))
    assert unnamed.policy == "original: base run"


def test_figures_of_continued_pretraining(tmp_path):
    path = write(tmp_path / "cpt.json", CPT)
    none, trained = original.figures(path)
    assert (none.method, trained.method, trained.policy) == ("no adaptation", "continued pretraining", "original: cpt")
    assert (none.mean, trained.mean, trained.values, trained.contexts, trained.questions) == (0.2, 0.6, (), 2, 5)
    assert trained.note == "original: cpt: means over questions; which belong to one passage is not in the file"
    for about in (PASSAGES, RUN):  # with its passages, or a run over them
        none, trained = original.figures(f"{path}@{write(tmp_path / 'about.json', about)}")
        assert trained.values == pytest.approx((1 / 3, 1.0)) and none.values == (0.0, 0.5)
        assert trained.note == "original: cpt: means over passages; over the 5 questions, as the file has it, they are 20.0 and 60.0"
    for wrong in (PASSAGES[::-1], PASSAGES[:1], [PASSAGES[0], {**PASSAGES[1], "title": "Ösel"}]):
        with pytest.raises(SealError, match="has other passages, or in another order, than the file is about"):
            original.figures(f"{path}@{write(tmp_path / 'wrong.json', wrong)}")


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ([], r"neither an evaluation of the original's \(articles\) nor its continued pretraining \(server_reply\)"),
        ({"articles": []}, "articles: expected some, found none"),
        ({"articles": 3}, "articles: expected a list, found int"),
        ({"articles": [3]}, r"articles\[0\].title: expected text, found nothing"),
        (changed(lambda d: d["articles"][1].update(completions=[])), r"articles\[1\]: expected a self-edit with questions, found none"),
        (
            changed(lambda d: d["articles"][0]["completions"][1].pop("text")),
            r"articles\[0\].completions\[1\].text: expected text, found not",
        ),
        (
            changed(lambda d: d["articles"][0]["completions"][0]["questions"][2].update(adapter_correct="yes")),
            r"articles\[0\].completions\[0\].questions\[2\].adapter_correct: expected true, false or null, found str",
        ),
        (changed(lambda d: d["articles"][0]["completions"][0]["questions"].pop()), "the questions differ between its self-edits"),
        ({"server_reply": {}}, "n_articles: expected a whole number, found nothing"),
        (changed(lambda d: d["server_reply"]["adapter_correct"].pop(), CPT), "as many verdicts of both models"),
        (
            changed(lambda d: d["server_reply"].pop("baseline_correct"), CPT),
            "server_reply.baseline_correct: expected a list, found nothing",
        ),
    ],
)
def test_a_malformed_file_is_one_clear_line(tmp_path, data, told):
    path = write(tmp_path / "a.json", data)
    with pytest.raises(SealError, match=told) as error:
        original.figures(path)
    assert str(error.value).startswith(f"evaluate.beside={path}: ") and "\n" not in str(error.value)


def test_files_that_cannot_be_read_are_one_clear_line(tmp_path):
    with pytest.raises(SealError, match=r"^evaluate.beside=.*none.json: no such file$"):
        original.figures(str(tmp_path / "none.json"))
    (tmp_path / "a.json.gz").write_text("{")
    with pytest.raises(SealError, match=r"rest_em.rewards=.*a.json.gz is not readable as JSON"):
        original.recorded(str(tmp_path / "a.json.gz"), [])
    with pytest.raises(SealError, match="no run over passages of the original's"):
        original.recorded(write(tmp_path / "b.json", CPT), [])
    with pytest.raises(SealError, match="what follows @ is for files of continued pretraining"):
        original.figures(write(tmp_path / "c.json", RUN) + "@d.json")
    with pytest.raises(SealError, match=r"no such file: d\.json"):
        original.figures(write(tmp_path / "e.json", CPT) + "@d.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["articles", "completions", "questions", "rep", "title", "text", "server_reply"]), inner, max_size=5
        )
    ),
    max_leaves=15,
)


@given(JSON)
def test_any_json_gives_figures_or_one_clear_line(data):
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(data, file)
        file.flush()
        for read in (original.figures, lambda path: original.recorded(path, []), lambda path: sources.load(path, "train")):
            try:
                read(file.name)
            except SealError as error:
                assert "\n" not in str(error)
