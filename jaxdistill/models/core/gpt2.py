"""GPT-2 (Radford et al. 2019): a causal LM with learned positions and layer norms before each branch.

Paths are those of transformers' Flax class, which are torch's. So are the kernels, which torch keeps transposed.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxdistill.models.core.activations import ACTIVATIONS
from jaxdistill.models.core.modules import (
    BodyOutput,
    Hidden,
    How,
    LayerNormPart,
    LayerOutput,
    Layers,
    Projected,
    Projection,
    Seen,
    mix_values,
)
from jaxdistill.models.core.settings import Gpt2Settings
from jaxdistill.models.products import times_rows


class Conv1D(nn.Module):
    """A dense layer whose kernel is [out, in], as torch's Conv1D of this name keeps [in, out]."""

    size: int
    how: How
    start: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", self.start, (self.size, x.shape[-1]), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.size,), jnp.float32)
        product = times_rows(x, jnp.asarray(kernel).astype(self.how.dtype))
        return product + jnp.broadcast_to(jnp.asarray(bias).astype(self.how.dtype), product.shape)


class _Part(LayerNormPart):
    """What the modules have in common."""

    settings: Gpt2Settings

    def dense(self, size: int, name: str, *, into_sum: bool = False) -> Conv1D:
        """A dense layer; where its output is added to the hidden states, it begins smaller by the number of layers."""
        start = nn.initializers.normal(self.settings.initial_std(into_sum=into_sum))
        return Conv1D(size, self.how, start, name=name)


class Attention(_Part):
    """Causal self-attention."""

    @nn.compact
    def __call__(self, hidden: Hidden, seen: Seen) -> LayerOutput:
        s = self.settings
        by_head = (*hidden.shape[:2], s.heads, s.head_size)
        joined = self.dense(3 * s.width, "c_attn")(hidden)
        projected = Projected(*(x.reshape(by_head) for x in jnp.split(joined, 3, axis=-1)))
        output = mix_values(self, projected, seen, scale=s.score_scale)
        added = self.dense(s.width, "c_proj", into_sum=True)(output.hidden)
        return output._replace(hidden=self.drop(added, s.residual_dropout))


class Mlp(_Part):
    """The MLP."""

    @nn.compact
    def __call__(self, hidden: Hidden) -> Hidden:
        s = self.settings
        inner = ACTIVATIONS[s.activation](self.dense(s.inner, "c_fc")(hidden))
        return self.drop(self.dense(s.width, "c_proj", into_sum=True)(inner), s.residual_dropout)


class Layer(_Part):
    """One layer."""

    @nn.compact
    def __call__(self, hidden: Hidden, seen: Seen) -> LayerOutput:
        output = Attention(self.settings, self.how, name="attn")(self.norm(hidden, "ln_1"), seen)
        hidden = hidden + output.hidden
        return output._replace(hidden=hidden + Mlp(self.settings, self.how, name="mlp")(self.norm(hidden, "ln_2")))


class Body(_Part):
    """Everything but the head."""

    @nn.compact
    def __call__(self, input_ids: Int[Array, "batch length"], seen: Sequence[Seen]) -> BodyOutput:
        s = self.settings
        words = self.embed(s.vocab, "wte")
        places = self.embed(s.positions, "wpe")(seen[0].queries.place)
        hidden = self.drop(words(input_ids) + places, s.embedding_dropout)
        layers = Layers(lambda i, **place: Layer(s, self.how, **place), name="h")(hidden, seen)
        features = self.norm(layers[-1].hidden, "ln_f")
        between = [layer.hidden for layer in layers[:-1]]
        return BodyOutput(features, [hidden, *between, features], layers, jnp.asarray(words.embedding))


class CausalModel(_Part):
    """The language model."""

    @nn.compact
    def __call__(self, input_ids: Int[Array, "batch length"], seen: Sequence[Seen]) -> tuple[Array, BodyOutput]:
        s = self.settings
        body = Body(s, self.how, name="transformer")(input_ids, seen)
        head = Projection(s.vocab, bias=False, kernel_init=self.start(), name="lm_head")
        return head(body.features, body.embedding if s.tied else None), body
