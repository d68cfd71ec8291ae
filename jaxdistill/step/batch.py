"""The batch of an update on the devices, and the micro-batches that it is computed in."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array

Batch = Mapping[str, Array]  # arrays [batch ...] by name, see data.masking and data.causal


def micro_batches(batch: Batch, *, accumulation: int, group: int) -> Batch:
    """[batch ...] -> [accumulation, batch / accumulation ...], whole groups of rows taken in turn.

    Taken in turn, and not in blocks, each device cuts its own rows and none move between devices.
    """

    def cut(x: Array) -> Array:
        parts = x.reshape(-1, accumulation, group, *x.shape[1:])
        return jnp.moveaxis(parts, 1, 0).reshape(accumulation, -1, *x.shape[1:])

    return {name: cut(x) for name, x in batch.items()}


def undo_micro_batches(pieces: Batch, *, group: int) -> Batch:
    """[accumulation, batch / accumulation ...] -> [batch ...]: the inverse of `micro_batches`."""

    def whole(x: Array) -> Array:
        parts = x.reshape(len(x), -1, group, *x.shape[2:])
        return jnp.moveaxis(parts, 0, 1).reshape(-1, *x.shape[2:])

    return {name: whole(x) for name, x in pieces.items()}
