"""The vocabulary projection of a language model, apart from the model, so that logits can be made a few at a time."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdistill.models.products import times_rows


@jax.tree_util.register_pytree_with_keys_class  # so that cap and scale are static: arrays alone are leaves
class Head(NamedTuple):
    """A vocabulary projection: logits = bounded(features @ kernel + bias). `features` is None for the weights alone.

    A kernel that is tied is the word embedding as it is, with a row a word: transposed, it would be copied.

    Products are taken in the features' dtype and summed in float32; the logits are then rounded to that dtype, as in
    the models' own classes (a chunk of them is read four times, and on an accelerator that is what takes the time).
    Losses and sums over tokens are float32.
    """

    features: Float[Array, "*tokens width"] | None
    kernel: Float[Array, "width vocab"] | Float[Array, "vocab width"]  # the latter where it is tied
    bias: Float[Array, " vocab"] | None = None
    cap: float = 0.0  # bound of the logits (Gemma 2); 0 = none
    scale: float = 1.0  # factor of the logits (Granite divides them), before the bound
    tied: bool = False

    @property
    def words(self) -> int:
        """The size of the vocabulary."""
        return self.kernel.shape[0 if self.tied else 1]

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple[float, float, bool]]:
        arrays = {"features": self.features, "kernel": self.kernel, "bias": self.bias}
        return [(jax.tree_util.GetAttrKey(name), x) for name, x in arrays.items()], (self.cap, self.scale, self.tied)

    @classmethod
    def tree_unflatten(cls, static: tuple[float, float, bool], arrays: Any) -> "Head":
        features, kernel, bias = arrays
        return cls(features, kernel, bias, *static)


def logits(head: Head) -> Float[Array, "*tokens vocab"]:
    """The logits of a few tokens at a time."""
    assert head.features is not None
    kernel = jnp.asarray(head.kernel).astype(head.features.dtype)
    if head.tied:
        values = times_rows(head.features, kernel, sums=jnp.float32)
    else:
        values = jnp.einsum("...w,wv->...v", head.features, kernel, preferred_element_type=jnp.float32)
    if head.bias is not None:
        values += jnp.broadcast_to(head.bias.astype(jnp.float32), values.shape)
    return bounded(values, cap=head.cap, scale=head.scale).astype(head.features.dtype)


def over_words(head: Head, words: int) -> Head:
    """The projection onto the first `words` words alone; its weights may be NumPy arrays, as those of `head`."""
    if head.words == words:
        return head
    bias = None if head.bias is None else head.bias[:words]
    return head._replace(kernel=head.kernel[:words] if head.tied else head.kernel[:, :words], bias=bias)


def first_words(values: Float[Array, "*rest vocab"], words: int) -> Float[Array, "*rest words"]:
    """The logits of the first `words` words."""
    return values if values.shape[-1] == words else values[..., :words]


def bounded(values: Float[Array, "*tokens vocab"], *, cap: float, scale: float) -> Float[Array, "*tokens vocab"]:
    """cap * tanh(scale * values / cap), or scale * values where `cap` is 0."""
    values = values if scale == 1 else scale * values
    return cap * jnp.tanh(values / cap) if cap else values


def before_bound(
    slope: Float[Array, "*tokens vocab"], logits: Float[Array, "*tokens vocab"], *, cap: float, scale: float
) -> Float[Array, "*tokens vocab"]:
    """The gradient in the values that `bounded` was given, from the gradient `slope` in the logits that it returned."""
    if cap:
        slope = slope * (1 - jnp.square(logits.astype(jnp.float32) / cap))
    return slope if scale == 1 else scale * slope
