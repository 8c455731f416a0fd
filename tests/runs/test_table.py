from seal_jax.runs.table import format_table, interval, percent


def row(**given):
    base = {"method": "self-edit", "policy": "base", "contexts": 16, "questions": 80, "statistic": "mean of K", "ungraded": 0}
    return {**base, "mean": 0.35, "low": 0.29, "high": 0.437, "gain": 0.2875, "gain_low": 0.05, "gain_high": 0.4, **given}


def test_percent():
    assert [percent(v) for v in (0.112, 1.0, 0.0, None)] == ["11.2", "100.0", "0.0", "–"]
    assert [percent(v, sign=True) for v in (0.112, -0.05, -0.0001, 0.0001)] == ["+11.2", "-5.0", "0.0", "0.0"]
    assert interval(0.05, 0.2) == "[5.0, 20.0]"
    assert interval(None, None) == ""


def test_table_is_aligned():
    plain = {"gain": None, "gain_low": None, "gain_high": None}
    rows = [row(method="no adaptation", statistic="single", mean=0.0625, low=0.0, high=0.15, **plain), row()]
    assert format_table({"rows": rows, "notes": ["K = 5"]}) == "\n".join(
        [
            "method         policy  statistic  contexts  questions         accuracy %  gain over no adaptation",
            "-------------  ------  ---------  --------  ---------  -----------------  -----------------------",
            "no adaptation  base    single           16         80   6.2  [0.0, 15.0]          –",
            "self-edit      base    mean of K        16         80  35.0 [29.0, 43.7]      +28.7 [+5.0, +40.0]",
            "  K = 5",
        ]
    )


def test_ungraded_and_missing_figures():
    text = format_table({"rows": [row(ungraded=3), row(mean=None, low=None, high=None)], "notes": []})
    head, _, first, second = text.splitlines()
    assert head.endswith("ungraded")
    assert first.endswith(" 3")
    assert " – " in second
    assert "ungraded" not in format_table({"rows": [row()]})
    assert format_table({"rows": [row(low=None, high=None, gain=None, gain_low=None, gain_high=None)]}).endswith("35.0")
    assert format_table({"rows": []}) == "no results yet"
