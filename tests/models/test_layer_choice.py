"""Every way to name layers, and one clear line for a name that means none."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdistill.errors import UserError
from jaxdistill.models.layer_choice import period_choices, period_of, resolve_layers


@pytest.mark.parametrize(
    ("spec", "of", "layers"),
    [
        ([0, 2, 4, 7, 9, 11], 12, (0, 2, 4, 7, 9, 11)),
        (6, 12, (0, 2, 4, 7, 9, 11)),  # DistilBERT's own choice
        ("6", 12, (0, 2, 4, 7, 9, 11)),
        ("spread:4", 12, (0, 4, 7, 11)),
        ("spread:1", 12, (0,)),
        ("every_other", 5, (0, 2, 4)),
        ("first:2", 5, (0, 1)),
        ("first", 6, (0, 1, 2)),
        ("last", 5, (3, 4)),
        ("spread", 12, (0, 2, 4, 7, 9, 11)),
        ("last:2", 5, (3, 4)),
        ("0, 2,4", 5, (0, 2, 4)),
        ("3,", 5, (3,)),
        (5, 5, (0, 1, 2, 3, 4)),
    ],
)
def test_layer_specifications(spec, of, layers):
    assert resolve_layers(spec, of=of) == layers


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        ("every_other", (0, 1, 2, 6, 7, 8, 12, 13, 14, 18, 19, 20)),
        (6, (0, 1, 2, 18, 19, 20)),
        ("spread:9", (0, 1, 2, 9, 10, 11, 18, 19, 20)),
        (7, (0, 1, 2, 18, 19, 20, 21)),  # with the layer after the last whole period
        ("spread", (0, 1, 2, 9, 10, 11, 18, 19, 20, 21)),  # half of them, or the next smaller number of periods
        (22, tuple(range(22))),
        ("first:4", (0, 1, 2, 3)),
        ([0, 5], (0, 5)),
    ],
)
def test_layers_whose_kinds_repeat_are_taken_in_whole_periods(spec, layers):
    """22 layers of ModernBERT, of which every third sees everything."""
    assert resolve_layers(spec, of=22, period=3) == layers


def test_what_is_no_number_of_whole_periods():
    with pytest.raises(UserError, match=r"'spread:11' asks for 11 .* after 3: .* as 10 or 12 layers are"):
        resolve_layers("spread:11", of=22, period=3)
    assert period_choices(4, of=10, period=3) == [(0, 1, 2, 9)]
    assert period_choices(6, of=10, period=3) == [(0, 1, 2, 3, 4, 5), (0, 1, 2, 6, 7, 8)]


@pytest.mark.parametrize(
    ("kinds", "period"),
    [("aaaa", 1), ("abab", 2), ("aabaab", 3), ("aabaa", 1), ("abcab", 1), ("abbabbabba", 3), ("a", 1)],
)
def test_the_period_of_kinds(kinds, period):
    assert period_of(kinds) == period


@given(st.integers(1, 60).flatmap(lambda of: st.tuples(st.just(of), st.integers(1, of))))
def test_a_count_spreads_over_the_whole_depth(case):
    of, count = case
    layers = resolve_layers(count, of=of)
    gaps = np.diff(layers)
    assert len(layers) == count and layers[0] == 0
    if count > 1:
        assert layers[-1] == of - 1 and gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([0, 6], "6 is out of range; the teacher has layers 0 to 5"),
        ([-1, 2], "-1 is out of range"),
        ([0, 2, 2], "2 is repeated"),
        ([3, 1], "1 comes after 3"),
        ([], "selects no layer"),
        ("", "selects no layer"),
        (0, "asks for 0 layers; the teacher has 6"),
        (7, "asks for 7 layers; the teacher has 6"),
        ("last:9", "asks for 9 layers"),
        ("evry_other", "'evry_other' is not a list"),
        ("middle:2", "'middle:2' is not a list"),
        ("first:x", "'first:x' is not a list"),
        ([0, 1.5], "1.5 in"),
        ([True], "True in"),
        (None, "None is not"),
        (2.0, "2.0 is not"),
    ],
)
def test_bad_layer_specifications(spec, message):
    with pytest.raises(UserError) as error:
        resolve_layers(spec, of=6)
    assert message in str(error.value) and "\n" not in str(error.value)
