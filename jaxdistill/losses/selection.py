"""Losses on the tokens alone that the student is least certain of, chosen before the head.

Selective distillation by the student's entropy: of every group of rows, the share of the predicted tokens whose
distribution has the highest entropy is compared with the teacher. Their number depends on the masks alone, so a mean is
as exact over micro-batches and devices as any other. Which tokens they are has no gradient.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.losses.divergences import log_softmax
from jaxdistill.losses.fused_head import chunk_size
from jaxdistill.models.head import Head, logits
from jaxdistill.models.positions import gather_tokens


def chosen(mask: Bool[Array, "batch length"], *, share: float, group: int) -> Int[Array, "groups"]:
    """How many tokens are chosen of each group of `group` rows: the share of those in the mask, rounded up."""
    counts = mask.reshape(len(mask) // group, -1).sum(axis=1)
    # From a table, as a share is no sum of powers of two: in float32, 0.2 of 10 tokens would be rounded up to 3.
    return jnp.asarray(np.ceil(np.arange(group * mask.shape[1] + 1) * share - 1e-9), jnp.int32)[counts]


def most_uncertain(
    entropies: Float[Array, "batch length"], mask: Bool[Array, "batch length"], *, share: float, group: int
) -> tuple[Int[Array, "groups k"], Bool[Array, "groups k"]]:
    """The positions of the tokens in the mask with the highest entropy, as of `positions.head_positions`."""
    masked = jnp.where(mask, entropies, -1.0).reshape(len(mask) // group, -1)
    capacity = int(np.ceil(masked.shape[1] * share - 1e-9))
    positions = jnp.argsort(-masked, axis=1)[:, :capacity]
    return positions, jnp.arange(capacity)[None, :] < chosen(mask, share=share, group=group)[:, None]


def entropies_of(head: Head, *, mesh: Mesh | None = None) -> Float[Array, "batch length"]:
    """The entropy of the student's distribution over words for each token, in nats; a few tokens of a row at a time."""
    features = head.features
    assert features is not None
    rows, length = features.shape[:2]
    devices = 1 if mesh is None else mesh.size
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    count = min(max(chunk_size(tokens=rows * length // devices, platform=platform) * devices // rows, 1), length)
    pieces = -(-length // count)
    padded = jnp.pad(features, ((0, 0), (0, pieces * count - length), (0, 0)))
    by_piece = jnp.moveaxis(padded.reshape(rows, pieces, count, -1), 1, 0)
    values = jax.lax.map(lambda piece: entropy(logits(head._replace(features=piece))), by_piece)
    return jnp.moveaxis(values, 0, 1).reshape(rows, -1)[:, :length]


def entropy(logits: Float[Array, "*tokens vocab"]) -> Float[Array, "*tokens"]:
    """-sum_v q_v log q_v with q = softmax(logits)."""
    log_q = log_softmax(logits, 1.0)
    return -jnp.sum(jnp.exp(log_q) * log_q, axis=-1)


def at(x: Any, positions: Int[Array, "groups k"]) -> Any:
    """The tokens at `positions` of arrays by token, or of the features of heads."""

    def one(x: Any) -> Any:
        if isinstance(x, Head):
            assert x.features is not None
            return x._replace(features=gather_tokens(x.features, positions))
        return gather_tokens(x, positions)

    return jax.tree.map(one, x, is_leaf=lambda x: isinstance(x, Head))
