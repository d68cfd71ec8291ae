"""Attention by tiles is the written-out attention, in value and gradient, in memory that grows with the length."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.models.core import tiles
from jaxdistill.models.core.attention import FAR, Reach, Tokens, written_out

HEADS, KV_HEADS, SIZE, SCALE = 4, 2, 8, 0.3


def tokens(*documents: list[int]) -> Tokens:
    """Rows that hold documents of these lengths; a negative length is padding."""
    rows = []
    for lengths in documents:
        number, places, numbers = 0, [], []
        for length in lengths:
            number += length > 0
            places += range(length) if length > 0 else [0] * -length
            numbers += [number if length > 0 else 0] * abs(length)
        rows.append((places, numbers))
    return Tokens(*(jnp.asarray(np.array(x, np.int32)) for x in zip(*rows, strict=True)))


def arrays(length: int, keys: int = 0, rows: int = 2, dtype: Any = jnp.float32) -> list[jax.Array]:
    shapes = [(rows, length, HEADS, SIZE), *[(rows, keys or length, KV_HEADS, SIZE)] * 2]
    return [3 * jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes)]


def written(*arguments: Any, **settings: Any) -> jax.Array:
    return written_out(*arguments, **settings)[0]


def graded(attend: Callable[..., Any], *, cap: float = 0.0) -> Callable[..., Any]:
    """Value, and gradient of a number that weighs every entry differently."""

    def number(query: Any, key: Any, value: Any, *rest: Any) -> tuple[Any, Any]:
        mixed = attend(query, key, value, *rest, scale=SCALE, cap=cap)
        return jnp.sum(mixed.astype(jnp.float32) * jnp.cos(jnp.arange(mixed.size).reshape(mixed.shape))), mixed

    def run(*arguments: Any) -> Any:
        (_, mixed), slopes = jax.value_and_grad(number, argnums=(0, 1, 2), has_aux=True)(*arguments)
        return mixed, *slopes

    return jax.jit(run)


def close(ours: Any, expected: Any, tolerance: float) -> None:
    for a, b in zip(ours, expected, strict=True):
        scale = float(jnp.abs(b).max())
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=0, atol=tolerance * scale)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", 16)
    monkeypatch.setattr(tiles, "_MULTIPLE", 8)


ROWS = {
    "whole": tokens([48], [48]),
    "not divided by the tiles": tokens([45], [45]),
    "shorter than a tile": tokens([5], [5]),
    "right padding": tokens([33, -15], [48]),
    "left padding": tokens([-30, 18], [-1, 47]),
    "packed": tokens([20, 9, 19], [1, 3, 31, 5, 8]),
    "packed and padded": tokens([20, 9, 2, -17], [1, 30, -17]),
}
REACHES = {
    "causal": (FAR, 0),
    "both ways": (FAR, FAR),
    "window": (5, 0),
    "window of some tiles": (20, 0),
    "window both ways": (7, 7),
}


OTHER_LENGTHS = {"not divided by the tiles": pytest.mark.slow, "shorter than a tile": pytest.mark.slow}  # compiled anew


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """Both ways of attention; the reach is traced, so that each is compiled once a shape."""
    return graded(tiles.tiled), graded(written)


@pytest.mark.parametrize("reach", REACHES.values(), ids=REACHES)
@pytest.mark.parametrize(
    "row", [pytest.param(row, id=name, marks=OTHER_LENGTHS.get(name, ())) for name, row in ROWS.items()]
)
def test_value_and_gradient(row: Tokens, reach: tuple[int, int], pair: Any) -> None:
    arguments = (*arrays(row.place.shape[1]), row, row, Reach(*map(jnp.asarray, reach)))
    close(*(attend(*arguments) for attend in pair), 1e-5)


def test_caps() -> None:
    row = ROWS["packed and padded"]
    arguments = (*arrays(48), row, row, Reach(9))
    ours, expected = (graded(attend, cap=2.0)(*arguments) for attend in (tiles.tiled, written))
    close(ours, expected, 1e-5)
    assert not np.allclose(expected[0], written(*arguments, scale=SCALE), atol=0.1)


def test_keys_of_a_cache() -> None:
    """Few queries at the end of many keys; slots that are not yet filled are document -1."""
    keys = tokens([-3, 37], [40])
    keys = Tokens(jnp.pad(keys.place, ((0, 0), (0, 8))), jnp.pad(keys.document, ((0, 0), (0, 8)), constant_values=-1))
    queries = Tokens(*(x[:, 36:40] for x in keys))
    arguments = (*arrays(4, keys=48), queries, keys, Reach(30))
    close(graded(tiles.tiled)(*arguments), graded(written)(*arguments), 1e-5)


def test_bfloat16_to_its_rounding() -> None:
    row = ROWS["packed and padded"]
    exact = (*(x.astype(jnp.bfloat16).astype(jnp.float32) for x in arrays(48)), row, row, Reach())
    rounded = (*(x.astype(jnp.bfloat16) for x in exact[:3]), *exact[3:])
    ours = graded(tiles.tiled)(*rounded)
    assert {x.dtype for x in ours} == {jnp.dtype(jnp.bfloat16)}
    close(ours, graded(written)(*exact), 2**-7)


@pytest.fixture(scope="module")
def attend() -> Any:
    return jax.jit(functools.partial(tiles.tiled, scale=SCALE))


UNSEEN = {  # what the queries of one tile of 16 do not see: (rows, reach, their tile, the tile of keys)
    "causal": (tokens([48]), Reach(), 0, 1),
    "window": (tokens([48]), Reach(before=16), 2, 0),
    "window both ways": (tokens([48]), Reach(before=4, after=4), 0, 2),
    "another document": (tokens([16, 30, -2]), Reach(after=FAR), 1, 0),
    "text and padding": (tokens([-16, 20, 12]), Reach(after=FAR), 1, 0),
    "padding behind the last document": (tokens([20, 20, -8]), Reach(after=FAR), 0, 2),
}


@pytest.mark.parametrize(("row", "reach", "asked", "unseen"), UNSEEN.values(), ids=UNSEEN)
def test_tiles_that_nobody_sees_are_not_computed(
    row: Tokens, reach: Reach, asked: int, unseen: int, attend: Any
) -> None:
    """Even a weight of 0 would carry a NaN on."""
    query, key, value = arrays(48, rows=1)
    value = value.at[:, unseen * 16 : (unseen + 1) * 16].set(jnp.nan)
    mixed = attend(query, key, value, row, row, Reach(*map(jnp.asarray, reach)))
    assert jnp.isfinite(mixed[:, asked * 16 : (asked + 1) * 16]).all()
    assert jnp.isnan(mixed[:, unseen * 16 : (unseen + 1) * 16]).any()


def test_memory_of_a_long_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """8,192 tokens, 8 heads of 64: scores written out would be 2 GiB, and take four times as much with a gradient."""
    monkeypatch.undo()
    array = jax.ShapeDtypeStruct((1, 8192, 8, 64), jnp.float32)
    numbers = jax.ShapeDtypeStruct((1, 8192), jnp.int32)
    row = Tokens(numbers, numbers)
    run = graded(tiles.tiled)
    compiled: Any = run.lower(array, array, array, row, row, Reach()).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 200 * 2**20
