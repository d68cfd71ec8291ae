"""Which layers of a teacher make a student: `first:3`, `every_other`, `[0, 2, 4]` and the like as layer indices."""

import itertools
from collections.abc import Sequence
from typing import Any

from jaxdistill.errors import UserError

_FORMS = "a list of indices, a count, 'every_other', 'first:N', 'last:N', 'spread:N' or '0,2,4'"
_SELECTIONS = ("first", "last", "spread")  # followed by :N, or alone for half of the layers


def resolve_layers(spec: Any, *, of: int) -> tuple[int, ...]:
    """The layers that a specification names, ascending, for a teacher of `of` layers.

    A list is taken as it is; a count n (or "spread:n") spreads evenly from the first layer to the last,
    layer i at i * (of - 1) / (n - 1) rounded half up (12 -> 6 gives DistilBERT's 0,2,4,7,9,11; n = 1 gives 0);
    "every_other" is 0,2,4,...; "first:n" and "last:n" are ends; without a number these three take half of the layers;
    "0,2,4" is a list.

    Raises:
      UserError: an index is out of range, repeated or out of order, or no layer is selected.
    """
    if isinstance(spec, str):
        layers = _parse(spec.strip(), of=of)
    elif isinstance(spec, int) and not isinstance(spec, bool):
        layers = _spread(_count(spec, spec, of=of), of=of)
    elif isinstance(spec, Sequence):
        layers = tuple(spec)
    else:
        raise UserError(f"layers: {spec!r} is not {_FORMS}")
    _check_indices(layers, spec, of=of)
    return layers


def _parse(spec: str, *, of: int) -> tuple[int, ...]:
    if spec == "every_other":
        return tuple(range(0, of, 2))
    name, colon, number = spec.partition(":")
    if name in _SELECTIONS and not colon:
        number = str(max(of // 2, 1))
    try:
        if not number:
            indices = [int(part) for part in spec.split(",") if part.strip()]
            # "6" is a count, as 6 is; "3," is a list of one index.
            return tuple(indices) if "," in spec or not indices else _spread(_count(indices[0], spec, of=of), of=of)
        count = _count(int(number), spec, of=of)
    except ValueError:
        raise UserError(f"layers: {spec!r} is not {_FORMS}") from None
    selections = {
        "first": tuple(range(count)),
        "last": tuple(range(of - count, of)),
        "spread": _spread(count, of=of),
    }
    if name not in _SELECTIONS:
        raise UserError(f"layers: {spec!r} is not {_FORMS}")
    return selections[name]


def _count(count: int, spec: Any, *, of: int) -> int:
    if not 1 <= count <= of:
        raise UserError(f"layers: {spec!r} asks for {count} layers; the teacher has {of}, so 1 to {of}")
    return count


def _spread(count: int, *, of: int) -> tuple[int, ...]:
    steps = max(count - 1, 1)
    return tuple((2 * i * (of - 1) + steps) // (2 * steps) for i in range(count))


def _check_indices(layers: tuple[Any, ...], spec: Any, *, of: int) -> None:
    if not layers:
        raise UserError(f"layers: {spec!r} selects no layer; the teacher has layers 0 to {of - 1}")
    for layer in layers:
        if not isinstance(layer, int) or isinstance(layer, bool):
            raise UserError(f"layers: {layer!r} in {spec!r} is not a layer index")
        if not 0 <= layer < of:
            raise UserError(f"layers: {layer} is out of range; the teacher has layers 0 to {of - 1}")
    for before, after in itertools.pairwise(layers):
        if layers.count(after) > 1:
            raise UserError(f"layers: {after} is repeated in {spec!r}; name each layer (0 to {of - 1}) once")
        if after < before:
            raise UserError(f"layers: {after} comes after {before} in {spec!r}; indices must ascend")
