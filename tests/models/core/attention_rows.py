"""Rows of text, random heads and the comparison of kernels, for the tests of attention."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.models.core.attention import FAR, Attended, Reach, Tokens, written_out

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


def written(inputs: Attended, **settings: Any) -> jax.Array:
    return written_out(inputs, **settings)[0]


def graded(attend: Callable[..., Any], *untraced: Reach, cap: float = 0.0) -> Callable[..., Any]:
    """Value, and gradient of a number that weighs every entry differently, as a function of the fields of Attended."""

    def number(query: Any, key: Any, value: Any, *rest: Any) -> tuple[Any, Any]:
        mixed = attend(Attended(query, key, value, *rest, *untraced), scale=SCALE, cap=cap)
        return jnp.sum(mixed.astype(jnp.float32) * jnp.cos(jnp.arange(mixed.size).reshape(mixed.shape))), mixed

    def run(*arguments: Any) -> Any:
        (_, mixed), slopes = jax.value_and_grad(number, argnums=(0, 1, 2), has_aux=True)(*arguments)
        return mixed, *slopes

    return jax.jit(run)


def close(ours: Any, expected: Any, tolerance: float) -> None:
    for a, b in zip(ours, expected, strict=True):
        scale = float(jnp.abs(b).max())
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=0, atol=tolerance * scale)


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
