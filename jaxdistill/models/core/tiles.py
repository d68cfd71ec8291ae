"""Exact attention by tiles of scores, so that memory grows with the length of a row and not with its square.

The softmax is online (Milakov and Gimelshein 2018, arXiv:1805.02867): each tile of keys corrects the maximum and the
sums of the tiles before it. The backward pass computes the scores of a tile again from the logarithm of the softmax's
sum (FlashAttention, Dao et al. 2022, arXiv:2205.14135, algorithm 4). Sums are float32; products take numbers in the
data type of the arguments. Plain JAX, for any backend. `benchmarks/attention.py` measures memory and time.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.models.core.attention import FAR, Attended, Heads, Tokens, platform, visible

# Platform -> queries, and keys, of a tile at most. What is fastest (benchmarks/attention.py): a CPU's cache is small.
TILE = {"cpu": 256, "tpu": 512, "gpu": 512}
_MULTIPLE = 128  # of which a tile's length is one where there are several: the lanes of a TPU

# Heads of queries beside the head of keys that they share, and no copies of keys.
_Grouped = Float[Array, "batch length kv_heads group size"]
_Rows = Float[Array, "batch kv_heads group queries"]  # one number of every query


def tiled(inputs: Attended, *, scale: float, cap: float = 0.0) -> Heads:
    """Each query's mean of the values that it sees, weighted by the softmax of its scores.

    Only tiles in which some query of some row may see some key are computed.

    Args:
      inputs: their reach may be traced, so that layers of several windows are one program.
      cap: scores become cap * tanh(score / cap); 0 = no cap.
    """
    batch, length, heads, size = inputs.query.shape
    rows, columns = _tile(length), _tile(inputs.key.shape[1])
    whole_tiles = Attended(
        _padded(inputs.query.reshape(batch, length, inputs.key.shape[2], -1, size), rows),  # as _Grouped from here on
        _padded(inputs.key, columns),
        _padded(inputs.value, columns),
        Tokens(*(_padded(x, rows, fill=-2) for x in inputs.queries)),  # document -2: sees no key
        Tokens(*(_padded(x, columns, fill=-1) for x in inputs.keys)),  # document -1: seen by no query
        inputs.reach,
    )
    mixed: Array = _attention(_Form(rows, columns, scale, cap), whole_tiles)
    return mixed[:, :length].reshape(batch, length, heads, size)


class _Form(NamedTuple):
    """What is fixed when a program is compiled."""

    rows: int  # queries of a tile
    columns: int  # keys of a tile
    scale: float
    cap: float


class _Sums(NamedTuple):
    """The softmax over the keys so far."""

    largest: _Rows
    total: _Rows  # of exp(score - largest)
    mixed: Float[Array, "batch kv_heads group queries size"]  # values weighted by exp(score - largest)


class _Saved(NamedTuple):
    """What the backward pass needs."""

    inputs: Attended
    mixed: _Grouped
    log_total: _Rows  # logarithm of the sum of exp(score)


def _tile(length: int) -> int:
    """The length of tiles that cut `length` evenly, with little padding."""
    tiles = -(-length // TILE[platform()])
    return length if tiles == 1 else -(-length // (tiles * _MULTIPLE)) * _MULTIPLE


def _padded(x: Array, tile: int, *, fill: int = 0) -> Array:
    missing = -x.shape[1] % tile
    widths = [(0, missing if axis == 1 else 0) for axis in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=fill) if missing else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(form: _Form, inputs: Attended) -> _Grouped:
    return _forward(form, inputs)[0]


def _forward(form: _Form, inputs: Attended) -> tuple[_Grouped, _Saved]:
    needed = _needed(form, inputs)
    batch, length, kv_heads, group, size = inputs.query.shape

    def row(i: Int[Array, ""]) -> tuple[Array, _Rows]:
        at_row = _at_row(form, inputs, i)

        def add(j: Int[Array, ""], sums: _Sums) -> _Sums:
            tile = _at_column(form, at_row, j)
            scores, _, seen = _scores(form, tile)
            largest = jnp.maximum(sums.largest, jnp.max(scores, axis=-1, where=seen, initial=-jnp.inf))
            weights = jnp.where(seen, jnp.exp(scores - _finite(largest)[..., None]), 0.0)
            shrink = jnp.exp(sums.largest - _finite(largest))  # exp(-inf) = 0 where no key was seen before
            products = _product("bkgqm,bmkd->bkgqd", weights.astype(tile.value.dtype), tile.value)
            return _Sums(largest, shrink * sums.total + weights.sum(-1), shrink[..., None] * sums.mixed + products)

        none = jnp.zeros((batch, kv_heads, group, form.rows), jnp.float32)
        start = _Sums(none - jnp.inf, none, jnp.zeros((*none.shape, size), jnp.float32))
        sums = _over_needed(needed[i], add, start)
        total = jnp.where(sums.total > 0, sums.total, 1.0)  # 0 at the padding of tiles alone
        mixed = (sums.mixed / total[..., None]).astype(inputs.query.dtype)
        return mixed.transpose(0, 3, 1, 2, 4), _finite(sums.largest) + jnp.log(total)

    mixed, log_total = lax.map(row, jnp.arange(len(needed)))
    mixed = jnp.moveaxis(mixed, 0, 1).reshape(inputs.query.shape)
    log_total = jnp.moveaxis(log_total, 0, 3).reshape(batch, kv_heads, group, length)
    return mixed, _Saved(inputs, mixed, log_total)


def _backward(form: _Form, saved: _Saved, slope: _Grouped) -> tuple[Attended]:
    """Column by column, so that the gradients of a tile of keys are finished one after the other."""
    inputs, mixed, log_total = saved
    needed = _needed(form, inputs)
    # What the softmax subtracts: the mean of the slopes of its weights.
    mean = jnp.einsum("bqkgd,bqkgd->bkgq", slope, mixed, preferred_element_type=jnp.float32)

    def column(query_slope: _Grouped, j: Int[Array, ""]) -> tuple[_Grouped, tuple[Array, Array]]:
        at_column = _at_column(form, inputs, j)

        def add(i: Int[Array, ""], slopes: tuple[_Grouped, Array, Array]) -> tuple[_Grouped, Array, Array]:
            tile, slope_part = _at_row(form, at_column, i), _part(slope, i, form.rows)
            log_part, mean_part = (_part(x, i, form.rows, axis=3)[..., None] for x in (log_total, mean))
            scores, slope_of_cap, seen = _scores(form, tile)
            weights = jnp.where(seen, jnp.exp(scores - log_part), 0.0)
            of_weights = _product("bqkgd,bmkd->bkgqm", slope_part, tile.value)
            of_scores = form.scale * weights * (of_weights - mean_part) * slope_of_cap
            of_scores = of_scores.astype(tile.query.dtype)
            of_query, of_key, of_value = slopes
            added = _part(of_query, i, form.rows) + _product("bkgqm,bmkd->bqkgd", of_scores, tile.key)
            return (
                lax.dynamic_update_slice_in_dim(of_query, added, i * form.rows, axis=1),
                of_key + _product("bkgqm,bqkgd->bmkd", of_scores, tile.query),
                of_value + _product("bkgqm,bqkgd->bmkd", weights.astype(tile.value.dtype), slope_part),
            )

        none = jnp.zeros(at_column.key.shape, jnp.float32)
        query_slope, *of_keys = _over_needed(needed[:, j], add, (query_slope, none, none))
        return query_slope, (of_keys[0].astype(inputs.key.dtype), of_keys[1].astype(inputs.value.dtype))

    query_slope, of_keys = lax.scan(column, jnp.zeros(inputs.query.shape, jnp.float32), jnp.arange(needed.shape[1]))
    key_slope, value_slope = (jnp.moveaxis(x, 0, 1).reshape(inputs.key.shape) for x in of_keys)
    slopes: Any = (query_slope.astype(inputs.query.dtype), key_slope, value_slope, None, None, None)
    return (Attended(*slopes),)


_attention.defvjp(_forward, _backward)


def _scores(form: _Form, tile: Attended) -> tuple[Array, Array | float, Bool[Array, "batch 1 1 queries keys"]]:
    """(scores of a tile [batch kv_heads group queries keys], the slope of their cap, which of them count)."""
    scores = form.scale * _product("bqkgd,bmkd->bkgqm", tile.query, tile.key)
    seen = visible(tile.queries, tile.keys, tile.reach)[:, None, None]
    if not form.cap:
        return scores, 1.0, seen
    bounded = jnp.tanh(scores / form.cap)
    return form.cap * bounded, 1.0 - jnp.square(bounded), seen


def _needed(form: _Form, inputs: Attended) -> Bool[Array, "down across"]:
    """Which tiles may have a query that sees a key, by the smallest and the largest place and document of a tile."""
    first, last, padded = jax.tree.map(lambda x: x[:, :, None], _spans(inputs.queries, form.rows))
    from_key, to_key, padded_key = jax.tree.map(lambda x: x[:, None], _spans(inputs.keys, form.columns))
    met = (first.document <= to_key.document) & (from_key.document <= last.document)
    near = (first.place - to_key.place <= inputs.reach.before) & (from_key.place - last.place <= inputs.reach.after)
    return jnp.any((met & near) | (padded & padded_key), axis=0)


def _over_needed(needed: Bool[Array, "tiles"], add: Callable[[Array, Any], Any], start: Any) -> Any:
    """add(tile, sums) from the first to the last tile that is needed."""
    tiles = needed.size
    first = jnp.argmax(needed)
    end = jnp.where(needed.any(), tiles - jnp.argmax(needed[::-1]), 0)

    def goes_on(state: tuple[Array, Any]) -> Array:
        # The constant is the number of passes at most, by which `jaxdistill plan` counts what the loop moves.
        return (state[0] < end) & (state[0] < tiles)

    return lax.while_loop(goes_on, lambda state: (state[0] + 1, add(*state)), (first, start))[1]


def _spans(tokens: Tokens, tile: int) -> tuple[Tokens, Tokens, Bool[Array, "batch tiles"]]:
    """(smallest, largest place and document of the real tokens of every tile, whether it has padding)."""
    place, document = (x.reshape(x.shape[0], -1, tile) for x in tokens)
    real = document > 0
    smallest = Tokens(*(jnp.min(x, axis=2, where=real, initial=FAR) for x in (place, document)))
    largest = Tokens(*(jnp.max(x, axis=2, where=real, initial=-1) for x in (place, document)))
    return smallest, largest, jnp.any(document == 0, axis=2)


def _at_row(form: _Form, inputs: Attended, i: Int[Array, ""]) -> Attended:
    """The queries of row `i` of tiles."""
    query, queries = _part((inputs.query, inputs.queries), i, form.rows)
    return inputs._replace(query=query, queries=queries)


def _at_column(form: _Form, inputs: Attended, j: Int[Array, ""]) -> Attended:
    """The keys and values of column `j` of tiles."""
    key, value, keys = _part((inputs.key, inputs.value, inputs.keys), j, form.columns)
    return inputs._replace(key=key, value=value, keys=keys)


def _part(x: Any, i: Int[Array, ""], tile: int, *, axis: int = 1) -> Any:
    """Tile `i` of every array."""
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i * tile, tile, axis=axis), x)


def _product(axes: str, a: Array, b: Array) -> Array:
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)


def _finite(largest: _Rows) -> _Rows:
    return jnp.where(largest == -jnp.inf, 0.0, largest)
