"""Attention by tiles is the written-out attention, in value and gradient, in memory that grows with the length."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_rows import REACHES, ROWS, SCALE, arrays, close, graded, tokens, written

from jaxdistill.cost import hlo
from jaxdistill.models.core import tiles
from jaxdistill.models.core.attention import FAR, Attended, Reach, Tokens


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", {"cpu": 16})
    monkeypatch.setattr(tiles, "_MULTIPLE", 8)


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
    assert not np.allclose(expected[0], written(Attended(*arguments), scale=SCALE), atol=0.1)


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
    mixed = attend(Attended(query, key, value, row, row, Reach(*map(jnp.asarray, reach))))
    assert jnp.isfinite(mixed[:, asked * 16 : (asked + 1) * 16]).all()
    assert jnp.isnan(mixed[:, unseen * 16 : (unseen + 1) * 16]).any()


def test_plan_counts_every_tile() -> None:
    """Of 3 x 3, though how many of them are computed is known only when the program runs."""
    row = ROWS["whole"]
    whole = Attended(*arrays(48), row, row, Reach())
    compiled: Any = jax.jit(functools.partial(tiles.tiled, scale=SCALE)).lower(whole).compile()
    assert max(times for times, _ in hlo.lines_run(compiled.as_text())) == 9


def test_memory_of_a_long_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """8,192 tokens, 8 heads of 64: scores written out would be 2 GiB, and take four times as much with a gradient."""
    monkeypatch.undo()
    array = jax.ShapeDtypeStruct((1, 8192, 8, 64), jnp.float32)
    numbers = jax.ShapeDtypeStruct((1, 8192), jnp.int32)
    row = Tokens(numbers, numbers)
    run = graded(tiles.tiled)
    compiled: Any = run.lower(array, array, array, row, row, Reach()).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 200 * 2**20
