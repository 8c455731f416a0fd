import xml.etree.ElementTree

import pytest

from seal_jax.sweep import plot, table
from seal_jax.sweep.space import Choices, Range


def result(mean):
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "gain": mean - 0.1, "gain_low": 0.0, "gain_high": 0.2, "ungraded": 0}


def record(epochs, status="done", mean=None, rewards=(), **more):
    made = {"trial": str(epochs), "settings": {"fit.epochs": epochs, "fit.schedule": "cosine"}, "does": "train", "status": status}
    found = None if mean is None else result(mean)
    rest = {"problem": None, "rewards": list(rewards), "table": {"rows": []} if status == "done" else None, "result": found, "seconds": 2.0}
    return {**made, **rest, "run": f"sweeps/x/trials/{epochs}", **more}


RECORDS = [
    record(1, "failed", problem="model.name='x': no such folder", seconds=None),
    record(2, mean=0.3, rewards=[0.1, 0.2]),
    record(3, "stopped", rewards=[0.05]),
    record(4, mean=0.5, rewards=[0.2, None]),
    record(5, mean=0.3, rewards=[0.1, 0.3]),
]


def test_a_rounds_reward_is_the_mean_over_contexts_of_the_mean_over_candidates():
    contexts = [{"edits": [{"reward": r} for r in rewards]} for rewards in ([0.0, 1.0], [0.25, None], [None])]
    assert table.reward(contexts) == pytest.approx((0.5 + 0.25) / 2)
    assert table.reward(contexts[2:]) is None


def test_the_result_is_about_the_policys_own_self_edits():
    rows = [{"policy": p, "statistic": s, "mean": i} for i, (p, s) in enumerate([("base", "single"), ("base", "mean of K"),
            ("after 1 round", "mean of K"), ("base", "mean of K")])]  # fmt: skip
    assert table.result({"rows": rows}, "base")["mean"] == 1 and table.result({"rows": rows}, "after 1 round")["mean"] == 2
    assert table.result({"rows": []}, "base") is None


def test_trials_are_compared_by_accuracy_or_else_by_the_last_reward():
    assert table.score(RECORDS[3]) == 0.5 and table.score(record(6, rewards=[0.1, 0.4])) == 0.4
    assert table.score(RECORDS[2]) is None, "one that was stopped has no accuracy"


def test_best_first_and_every_trial_a_row():
    made = table.build(RECORDS, ["a note"])
    assert [row["trial"] for row in made["rows"]] == ["4", "5", "2", "3", "1"], "equal ones by their reward; what failed last"
    assert "table" not in made["rows"][0]
    lines = table.format_table(made).splitlines()
    heads = [head.strip() for head in lines[0].split("  ") if head.strip()]
    assert heads == [
        *("fit.epochs", "fit.schedule", "accuracy %", "gain over no adaptation"),
        *("reward by round", "seconds", "run folder"),
        "status",
    ]
    assert "50.0 [40.0, 60.0]" in lines[2] and "20.0 –" in lines[2] and lines[2].endswith("sweeps/x/trials/4  done")
    assert lines[6].endswith("sweeps/x/trials/1  failed: model.name='x': no such folder") and lines[-1] == "  a note"
    assert lines[5].endswith("stopped") and any("stopped: by ASHA" in line for line in lines[7:])


def test_what_a_line_of_progress_says():
    assert table.outcome(RECORDS[1]) == "done, accuracy 30.0 %, reward by round 10.0 20.0, 2 s"
    assert table.outcome(RECORDS[0]) == "failed: model.name='x': no such folder"


@pytest.mark.parametrize("records", [RECORDS, RECORDS[:1], RECORDS[2:3], []])
def test_the_plot_is_a_picture_of_its_own(records):
    rows = table.build(records)["rows"]
    space = {"fit.epochs": Range(1, 5), "fit.schedule": Choices(("cosine", "linear"))}
    made = plot.draw("x", rows, space)
    root = xml.etree.ElementTree.fromstring(made)
    text = "".join(root.itertext())
    assert root.tag.endswith("svg") and b"--main: #" in made and b"var(--" in made
    measured, rewarded = (any(row[what] for row in rows) for what in ("result", "rewards"))
    assert ("fit.epochs" in text, "reward by round" in text, "nothing measured" in text) == (measured, rewarded, not (measured or rewarded))
    assert made == plot.draw("x", rows, space), "equal results, equal plots"


def test_the_plot_of_values_of_any_characters():
    named = [{**record, "settings": {"task.prompt": name}} for record, name in zip(RECORDS[1:3], ("p$\\x$", "a\x01<b>"), strict=True)]
    made = plot.draw('"x" & y', table.build(named)["rows"], {"task.prompt": Choices(("p$\\x$", "a\x01<b>"))})
    text = "".join(xml.etree.ElementTree.fromstring(made).itertext())
    assert "p$\\x$" in text and "a\N{REPLACEMENT CHARACTER}<b>" in text
