from seal_jax.runs.table import figure, format_table, interval, percent


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


def continual_row(method="sequential", **given):
    known = {"newest": [0.5, 0.4, 0.6], "earlier": [0.25, 0.2, 0.3], "backward": [-0.25, -0.3, -0.2], "perplexity": [25.04, 9.0, 101.0]}
    base = {"method": method, "sequences": 8, "passages": 4, "newest_difference": None, "earlier_difference": None}
    return {**base, **known, "refused": 0, "scaled": 0, "unusable": 0, "ungraded": 0, **given}


def test_continual_table_is_aligned():
    rows = [
        continual_row("no adaptation", backward=None, perplexity=[8.126, None, None]),
        continual_row(),
        continual_row("replay", earlier_difference=[0.1, -0.05, 0.25], refused=12),
    ]
    table = {"kind": "continual", "reference": "sequential", "rows": rows, "matrices": {"replay": {"mean": [[0.987]]}}, "notes": ["a note"]}
    assert format_table(table).splitlines() == [
        "method         sequences  passages           newest %          earlier %              backward          perplexity"
        "  earlier, to sequential  refused",
        "-------------  ---------  --------  -----------------  -----------------  --------------------  ------------------"
        "  ----------------------  -------",
        "no adaptation          8         4  50.0 [40.0, 60.0]  25.0 [20.0, 30.0]      –                 8.13              "
        "         –                      0",
        "sequential             8         4  50.0 [40.0, 60.0]  25.0 [20.0, 30.0]  -25.0 [-30.0, -20.0]  25.0 [9.00, 101.0]"
        "         –                      0",
        "replay                 8         4  50.0 [40.0, 60.0]  25.0 [20.0, 30.0]  -25.0 [-30.0, -20.0]  25.0 [9.00, 101.0]"
        "     +10.0 [-5.0, +25.0]       12",
        "  a note",
    ]


def test_perplexities():
    assert [figure(v) for v in (None, 1.0, 8.126, 25.04, 1234.56, 2.5e7)] == ["–", "1.00", "8.13", "25.0", "1234.6", "2.5e+07"]
