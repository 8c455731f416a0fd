import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import RandomState

from seal_jax.tasks.arc import augmenters as aug
from seal_jax.tasks.arc.grids import Pair, Puzzle


@st.composite
def grids(draw):
    height, width = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    row = st.tuples(*[st.integers(0, 9)] * width)
    return draw(st.tuples(*[row] * height))


AS_NUMPY = {
    aug.Rotate(90): np.rot90,
    aug.Rotate(180): lambda g: np.rot90(g, 2),
    aug.Rotate(270): lambda g: np.rot90(g, 3),
    aug.Flip(0): np.flipud,
    aug.Flip(1): np.fliplr,
    aug.Transpose(): np.transpose,
    aug.Reflect(0): lambda g: np.concatenate([g, np.flipud(g)], 0),
    aug.Reflect(1, True): lambda g: np.concatenate([np.fliplr(g), g], 1),
    aug.Repeat(0, 3): lambda g: np.tile(g, (3, 1)),
    aug.Repeat(1, 2): lambda g: np.tile(g, (1, 2)),
    aug.Repeat(2, 2): lambda g: np.tile(g, (2, 2)),
    aug.IncreaseHeight(2): lambda g: g.repeat(2, 0),
    aug.IncreaseWidth(3): lambda g: g.repeat(3, 1),
    aug.IncreaseResolution(2): lambda g: g.repeat(2, 0).repeat(2, 1),
    aug.Concat((aug.IdentityAugmenter(), aug.Rotate(180)), axis=1): lambda g: np.concatenate([g, np.rot90(g, 2)], 1),
}


@given(grids())
def test_grids_are_changed_as_numpy_would(grid):
    for augmenter, function in AS_NUMPY.items():
        assert np.array_equal(augmenter.grid(grid), function(np.array(grid))), augmenter


@given(grids(), st.permutations(range(10)))
def test_inverses_undo(grid, colors):
    recolored = aug.MapColors.of(dict(enumerate(colors)))
    for augmenter in (*aug.chosen(), aug.IdentityAugmenter(), recolored):
        if inverse := augmenter.inverse():
            assert inverse.grid(augmenter.grid(grid)) == grid, augmenter


@given(st.lists(grids(), min_size=2, max_size=6), st.integers(0, 99))
def test_permuted_colors_can_be_told_apart_and_0_stays(made, seed):
    puzzle = Puzzle("", (), Pair(sum(made[1:], ()), made[0]))
    colors = aug.PermuteColors().draw(puzzle, RandomState(seed))
    new = [b for _, b in colors.pairs]
    assert (0, 0) in colors.pairs and len(set(new)) == len(new)
    assert colors.inverse().puzzle(aug.PermuteColors().puzzle(puzzle, RandomState(seed))) == puzzle


def test_names_are_those_of_the_original():
    assert repr(aug.Reflect(1, True)) == "Reflect(1, reverse=True)"
    assert repr(aug.Chain((aug.Rotate(90), aug.IncreaseResolution(2)))) == "Chain([Rotate(90), IncreaseResolution(2)])"
    assert repr(aug.Concat((aug.IdentityAugmenter(), aug.Flip(0)), 1)) == "Concat((IdentityAugmenter(), Flip(0)), axis=1)"


@pytest.mark.parametrize("make", [lambda: aug.Rotate(45), lambda: aug.Flip(2), lambda: aug.Reflect(2), lambda: aug.Repeat(3, 2)])
def test_what_cannot_be_applied_is_refused(make):
    with pytest.raises(ValueError, match="expected one of"):
        make()


def test_drawing_needs_a_state():
    with pytest.raises(ValueError, match="rng"):
        aug.RandomTranslateXY().grid(((1,),))
