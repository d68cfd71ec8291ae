"""DistilBERT (Sanh et al. 2019, arXiv:1910.01108): BERT without types of tokens, under other names."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdistill.models.core.activations import ACTIVATIONS
from jaxdistill.models.core.bert import Part
from jaxdistill.models.core.modules import (
    BodyOutput,
    Hidden,
    LayerOutput,
    Layers,
    Projected,
    Projection,
    Seen,
    mix_values,
)


class Attention(Part):
    """Self-attention and its output layer."""

    @nn.compact
    def __call__(self, hidden: Hidden, seen: Seen) -> LayerOutput:
        s = self.settings
        by_head = (*hidden.shape[:2], s.heads, s.head_size)
        names = ("q_lin", "k_lin", "v_lin")
        projected = Projected(*(self.dense(s.width, name)(hidden).reshape(by_head) for name in names))
        output = mix_values(self, projected, seen, scale=s.head_size**-0.5)
        return output._replace(hidden=self.dense(s.width, "out_lin")(output.hidden))


class Mlp(Part):
    """The MLP."""

    @nn.compact
    def __call__(self, hidden: Hidden) -> Hidden:
        s = self.settings
        inner = ACTIVATIONS[s.activation](self.dense(s.inner, "lin1")(hidden))
        return self.drop(self.dense(s.width, "lin2")(inner), s.dropout)


class Layer(Part):
    """One layer."""

    @nn.compact
    def __call__(self, hidden: Hidden, seen: Seen) -> LayerOutput:
        output = Attention(self.settings, self.how, name="attention")(hidden, seen)
        hidden = self.norm(hidden + output.hidden, "sa_layer_norm")
        branch = Mlp(self.settings, self.how, name="ffn")(hidden)
        return output._replace(hidden=self.norm(hidden + branch, "output_layer_norm"))


class Transformer(Part):
    """The layers."""

    @nn.compact
    def __call__(self, hidden: Hidden, seen: Sequence[Seen]) -> list[LayerOutput]:
        s = self.settings
        return Layers(lambda i, **place: Layer(s, self.how, **place), name="layer")(hidden, seen)


class Embeddings(Part):
    """Words and positions, added and normed."""

    @nn.compact
    def __call__(self, input_ids: Int[Array, "batch length"]) -> tuple[Hidden, Float[Array, "vocab width"]]:
        s = self.settings
        words = self.embed(s.vocab, "word_embeddings")
        places = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        summed = words(input_ids) + self.embed(s.positions, "position_embeddings")(places)
        return self.drop(self.norm(summed, "LayerNorm"), s.dropout), jnp.asarray(words.embedding)


class Body(Part):
    """Everything but the head."""

    @nn.compact
    def __call__(self, input_ids: Int[Array, "batch length"], seen: Sequence[Seen]) -> BodyOutput:
        hidden, embedding = Embeddings(self.settings, self.how, name="embeddings")(input_ids)
        layers = Transformer(self.settings, self.how, name="transformer")(hidden, seen)
        states = [hidden, *(layer.hidden for layer in layers)]
        return BodyOutput(states[-1], states, layers, embedding)


class MaskedModel(Part):
    """The masked language model."""

    @nn.compact
    def __call__(self, input_ids: Int[Array, "batch length"], seen: Sequence[Seen]) -> tuple[Array, BodyOutput]:
        s = self.settings
        body = Body(s, self.how, name="distilbert")(input_ids, seen)
        hidden = ACTIVATIONS[s.activation](self.dense(s.width, "vocab_transform")(body.features))
        features = self.norm(hidden, "vocab_layer_norm")
        projector = Projection(s.vocab, s.projection_bias, kernel_init=self.start(), name="vocab_projector")
        return projector(features, body.embedding if s.tied else None), body
