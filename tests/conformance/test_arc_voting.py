"""Votes, submissions and scores of the ARC task against recorded outputs of the original."""

import pytest

from seal_jax.tasks.arc import vote
from seal_jax.tasks.arc.grids import Grid


def grid(text: str) -> Grid:
    return tuple(tuple(map(int, row)) for row in text.split("/"))


def text(grid: Grid) -> str:
    return "/".join("".join(map(str, row)) for row in grid)


def voted(case) -> list[str]:
    return [text(attempt) for attempt in vote.vote([(inverter, grid(answer)) for inverter, answer in case["candidates"]])]


@pytest.fixture(scope="module")
def cases(golden):
    return golden("arc_voting")


def test_votes_without_ties(cases):
    assert cases["deterministic"]
    for case in cases["deterministic"]:
        assert voted(case) == case["expected"], case


def test_votes_with_ties(cases):
    assert cases["order_dependent"]
    for case in cases["order_dependent"]:
        ours = voted(case)
        assert ours in case["possible"], case
        if case["attempt_1_stable"]:
            assert ours[0] == case["cpython_result"][0]


def test_majorities(cases):
    assert cases["helpers"]
    for case in cases["helpers"]:
        grids = list(map(grid, case["outputs"]))
        assert text(vote.row_majority(grids)) == case["row_majority"]
        assert text(vote.column_majority(grids)) == case["column_majority"]
        assert list(map(text, vote.top_three(grids))) == case["top3"]


def test_submissions(cases):
    assert cases["submissions"]
    for case in cases["submissions"]:
        made = vote.submission([(name, tuple(map(grid, attempts))) for name, attempts in case["predictions"]])
        expected = case["expected"]
        assert {
            name: [{"attempt_1": text(first), "attempt_2": text(second)} for first, second in attempts] for name, attempts in made.items()
        } == expected["submission"], case["name"]
        solutions = {name: list(map(grid, outputs)) for name, outputs in case["data_file_tasks"].items()}
        result = vote.evaluate(made, solutions, case["subpoints"])
        assert list(result.correct) == list(expected["task_info"]["task_id"].values())
        assert list(result.correct.values()) == list(expected["task_info"]["correct"].values())
        points = result.points if case["subpoints"] else int(result.points)
        assert [
            f"Attempted tasks:  {len(result.correct)}",
            *(f"{name} {correct}" for name, correct in result.correct.items()),
            f"Per Prediction Accuracy: {result.right} / {result.total} = {result.accuracy}",
            f"Competition Accuracy: {points} / {result.tasks} = {result.competition_accuracy}",
        ] == expected["printed"], case["name"]
