import numpy as np
import pytest

from seal_jax.rest_em import table as table_lib
from seal_jax.rest_em.table import best_of_k, bootstrap, table
from seal_jax.runs.table import format_table
from seal_jax.tasks.base import Figure


def trial(reward, seed=0, verdicts=None):
    """A trial over two questions, as `measure` records it."""
    if verdicts is None:
        verdicts = [None, None] if reward is None else [reward > 0.25, reward > 0.75]
    return {"seed": seed, "outputs": ["", ""], "verdicts": verdicts, "reward": reward, "loss_first": None, "loss_last": None, "steps": 0}


def edit(candidate, *rewards, problem=None):
    known = [r for r in rewards if r is not None]
    reward = 0.0 if problem else (float(np.mean(known)) if known else None)
    trials = [] if problem else [trial(r, seed) for seed, r in enumerate(rewards)]
    return {"candidate": candidate, "text": "", "problem": problem, "dropped": 0, "sequences": [], "trials": trials, "reward": reward}


def context(none, passage, *edits):
    methods = {"no adaptation": [trial(none)], "passage only": [trial(r, seed) for seed, r in enumerate(passage)]}
    return {"id": "", "title": "", "passage": "", "questions": [["q", "a"], ["q", "a"]], "methods": methods, "edits": list(edits)}


def rows_of(result):
    return {(row["policy"], row["method"], row["statistic"]): row for row in result["rows"]}


def test_bootstrap_of_known_cases():
    assert bootstrap(np.full(7, 0.3), 100, 0) == (pytest.approx(0.3), pytest.approx(0.3))
    assert bootstrap(np.asarray([0.0, 1.0]), 1000, 0) == (0.0, 1.0)
    assert bootstrap(np.asarray([0.4]), 10, 0) == (None, None), "one says nothing of others"
    # For many values it is the normal interval: 1.96 standard errors to both sides.
    values = np.tile([0.0, 1.0], 200)
    low, high = bootstrap(values, 20000, 0)
    assert low == pytest.approx(0.5 - 1.96 * 0.5 / 20, abs=0.004) and high == pytest.approx(0.5 + 1.96 * 0.5 / 20, abs=0.004)
    # Resampled are contexts: an interval of 4 values is wider than that of the same values 25 times over.
    few, many = bootstrap(values[:4], 2000, 0), bootstrap(values[:100], 2000, 0)
    assert few[1] - few[0] > 2 * (many[1] - many[0])


def test_bootstrap_depends_on_the_seed_alone():
    values = np.linspace(0, 1, 11) ** 2
    assert bootstrap(values, 500, 1) == bootstrap(values, 500, 1) != bootstrap(values, 500, 2)


def test_best_of_k_is_chosen_on_seed_0_and_scored_on_the_others():
    c = context(0.0, [0.0], edit(0, 0.5, 1.0, 1.0), edit(1, 1.0, 0.0, 0.5))
    assert best_of_k(c) == 0.25, "candidate 1 wins on seed 0 and earns 0.0 and 0.5 on the others"


def test_best_of_k_of_equals_takes_the_first():
    assert best_of_k(context(0.0, [0.0], edit(0, 0.5, 0.0), edit(1, 0.5, 1.0))) == 0.0


def test_best_of_k_with_unusable_and_ungraded_edits():
    bad = edit(0, problem="no usable line in the self-edit")
    assert best_of_k(context(0.0, [0.0], bad, edit(1, 0.5, 1.0))) == 1.0
    assert best_of_k(context(0.0, [0.0], bad, edit(1, 0.0, 1.0))) == 0.0, "an unusable edit earns 0 and, as the first of equals, wins"
    assert best_of_k(context(0.0, [0.0], edit(0, None, 1.0), edit(1, 0.5, 0.0))) == 0.0, "ungraded on seed 0 is never chosen"
    assert best_of_k(context(0.0, [0.0], edit(0, 0.5, None))) is None, "chosen, but its score is not known"
    assert best_of_k(context(0.0, [0.0], edit(0, None, 1.0))) is None


def test_means_and_paired_gains():
    base = [
        context(0.0, [0.5, 0.5], edit(0, 0.5, 1.0), edit(1, 0.0, 0.5)),
        context(0.5, [1.0, 0.5], edit(0, 1.0, 1.0), edit(1, 0.5, 1.0)),
    ]
    after = [
        context(0.5, [1.0, 1.0], edit(0, 1.0, 1.0), edit(1, 1.0, 1.0)),
        context(0.5, [1.0, 1.0], edit(0, 0.5, 1.0), edit(1, 0.0, 0.0)),
    ]
    result = table({"base": base, "after 1 round": after}, seeds=2, edits=2, resamples=400, seed=0)
    rows = rows_of(result)
    assert list(rows)[:4] == [
        ("base", "no adaptation", "single"),
        ("base", "passage only", "single"),
        ("base", "passage + self-edit", "mean of K"),
        ("base", "passage + self-edit", "best of K"),
    ]
    assert len(rows) == 8
    means = {key: row["mean"] for key, row in rows.items()}
    assert means["base", "no adaptation", "single"] == 0.25
    assert means["base", "passage only", "single"] == pytest.approx((0.5 + 0.75) / 2)
    assert means["base", "passage + self-edit", "mean of K"] == pytest.approx((0.5 + 0.875) / 2)
    assert means["base", "passage + self-edit", "best of K"] == 1.0
    assert means["after 1 round", "passage + self-edit", "mean of K"] == pytest.approx((1.0 + 0.375) / 2)
    # Every gain is over the base policy without adaptation, context by context.
    first = rows["base", "no adaptation", "single"]
    assert first["gain"] is first["gain_low"] is None
    assert rows["after 1 round", "no adaptation", "single"]["gain"] == 0.25
    gain = rows["base", "passage only", "single"]
    assert gain["gain"] == 0.375 and (gain["gain_low"], gain["gain_high"]) == (0.25, 0.5), "the gains are 0.5 and 0.25"
    assert (gain["contexts"], gain["questions"], gain["ungraded"]) == (2, 4, 0)
    text = format_table(result)
    assert "62.5" in text and "+37.5" in text and "best of K: of 2 self-edits the best on seed 0, scored on the other seeds" in text


def test_one_context_alone_has_no_interval():
    rows = rows_of(table({"base": [context(0.0, [0.5], edit(0, 1.0))]}, seeds=1, edits=1, resamples=10, seed=0))
    for row in rows.values():
        assert row["low"] is row["high"] is row["gain_low"] is row["gain_high"] is None and row["mean"] is not None


def test_contexts_that_a_baseline_could_not_be_made_for_are_said():
    whole, unmade = context(0.0, [0.5], edit(0, 1.0)), context(0.0, [], edit(0, 1.0))
    result = table({"base": [whole, unmade | {"unmade": {"passage only": "9 training steps"}}]}, seeds=1, edits=1, resamples=10, seed=0)
    assert rows_of(result)["base", "passage only", "single"]["contexts"] == 1
    assert "passage only: without 1 of 2 contexts, as of one: 9 training steps" in result["notes"]


def test_fits_that_diverged_are_said():
    found = context(0.0, [0.5], edit(0, 1.0, 0.0))
    for n, one in enumerate((*found["methods"]["passage only"], *found["edits"][0]["trials"])):
        one.update(steps=3, loss_first=2.0, loss_last=1.0 if n else None)
    result = table({"base": [found]}, seeds=2, edits=1, resamples=10, seed=0)
    assert "1 of 3 fits diverged, and count as what they then answered; lower fit.learning_rate" in result["notes"]


def test_ungraded_answers_are_counted_and_never_wrong():
    contexts = [
        context(None, [0.5], edit(0, 0.5)),
        context(0.5, [None], edit(0, None)),
        context(0.0, [trial(1.0)["reward"]], edit(0, 1.0)),
    ]
    contexts[2]["methods"]["passage only"][0]["verdicts"] = [True, None]
    rows = rows_of(table({"base": contexts}, seeds=1, edits=1, resamples=50, seed=0))
    none, passage = rows["base", "no adaptation", "single"], rows["base", "passage only", "single"]
    assert (none["mean"], none["contexts"], none["ungraded"]) == (0.25, 2, 2)
    assert (passage["mean"], passage["contexts"], passage["ungraded"]) == (0.75, 2, 3)
    assert passage["gain"] == 1.0, "the one context where both are known"
    only = rows["base", "passage + self-edit", "mean of K"]
    assert (only["mean"], only["ungraded"]) == (0.75, 2)
    assert ("base", "passage + self-edit", "best of K") not in rows, "of one there is no best"
    assert "ungraded" in format_table({"rows": list(rows.values()), "notes": []})


def test_a_method_that_nothing_is_known_of_has_an_empty_row():
    contexts = [context(0.0, [], edit(0, problem="x")), context(0.5, [], edit(0, problem="x"))]
    rows = rows_of(table({"base": contexts}, seeds=2, edits=1, resamples=50, seed=0))
    passage = rows["base", "passage only", "single"]
    assert passage["mean"] is passage["low"] is passage["gain"] is None and passage["contexts"] == 0
    assert rows["base", "passage + self-edit", "mean of K"]["mean"] == 0.0, "unusable self-edits earn 0"
    assert "–" in format_table({"rows": list(rows.values()), "notes": []})


def test_best_of_k_needs_two_edits_and_two_seeds():
    contexts = [context(0.0, [0.0, 0.0], edit(0, 0.5, 0.0), edit(1, 0.0, 1.0))]

    def statistics(seeds, edits):
        result = table({"base": contexts}, seeds=seeds, edits=edits, resamples=10, seed=0, notes=["more"])
        assert result["notes"][-1] == "more"
        assert ("K = 2 self-edits" in " ".join(result["notes"])) == (edits == 2)
        assert ("best of K" in " ".join(result["notes"])) == ((seeds, edits) == (2, 2))
        return [row["statistic"] for row in result["rows"]]

    assert statistics(2, 2) == ["single", "single", "mean of K", "best of K"]
    assert statistics(1, 2) == ["single", "single", "mean of K"], "chosen and scored on one seed, it would flatter itself"
    assert statistics(2, 1) == ["single", "single", "mean of K"]
    assert [row["method"] for row in table_lib.rows(contexts, "base", 2, 0)] == ["no adaptation", "passage only"]


def test_what_was_measured_elsewhere_stands_below_without_a_gain():
    contexts = [context(0.0, [0.5]), context(0.5, [1.0])]
    told = Figure("original: base", "no adaptation", "single", 4, 9, 1, (0.0, 1.0, 1.0, None))
    whole = Figure("original: cpt", "continued pretraining", "single", 200, 974, 0, mean=0.4, note="means over questions")
    beside = [told, whole, whole]
    result = table({"base": contexts}, seeds=1, edits=0, resamples=200, seed=0, names={"no adaptation": "as it is"}, beside=beside)
    first, second, third, fourth, _ = result["rows"]
    assert first["gain"] is None and second["gain"] == 0.5
    assert (third["method"], third["policy"]) == ("as it is", "original: base")
    assert (third["contexts"], third["questions"], third["ungraded"], third["gain"]) == (3, 9, 1, None)
    assert third["mean"] == pytest.approx(2 / 3) and (third["low"], third["high"]) == (0.0, 1.0)
    assert (fourth["mean"], fourth["low"], fourth["contexts"], fourth["questions"]) == (0.4, None, 200, 974)
    assert all(row.keys() == first.keys() for row in result["rows"])
    assert result["notes"].count("means over questions") == 1 and any("their own model, contexts and grader" in n for n in result["notes"])
    assert "original: cpt" in format_table(result)
