"""Augmenters, training puzzles and queries of the ARC task against recorded outputs of the original."""

import hashlib

import pytest
from numpy.random import RandomState

from seal_jax.tasks.arc import augmenters as aug
from seal_jax.tasks.arc import leave_out
from seal_jax.tasks.arc.grids import Grid, Pair, Puzzle


def grid(text: str) -> Grid:
    return tuple(tuple(map(int, row)) for row in text.split("/"))


def grid_text(grid: Grid) -> str:
    return "/".join("".join(map(str, row)) for row in grid)


def pair(text: str) -> Pair:
    return Pair(*map(grid, text.split(">")))


def puzzle(task) -> Puzzle:
    return Puzzle("", tuple(map(pair, task["train"])), pair(task["test"][0]))


def puzzle_text(puzzle: Puzzle) -> str:
    pairs = [f"{grid_text(p.input)}>{grid_text(p.output)}" for p in puzzle.pairs]
    return ";".join(pairs[:-1]) + "#" + pairs[-1]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_list(texts: list[str], recorded) -> bool:
    """Whether `texts` are a recorded list, which has its items or, if it is long, their digests."""
    assert len(texts) == recorded["n"]
    return texts == recorded["items"] if "items" in recorded else list(map(digest, texts)) == recorded["sha256_16"]


KNOWN = {
    repr(a): a
    for a in (
        *aug.chosen(concat=True),
        *(aug.IdentityAugmenter(), aug.PermuteColors(), aug.PermuteExamples(), aug.RandomTranslateX(), aug.RandomTranslateY()),
        *(aug.IncreaseResolution(3), aug.IncreaseHeight(3), aug.IncreaseWidth(3), aug.Repeat(2, 3)),
    )
}


@pytest.fixture(scope="module")
def cases(golden):
    return golden("arc_tasks")


@pytest.fixture(scope="module")
def puzzles(cases):
    return {name: puzzle(task) for name, task in cases["tasks"].items()}


def test_chosen_augmenters(cases):
    assert cases["get_augmenters"]
    for case in cases["get_augmenters"]:
        groups = {k.removeprefix("include_"): v for k, v in case.items() if k.startswith("include_")}
        assert [repr(a) for a in aug.chosen(**groups)] == case["expected"]


def test_augmented_grids(cases):
    assert cases["augmenter_grids"]
    for case in cases["augmenter_grids"]:
        rng = RandomState(case["seed"]) if "seed" in case else None
        if case.get("error"):
            with pytest.raises(ValueError):
                KNOWN[case["augmenter"]].grid(grid(case["grid"]), rng)
        else:
            assert grid_text(KNOWN[case["augmenter"]].grid(grid(case["grid"]), rng)) == case["expected"], case


def test_augmented_puzzles(cases, puzzles):
    assert cases["augmenter_tasks"]
    for case in cases["augmenter_tasks"]:
        task, augmenter, expected = puzzles[case["task"]], KNOWN[case["augmenter"]], case["expected"]
        rng = RandomState(case["seed"])
        text = puzzle_text(augmenter.puzzle(task, rng))
        assert text == (expected if isinstance(expected, str) else expected["task"]), case
        if "color_map" in expected:
            drawn = aug.PermuteColors().draw(task, RandomState(case["seed"]))
            assert {str(old): new for old, new in drawn.pairs} == expected["color_map"], case
        if "second_call_with_same_rng_is_same" in expected:
            assert (puzzle_text(augmenter.puzzle(task, rng)) == text) is expected["second_call_with_same_rng_is_same"]


def test_inverses(cases):
    assert cases["inverse"]
    for case in cases["inverse"]:
        if case.get("error"):  # the original makes a Rotate(0), and can neither apply nor invert it
            assert case["augmenter"] == "Rotate(0)"
            with pytest.raises(ValueError):
                aug.Rotate(0)
        elif "color_map" in case:
            colors = aug.MapColors.of({int(old): new for old, new in case["color_map"].items()})
            assert {str(old): new for old, new in colors.inverse().pairs} == case["expected"]
        else:
            augmenter = KNOWN[case["augmenter"]]
            inverse = augmenter.inverse()
            assert (inverse and repr(inverse)) == case["expected"]
            for before, after in case["round_trip"] or ():
                assert grid_text(inverse.grid(augmenter.grid(grid(before)))) == after


def test_training_puzzles(cases, puzzles):
    """In the recorded order where it is recorded; else, and besides, what does not depend on the original's order."""
    assert cases["ttt"]
    for case in cases["ttt"]:
        flags = {key.removeprefix("use_").removesuffix("_augmentations"): on for key, on in case["flags"].items()}
        arguments = (puzzles[case["task"]], aug.chosen(**flags), case["leave_n"])
        made = [puzzle_text(p) for p in leave_out.leave_n_puzzles(*arguments, case["permute_n"], case["seed"])]
        plain = [puzzle_text(p) for p in leave_out.leave_n_puzzles(*arguments, 0, case["seed"])]
        assert is_list(sorted(plain), case["before_permutation_sorted"]), case["task"]
        assert set(plain) <= set(made) and len(set(made)) == len(made)
        if case["ordered_variant"] is None:
            assert len(plain) < len(made) <= 2 * len(plain)
        else:
            assert is_list(made, case["ordered_variant"]), (case["task"], case["combo"])
            assert len(made) in case["count_permute_n_1"]


def test_queries(cases, puzzles):
    assert cases["test"]
    for case in cases["test"]:
        made = leave_out.queries(puzzles[case["task"]], [case["leave_n"]], case["permute_n"], case["seed"])
        texts = [[q.inverter and repr(q.inverter), puzzle_text(q.puzzle)] for q in made]
        assert is_list(sorted(text for inverter, text in texts if inverter is None), case["plain_sorted"]), case["task"]
        views = {repr(view.inverse()): repr(view) for view in leave_out.VIEWS}
        assert sorted([views[inverter], inverter] for inverter, _ in texts if inverter) in case["augmenter_and_inverter_seen"]
        recorded = case["ordered_variant"]
        assert len(made) == recorded["n"]
        for (inverter, text), (expected_inverter, expected) in zip(texts, recorded["items"], strict=True):
            assert inverter == expected_inverter
            assert text == expected or digest(text) == expected, case["task"]
