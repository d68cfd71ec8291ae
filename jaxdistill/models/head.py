"""The vocabulary projection of a language model, apart from the model, so that logits can be made a few at a time."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Head(NamedTuple):
    """A vocabulary projection: logits = features @ kernel + bias. `features` is None for the weights alone.

    Products are taken in the features' dtype and summed in float32; the logits are then rounded to that dtype, as in
    the models' own classes (a chunk of them is read four times, and on an accelerator that is what takes the time).
    Losses and sums over tokens are float32. `kernel` is the transposed word embedding where the two are tied.
    """

    features: Float[Array, "*tokens width"] | None
    kernel: Float[Array, "width vocab"]
    bias: Float[Array, " vocab"] | None = None


def logits(head: Head, *, cap: float = 0.0) -> Float[Array, "*tokens vocab"]:
    """The logits of a few tokens at a time, bounded as cap * tanh(logits / cap) where `cap` is not 0."""
    assert head.features is not None
    kernel = head.kernel.astype(head.features.dtype)
    values = jnp.matmul(head.features, kernel, preferred_element_type=jnp.float32)
    if head.bias is not None:
        values += jnp.broadcast_to(head.bias.astype(jnp.float32), values.shape)
    return (cap * jnp.tanh(values / cap) if cap else values).astype(head.features.dtype)
