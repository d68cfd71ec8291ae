"""A selection of a grid covers it."""

import itertools

import grids
import pytest

AXES = ("abcdef", (0, 1), (True, False), range(10, 13))


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_every_combination_of_values_occurs_in_few_cases(strength: int) -> None:
    cases, everything = grids.covering(*AXES, strength=strength, full=False), list(itertools.product(*AXES))
    for axes in itertools.combinations(range(len(AXES)), strength):
        of_axes = {tuple(case[axis] for axis in axes) for case in everything}
        assert {tuple(case[axis] for axis in axes) for case in cases} == of_axes
    assert len(cases) <= {1: 6, 2: 20, 3: 45}[strength] < len(everything) == 72
    assert cases == [case for case in everything if case in cases]  # in order, each once


def test_values_take_turns_and_the_whole_grid_can_be_had() -> None:
    turns = [second for _, second in grids.covering("abcdef", (0, 1), full=False)]
    assert sorted(turns) == [0, 0, 0, 1, 1, 1]
    assert grids.covering(*AXES, full=True) == list(itertools.product(*AXES))


def test_cases_that_are_not_chosen_are_weekly_and_so_slow(request: pytest.FixtureRequest) -> None:
    chosen, other = grids.everyday(["a", ("b", 1)], "a")
    assert (chosen.values, chosen.marks) == (("a",), ()) and other.values == ("b", 1)
    assert [mark.name for mark in other.marks] == ["weekly"]
    with pytest.raises(AssertionError):
        grids.everyday("ab", "c")  # a case that is renamed is missed
    weekly = [item for item in request.session.items if item.get_closest_marker("weekly")]
    assert all(item.get_closest_marker("slow") for item in weekly)
