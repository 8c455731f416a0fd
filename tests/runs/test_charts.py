import re
import xml.etree.ElementTree

import pytest

from seal_jax.runs import charts

ROUND = {"round": 1, "unadapted": (0.1, 0.05, 0.2), "mean": (0.3, 0.2, 0.4), "best": (0.5, 0.4, 0.6)}


def spread(contexts, rewards=(0.0, 0.5, 0.5, 1.0)):
    made = [{"unadapted": 0.2, "rewards": list(rewards), "kept": [1.0]} for _ in range(contexts)]
    return charts.reward_spread([{"title": "round 1", "contexts": made}])


def markers(svg):
    return len(re.findall(r"<use [^>]*var\(--(?:main|second)\)", svg))


@pytest.mark.parametrize(
    "svg",
    [
        charts.reward_by_round([ROUND]),
        charts.reward_by_round([ROUND, {**ROUND, "round": 2, "best": None, "mean": (0.0, None, None)}]),
        charts.reward_by_round([{**ROUND, "round": n} for n in range(1, 40)]),
        spread(3),
        charts.reward_spread([{"title": "t", "contexts": [{"unadapted": None, "rewards": [], "kept": []}]}] * 2),
        charts.losses([("round 1", [2.0, None, 1.0]), ("round 2", [1.5])]),
    ],
)
def test_svg_is_well_formed_and_takes_every_colour_and_font_from_the_page(svg):
    root = xml.etree.ElementTree.fromstring(svg)
    assert root.get("viewBox") and root.get("aria-label") and root.get("width") is None
    assert "<style" not in svg, "it would hold for the whole page"
    assert "var(--ink)" in svg or "var(--muted)" in svg
    colours = set(re.findall(r"(?:fill|stroke|color): ([^;\"]+)", svg))
    assert all(colour == "none" or colour.startswith("var(--") for colour in colours), colours
    assert not re.findall(r"#[0-9a-f]{6}\b", svg)
    assert "font-family" not in svg and "DejaVu" not in svg
    assert "<metadata" not in svg and "xlink" not in svg and "<script" not in svg


def test_every_self_edit_is_a_point():
    assert markers(spread(7)) - markers(spread(5)) == 2 * 4
    assert markers(spread(7)) >= 7 * 4
    assert "7 contexts, in order of mean reward" in spread(7)


def test_many_contexts_are_thinned_and_it_is_said():
    assert "100 of 250 contexts, evenly spaced" in spread(250, [0.5])
    assert markers(spread(250, [0.5])) == markers(spread(100, [0.5])) > markers(spread(99, [0.5]))


def test_equal_input_gives_an_equal_chart():
    assert spread(3) == spread(3)
