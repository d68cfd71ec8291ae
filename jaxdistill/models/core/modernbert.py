"""ModernBERT (Warner et al. 2024, arXiv:2412.13663): a masked LM with rotary positions, windows and gated MLPs.

Paths are torch's. A window reaches to both sides.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdistill.models.core.activations import ACTIVATIONS
from jaxdistill.models.core.modules import (
    BodyOutput,
    Hidden,
    LayerOutput,
    Layers,
    ModelPart,
    Projected,
    Projection,
    Seen,
    mix_values,
)
from jaxdistill.models.core.settings import ModernBertSettings


class _Part(ModelPart):
    """What the modules have in common."""

    settings: ModernBertSettings

    def dense(self, size: int, name: str, *, bias: bool, into_sum: bool = False) -> nn.Dense:
        """A dense layer; where its output is added to the hidden states, it begins smaller by the number of layers."""
        start = self.start(into_sum=into_sum)
        return nn.Dense(size, use_bias=bias, dtype=self.how.dtype, kernel_init=start, name=name)

    def start(self, *, into_sum: bool) -> nn.initializers.Initializer:
        s = self.settings
        std = s.initial_std(into_sum=into_sum)
        return nn.initializers.truncated_normal(std, lower=-s.initializer_cutoff, upper=s.initializer_cutoff)

    def norm(self, name: str, x: Array) -> Array:
        s = self.settings
        norm = nn.LayerNorm(s.eps, self.how.dtype, use_bias=s.norm_bias, use_fast_variance=False, name=name)
        return norm(x)

    def drop(self, rate: float, x: Array) -> Array:
        return nn.Dropout(rate, deterministic=not self.how.train)(x) if rate else x


class Attention(_Part):
    """Self-attention to both sides."""

    @nn.compact
    def __call__(self, hidden: Hidden, seen: Seen) -> LayerOutput:
        s = self.settings
        joined = self.dense(3 * s.heads * s.head_size, "Wqkv", bias=s.attention_bias)(hidden)
        by_head = (*hidden.shape[:2], s.heads, s.head_size)
        projected = Projected(*(x.reshape(by_head) for x in jnp.split(joined, 3, axis=-1)))
        output = mix_values(self, projected, seen, scale=s.head_size**-0.5)
        mixed = self.dense(s.width, "Wo", bias=s.attention_bias, into_sum=True)(output.hidden)
        return output._replace(hidden=self.drop(s.attention_dropout, mixed))


class Mlp(_Part):
    """The gated MLP; of what Wi gives, the first half is activated and the second is the gate."""

    @nn.compact
    def __call__(self, hidden: Hidden) -> Hidden:
        s = self.settings
        active, gate = jnp.split(self.dense(2 * s.inner, "Wi", bias=s.mlp_bias)(hidden), 2, axis=-1)
        inner = self.drop(s.mlp_dropout, ACTIVATIONS[s.activation](active) * gate)
        return self.dense(s.width, "Wo", bias=s.mlp_bias, into_sum=True)(inner)


class Layer(_Part):
    """One layer; the first has no norm before attention, as the embeddings are normed."""

    first: bool = False

    @nn.compact
    def __call__(self, hidden: Hidden, seen: Seen) -> LayerOutput:
        normed = hidden if self.first else self.norm("attn_norm", hidden)
        output = Attention(self.settings, self.how, name="attn")(normed, seen)
        hidden = hidden + output.hidden
        branch = Mlp(self.settings, self.how, name="mlp")(self.norm("mlp_norm", hidden))
        return output._replace(hidden=hidden + branch)


class Embeddings(_Part):
    """Word embeddings and their norm."""

    @nn.compact
    def __call__(self, input_ids: Int[Array, "batch length"]) -> tuple[Hidden, Float[Array, "vocab width"]]:
        s = self.settings
        words = nn.Embed(
            s.vocab,
            s.width,
            dtype=self.how.dtype,
            embedding_init=self.start(into_sum=False),
            name="tok_embeddings",
        )
        hidden = self.drop(s.embedding_dropout, self.norm("norm", words(input_ids)))
        return hidden, jnp.asarray(words.embedding)


class Body(_Part):
    """Everything but the head."""

    @nn.compact
    def __call__(self, input_ids: Int[Array, "batch length"], seen: Sequence[Seen]) -> BodyOutput:
        hidden, embedding = Embeddings(self.settings, self.how, name="embeddings")(input_ids)
        layers = Layers(lambda i, **place: Layer(self.settings, self.how, first=i == 0, **place), name="layers")(
            hidden, seen
        )
        # As in torch's class of transformers 4, the last hidden states are those before the last norm; 5 norms them.
        states = [hidden, *(layer.hidden for layer in layers)]
        return BodyOutput(self.norm("final_norm", layers[-1].hidden), states, layers, embedding)


class Head(_Part):
    """What stands between the body and the vocabulary projection."""

    @nn.compact
    def __call__(self, features: Float[Array, "rows tokens width"]) -> Float[Array, "rows tokens width"]:
        s = self.settings
        dense = self.dense(s.width, "dense", bias=s.head_bias, into_sum=True)(features)
        return self.norm("norm", ACTIVATIONS[s.head_activation](dense))


class MaskedModel(_Part):
    """The masked language model."""

    @nn.compact
    def __call__(self, input_ids: Int[Array, "batch length"], seen: Sequence[Seen]) -> tuple[Array, BodyOutput]:
        s = self.settings
        body = Body(s, self.how, name="model")(input_ids, seen)
        features = Head(s, self.how, name="head")(body.features)
        decoder = Projection(s.vocab, s.projection_bias, kernel_init=self.start(into_sum=True), name="decoder")
        return decoder(features, body.embedding if s.tied else None), body
