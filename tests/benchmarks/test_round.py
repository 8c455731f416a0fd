from benchmarks import round as round_


def test_our_side_alone(measure):
    rows, printed = measure(round_.main, "--peer-edits", "0")
    assert "# 2 of 750 edits" in printed and list(rows) == ["round"]
    row = rows["round"]
    assert row["edits"] == 2 and row["round_minutes"] > 0 and row["cold_seconds"] > 0
    assert abs(row["write_s"] + row["fit_s"] + row["answer_s"] + row["bare_s"] - row["seconds"]) < 0.5 * row["seconds"] + 0.1


def test_beside_the_peer(measure, torch_peer):
    rows, _ = measure(round_.main)
    assert set(rows) == {"round", "peft-round"}
    assert rows["round"]["peer"] == "peft-round" and rows["round"]["check"] == "ok" and rows["round"]["loss_gap"] < 1e-5
