"""Every way to name layers, and one clear line for a name that means none."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdistill.errors import UserError
from jaxdistill.models.layer_choice import resolve_layers


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
