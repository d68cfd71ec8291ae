"""Which layers of a teacher make a student: `first:3`, `every_other`, `[0, 2, 4]` and the like as layer indices."""

import itertools
from collections.abc import Sequence
from typing import Any

from jaxdistill.errors import UserError

_FORMS = "a list of indices, a count, 'every_other', 'first:N', 'last:N', 'spread:N' or '0,2,4'"
_SELECTIONS = ("first", "last", "spread")  # followed by :N, or alone for half of the layers


def resolve_layers(spec: Any, *, of: int, period: int = 1) -> tuple[int, ...]:
    """The layers that a specification names, ascending, for a teacher of `of` layers.

    A list is taken as it is; a count n (or "spread:n") spreads evenly from the first layer to the last,
    layer i at i * (of - 1) / (n - 1) rounded half up (12 -> 6 gives DistilBERT's 0,2,4,7,9,11; n = 1 gives 0);
    "every_other" is 0,2,4,...; "first:n" and "last:n" are ends; without a number these three take half of the layers;
    "0,2,4" is a list.

    Args:
      period: after how many layers their kinds repeat (`period_of`). "every_other" and a spread take whole periods; a
        spread may end with the layers after the last whole period.

    Raises:
      UserError: an index is out of range, repeated or out of order, or no layer is selected; a count to be spread is
        not of whole periods.
    """
    if isinstance(spec, str):
        layers = _parse(spec.strip(), of=of, period=period)
    elif isinstance(spec, int) and not isinstance(spec, bool):
        layers = _spread(_count(spec, spec, of=of), spec, of=of, period=period)
    elif isinstance(spec, Sequence):
        layers = tuple(spec)
    else:
        raise UserError(f"layers: {spec!r} is not {_FORMS}")
    _check_indices(layers, spec, of=of)
    return layers


def period_of(kinds: Sequence[Any]) -> int:
    """After how many layers their kinds repeat; 1 where they do not, or only once."""
    fits = (p for p in range(1, len(kinds) // 2 + 1) if all(kind == kinds[i % p] for i, kind in enumerate(kinds)))
    return next(fits, 1)


def half(*, of: int, period: int = 1) -> int:
    """Half of the layers, or the next smaller number of whole periods."""
    counts = [n for n in range(1, max(of // 2, 1) + 1) if _after_periods(n, of=of, period=period) is not None]
    return max(counts, default=1)


def period_choices(count: int, *, of: int, period: int) -> list[tuple[int, ...]]:
    """All choices of `count` layers in whole periods, of which the first is one."""
    rest = _after_periods(count, of=of, period=period)
    if rest is None:
        return []
    others = itertools.combinations(range(1, of // period), (count - rest) // period - 1)
    return [_of_periods((0, *periods), rest, of=of, period=period) for periods in others]


def _after_periods(count: int, *, of: int, period: int) -> int | None:
    """How many of `count` layers stand after the last whole period; None where it is not a number of whole periods."""
    rest = of % period
    if count % period == 0:
        return 0
    return rest if rest and count > rest and (count - rest) % period == 0 else None


def _of_periods(periods: Sequence[int], rest: int, *, of: int, period: int) -> tuple[int, ...]:
    whole = tuple(p * period + i for p in periods for i in range(period))
    return whole + tuple(range(of - rest, of))


def _parse(spec: str, *, of: int, period: int) -> tuple[int, ...]:
    if spec == "every_other":
        return tuple(i for i in range(of) if i // period % 2 == 0)
    name, colon, number = spec.partition(":")
    if name in _SELECTIONS and not colon:
        number = str(half(of=of, period=period))
    try:
        if not number:
            indices = [int(part) for part in spec.split(",") if part.strip()]
            # "6" is a count, as 6 is; "3," is a list of one index.
            if "," in spec or not indices:
                return tuple(indices)
            name, number = "spread", str(indices[0])
        count = _count(int(number), spec, of=of)
    except ValueError:
        raise UserError(f"layers: {spec!r} is not {_FORMS}") from None
    match name:
        case "first":
            return tuple(range(count))
        case "last":
            return tuple(range(of - count, of))
        case "spread":
            return _spread(count, spec, of=of, period=period)
    raise UserError(f"layers: {spec!r} is not {_FORMS}")


def _count(count: int, spec: Any, *, of: int) -> int:
    if not 1 <= count <= of:
        raise UserError(f"layers: {spec!r} asks for {count} layers; the teacher has {of}, so 1 to {of}")
    return count


def _spread(count: int, spec: Any, *, of: int, period: int) -> tuple[int, ...]:
    rest = _after_periods(count, of=of, period=period)
    if rest is None:
        counts = [n for n in range(1, of + 1) if _after_periods(n, of=of, period=period) is not None]
        near = [n for n in counts if n < count][-1:] + [n for n in counts if n > count][:1]
        raise UserError(
            f"layers: {spec!r} asks for {count} layers, and the kinds of the teacher's {of} repeat after {period}: "
            f"take whole periods, as {' or '.join(map(str, near))} layers are, or a list of indices"
        )
    steps = max((count - rest) // period - 1, 1)
    last = of // period - 1
    periods = [(2 * i * last + steps) // (2 * steps) for i in range((count - rest) // period)]
    return _of_periods(periods, rest, of=of, period=period)


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
