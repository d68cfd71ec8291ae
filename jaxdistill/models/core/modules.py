"""The small modules that the architectures share. Parameters are float32; `dtype` is that of the computation."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdistill.models.core.attention import Attended, Reach, Tokens, written_out
from jaxdistill.models.core.kernels import attend
from jaxdistill.models.core.rope import Rotation, rotate
from jaxdistill.models.head import Head, logits

Dtype = Any
Hidden = Float[Array, "batch length width"]


class How(NamedTuple):
    """How a forward pass runs; the same for all layers, and no array."""

    kernel: str  # of attention, by its name in kernels.KERNELS
    maps: bool = False  # whether layers return the probabilities of attention
    train: bool = False  # whether dropout is on
    dtype: Dtype = jnp.float32


class Cached(NamedTuple):
    """Keys and values of a layer for the tokens so far, with room for more.

    By head first, as the products of attention read them: any other order is copied for every token on a CPU.
    """

    key: Float[Array, "batch kv_heads length size"]
    value: Float[Array, "batch kv_heads length size"]
    filled: Int[Array, ""]  # tokens that are held


class Projected(NamedTuple):
    """Queries, keys and values of a layer, by head, before any rotation by position."""

    query: Float[Array, "batch length heads size"]
    key: Float[Array, "batch length kv_heads size"]
    value: Float[Array, "batch length kv_heads size"]


class Seen(NamedTuple):
    """What a layer needs besides its hidden states."""

    queries: Tokens
    keys: Tokens
    reach: Reach
    rotation: Rotation | None = None
    cached: Cached | None = None  # the tokens before the queries
    projected: bool = False  # whether the layer returns its queries, keys and values


class LayerOutput(NamedTuple):
    """What a layer returns; None where it was not asked for."""

    hidden: Hidden
    maps: Float[Array, "batch heads queries keys"] | None = None
    cached: Cached | None = None  # with the queries' own tokens
    projected: Projected | None = None


class BodyOutput(NamedTuple):
    """What stands before the head."""

    features: Hidden
    hidden_states: Sequence[Hidden]  # the embeddings first, and the features last
    layers: Sequence[LayerOutput]
    embedding: Float[Array, "vocab width"]


class RmsNorm(nn.Module):
    """Division by the root mean square (Zhang and Sennrich 2019), in float32."""

    eps: float
    dtype: Dtype
    plus_one: bool = False  # the factor is 1 + weight

    @nn.compact
    def __call__(self, x: Array) -> Array:
        start = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        weight = self.param("weight", start, (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        factor = weight + 1.0 if self.plus_one else weight
        return (normed * jnp.broadcast_to(factor, normed.shape)).astype(self.dtype)


class Layers(nn.Module):
    """The layers of a model by their numbers."""

    # Layer i from (i, name=... or parent=None), the latter for a layer that is run with parameters of its own.
    layer: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, hidden: Hidden, seen: Sequence[Seen]) -> list[LayerOutput]:
        outputs: list[LayerOutput] = []
        for i, one in enumerate(seen):
            layer: Any = self.layer(i, name=str(i))
            outputs.append(layer(hidden, one))
            hidden = outputs[-1].hidden
        return outputs


class ModelPart(nn.Module):
    """What the modules of all models have in common."""

    settings: Any  # of the model, a `settings.Settings`
    how: How


class LayerNormPart(ModelPart):
    """What the modules of models with learned positions and layer norms have in common (BERT, DistilBERT, GPT-2)."""

    def start(self) -> nn.initializers.Initializer:
        return nn.initializers.normal(self.settings.initializer_range)

    def embed(self, entries: int, name: str) -> nn.Embed:
        s = self.settings
        return nn.Embed(entries, s.width, dtype=self.how.dtype, embedding_init=self.start(), name=name)

    def norm(self, x: Array, name: str) -> Array:
        return nn.LayerNorm(self.settings.eps, self.how.dtype, use_fast_variance=False, name=name)(x)

    def drop(self, x: Array, rate: float) -> Array:
        return nn.Dropout(rate, deterministic=not self.how.train)(x) if rate else x


class Projection(nn.Module):
    """The vocabulary projection; the kernel of a tied one is the word embedding."""

    vocab: int
    bias: bool
    scale: float = 1.0
    cap: float = 0.0
    kernel_init: Callable[..., Array] = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, features: Array, embedding: Float[Array, "vocab width"] | None = None) -> Array:
        kernel = embedding
        if kernel is None:
            kernel = self.param("kernel", self.kernel_init, (features.shape[-1], self.vocab), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.vocab,), jnp.float32) if self.bias else None
        return logits(Head(features, jnp.asarray(kernel), bias, self.cap, self.scale, tied=embedding is not None))


def mix_values(module: ModelPart, projected: Projected, seen: Seen, *, scale: float, cap: float = 0.0) -> LayerOutput:
    """Attention of one layer: the mixed values [batch, length, heads * size], and what else was asked for.

    Args:
      module: draws the dropout of the probabilities.
    """
    how, dropout = module.how, module.settings.attention_dropout
    query, key, value = projected
    if seen.rotation is not None:
        query, key = rotate(query, seen.rotation), rotate(key, seen.rotation)
    cached = None if seen.cached is None else _extended(seen.cached, key, value)
    if cached is not None:
        key, value = cached.key.swapaxes(1, 2), cached.value.swapaxes(1, 2)
    inputs = Attended(query, key, value, seen.queries, seen.keys, seen.reach)
    maps = None
    if how.maps or (how.train and dropout):
        drop = nn.Dropout(dropout, deterministic=not how.train, parent=module) if dropout else None
        mixed, maps = written_out(inputs, scale=scale, cap=cap, dropout=drop)
    else:
        mixed = attend(how.kernel, inputs, scale=scale, cap=cap)
    flat = mixed.reshape(*mixed.shape[:2], -1)
    return LayerOutput(flat, maps if how.maps else None, cached, projected if seen.projected else None)


def _extended(cached: Cached, key: Array, value: Array) -> Cached:
    """The cache with the keys and values of the next tokens."""

    def put(held: Array, more: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(held, more.swapaxes(1, 2), cached.filled, axis=2)

    return Cached(put(cached.key, key), put(cached.value, value), cached.filled + key.shape[1])
