"""Which cases are tried every day: those chosen, or a selection that covers a grid; JAXDISTILL_GRID=full tries all."""

import collections
import itertools
import os
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

FULL = os.environ.get("JAXDISTILL_GRID", "") == "full"


def covering(*axes: Iterable[Any], strength: int = 1, full: bool = FULL) -> list[tuple[Any, ...]]:
    """Few cases of the product of the axes, in its order, the same ones always; all cases if `full`.

    Every combination of values of any `strength` axes occurs: 1 = every value, 2 = every pair of values. Each case is
    the one with the most combinations that are still missing, among them the one whose values were used least.
    """
    product = list(itertools.product(*axes))
    if full:
        return product

    def combinations(case: Sequence[Any]) -> set[tuple[tuple[int, Any], ...]]:
        return set(itertools.combinations(enumerate(case), strength))

    missing = set().union(*map(combinations, product))
    used: collections.Counter[tuple[int, Any]] = collections.Counter()
    chosen = set()
    while missing:
        case = max(product, key=lambda c: (len(combinations(c) & missing), -sum(used[value] for value in enumerate(c))))
        missing -= combinations(case)
        used.update(enumerate(case))
        chosen.add(case)
    return [case for case in product if case in chosen]


def everyday(cases: Iterable[Any], *chosen: Any) -> list[Any]:
    """The cases of a parametrized test, each a value or a tuple of values; all but the chosen ones are weekly."""
    cases = list(cases)
    assert all(case in cases for case in chosen)
    marked = [(case, () if case in chosen else pytest.mark.weekly) for case in cases]
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks) for case, marks in marked]
