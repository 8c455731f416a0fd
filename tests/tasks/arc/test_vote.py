from seal_jax.tasks.arc import vote
from seal_jax.tasks.arc.augmenters import Flip, Rotate
from seal_jax.tasks.arc.grids import BLANK

A, B, C = ((1, 2), (3, 4)), ((1, 2), (3, 5)), ((0, 2), (3, 4))


def test_ties_go_to_what_came_first():
    assert vote.top_three([C, A, B, A, C]) == (C, A, B)
    assert vote.vote([(None, B), (None, A)])[0] == B
    assert vote.vote([(None, A), (None, B)])[0] == A


def test_records_and_names_of_inverters_are_the_same():
    candidates = [(None, A), (Flip(0), B), (Rotate(270), B), (Rotate(270), C)]
    assert vote.vote(candidates) == vote.vote([(inverter and repr(inverter), grid) for inverter, grid in candidates])


def test_no_candidates_give_blank_attempts():
    assert vote.vote([]) == (BLANK, BLANK)


def test_grids_without_cells_vote():
    assert vote.vote([(None, ((),)), (None, ()), (None, ())])[0] == ()
    assert vote.row_majority([((),), ((),), A]) == ((),) and vote.column_majority([((),)]) == ()


def test_majorities_make_new_grids():
    grids = [((1, 1), (2, 2)), ((1, 1), (3, 3)), ((0, 0), (2, 2))]
    assert vote.row_majority(grids) == ((1, 1), (2, 2))
    assert vote.column_majority([((1, 2), (1, 3)), ((1, 2), (1, 2)), ((0, 2), (0, 2))]) == ((1, 2), (1, 2))


def test_submissions_are_sorted_and_filled():
    made = vote.submission([("b-11", (A, B)), ("a-x-0", (C, C)), ("b-2", (B, B)), ("b-2", (C, B))])
    assert list(made) == ["a-x", "b"] and len(made["b"]) == 12
    assert made["b"][2] == (C, B) and made["b"][0] == (BLANK, BLANK) and made["b"][11] == (A, B)


def test_a_test_pair_that_is_not_tried_is_not_solved():
    result = vote.evaluate({"a": [(A, B)]}, {"a": [A, A], "b": [A]})
    assert result.correct == {"a": False} and (result.right, result.total, result.points, result.tasks) == (1, 1, 0, 2)
    assert vote.evaluate({"a": [(A, B)]}, {"a": [A, A]}, subpoints=True).competition_accuracy == 0.5
    assert vote.evaluate({}, {"a": [A]}).accuracy == 0.0
