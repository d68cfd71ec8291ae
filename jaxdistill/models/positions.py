"""Positions of tokens: by which models count them, and on which the head runs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped


def position_ids(
    attention_mask: Bool[Array, "batch length"], segment_ids: Int[Array, "batch length"] | None = None
) -> Int[Array, "batch length"]:
    """The position of each real token, from 0, so that padding on either side changes nothing; left padding has 0.

    With `segment_ids`, the count starts again wherever the number changes.
    """
    counted = jnp.maximum(jnp.cumsum(attention_mask, axis=1) - 1, 0)
    if segment_ids is None:
        return counted
    begins = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    return counted - jax.lax.cummax(jnp.where(begins, counted, 0), axis=1)


def head_positions(
    label_mask: Bool[Array, "batch length"], *, group: int, capacity: int
) -> tuple[Int[Array, "groups capacity"], Bool[Array, "groups capacity"]]:
    """The positions of the labelled tokens, in static shapes: (positions, valid), both [batch / group, capacity].

    A group is `group` consecutive rows flattened to one axis of group * length tokens; positions index into the group,
    in ascending order. Unused places hold position 0 and are not valid. Labels beyond `capacity` in one group are
    dropped: choose the largest number that the masking can draw. Groups stay whole on a device when `batch / group` is
    divisible by the number of data shards.
    """
    rows, length = label_mask.shape
    assert rows % group == 0, (rows, group)
    flat = label_mask.reshape(rows // group, group * length)
    positions = jax.vmap(lambda mask: jnp.nonzero(mask, size=capacity, fill_value=0)[0])(flat)
    valid = jnp.arange(capacity)[None, :] < jnp.sum(flat, axis=1, keepdims=True)
    return positions, valid


def gather_tokens(
    x: Shaped[Array, "batch length *rest"], positions: Int[Array, "groups k"]
) -> Shaped[Array, "groups k *rest"]:
    """The entries of x at `positions`, which index groups of batch / groups rows flattened to one token axis."""
    grouped = x.reshape(positions.shape[0], -1, *x.shape[2:])
    return jax.vmap(lambda tokens, index: tokens[index])(grouped, positions)
