"""BERT (Devlin et al. 2018, arXiv:1810.04805) and RoBERTa (Liu et al. 2019, arXiv:1907.11692) as masked LMs.

Learned positions, layer norms after the sums. Paths are those of transformers' Flax classes, which are torch's.
"""

from collections.abc import Sequence
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdistill.models.core.activations import ACTIVATIONS
from jaxdistill.models.core.modules import (
    BodyOutput,
    Hidden,
    LayerNormPart,
    LayerOutput,
    Layers,
    Projected,
    Projection,
    Seen,
    mix_values,
)
from jaxdistill.models.core.settings import BertSettings


class Part(LayerNormPart):
    """What the modules have in common."""

    settings: BertSettings

    def dense(self, size: int, name: str) -> nn.Dense:
        return nn.Dense(size, dtype=self.how.dtype, kernel_init=self.start(), name=name)


class SelfAttention(Part):
    """Queries, keys and values, and their mixture."""

    @nn.compact
    def __call__(self, hidden: Hidden, seen: Seen) -> LayerOutput:
        s = self.settings
        by_head = (*hidden.shape[:2], s.heads, s.head_size)
        names = ("query", "key", "value")
        projected = Projected(*(self.dense(s.width, name)(hidden).reshape(by_head) for name in names))
        return mix_values(self, projected, seen, scale=s.head_size**-0.5)


class AddedAndNormed(Part):
    """The end of a branch: a dense layer, the sum with what came in, and its norm."""

    @nn.compact
    def __call__(self, branch: Array, hidden: Hidden) -> Hidden:
        return self.norm(
            hidden + self.drop(self.dense(self.settings.width, "dense")(branch), self.settings.dropout), "LayerNorm"
        )


class Attention(Part):
    """The branch of attention."""

    @nn.compact
    def __call__(self, hidden: Hidden, seen: Seen) -> LayerOutput:
        output = SelfAttention(self.settings, self.how, name="self")(hidden, seen)
        return output._replace(hidden=AddedAndNormed(self.settings, self.how, name="output")(output.hidden, hidden))


class Intermediate(Part):
    """The wide layer of the MLP."""

    @nn.compact
    def __call__(self, hidden: Hidden) -> Array:
        return ACTIVATIONS[self.settings.activation](self.dense(self.settings.inner, "dense")(hidden))


class Layer(Part):
    """One layer."""

    @nn.compact
    def __call__(self, hidden: Hidden, seen: Seen) -> LayerOutput:
        output = Attention(self.settings, self.how, name="attention")(hidden, seen)
        inner = Intermediate(self.settings, self.how, name="intermediate")(output.hidden)
        return output._replace(hidden=AddedAndNormed(self.settings, self.how, name="output")(inner, output.hidden))


class Encoder(Part):
    """The layers."""

    @nn.compact
    def __call__(self, hidden: Hidden, seen: Sequence[Seen]) -> list[LayerOutput]:
        return Layers(lambda i, **place: Layer(self.settings, self.how, **place), name="layer")(hidden, seen)


class Embeddings(Part):
    """Words, positions and the type of a single text, added and normed."""

    @nn.compact
    def __call__(self, input_ids: Int[Array, "batch length"]) -> tuple[Hidden, Float[Array, "vocab width"]]:
        s = self.settings
        words = self.embed(s.vocab, "word_embeddings")
        types = self.embed(s.types, "token_type_embeddings")(jnp.zeros_like(input_ids))
        positions = self.embed(s.positions, "position_embeddings")(self._positions(input_ids))
        hidden = self.norm(words(input_ids) + types + positions, "LayerNorm")
        return self.drop(hidden, s.dropout), jnp.asarray(words.embedding)

    def _positions(self, input_ids: Array) -> Array:
        pad = self.settings.positions_after
        if pad is None:
            return jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        real = (input_ids != pad).astype(jnp.int32)  # RoBERTa counts the tokens that are not padding
        return jnp.cumsum(real, axis=1) * real + pad


class Body(Part):
    """Everything but the head."""

    @nn.compact
    def __call__(self, input_ids: Int[Array, "batch length"], seen: Sequence[Seen]) -> BodyOutput:
        hidden, embedding = Embeddings(self.settings, self.how, name="embeddings")(input_ids)
        layers = Encoder(self.settings, self.how, name="encoder")(hidden, seen)
        states = [hidden, *(layer.hidden for layer in layers)]
        return BodyOutput(states[-1], states, layers, embedding)


class _Head(Part):
    """A vocabulary projection whose bias stands outside of it."""

    def project(self, features: Array, embedding: Array) -> Array:
        s = self.settings
        decoder = Projection(s.vocab, bias=False, kernel_init=self.start(), name="decoder")
        logits = decoder(features, embedding if s.tied else None)
        bias = self.param("bias", nn.initializers.zeros, (s.vocab,), jnp.float32)
        return logits + jnp.broadcast_to(bias.astype(logits.dtype), logits.shape)


class Transform(Part):
    """What stands before BERT's vocabulary projection."""

    @nn.compact
    def __call__(self, features: Array) -> Array:
        s = self.settings
        return self.norm(ACTIVATIONS[s.activation](self.dense(s.width, "dense")(features)), "LayerNorm")


class Predictions(_Head):
    """BERT's head."""

    @nn.compact
    def __call__(self, features: Array, embedding: Array) -> Array:
        return self.project(Transform(self.settings, self.how, name="transform")(features), embedding)


class BertHead(Part):
    """The module that holds BERT's head."""

    @nn.compact
    def __call__(self, features: Array, embedding: Array) -> Array:
        return Predictions(self.settings, self.how, name="predictions")(features, embedding)


class RobertaHead(_Head):
    """RoBERTa's head, whose activation is always GELU."""

    @nn.compact
    def __call__(self, features: Array, embedding: Array) -> Array:
        hidden = ACTIVATIONS["gelu"](self.dense(self.settings.width, "dense")(features))
        return self.project(self.norm(hidden, "layer_norm"), embedding)


class MaskedModel(Part):
    """The masked language model."""

    names: ClassVar[dict[str, tuple[str, type[Part]]]] = {  # family -> names of body and head, and the head
        "bert": ("cls", BertHead),
        "roberta": ("lm_head", RobertaHead),
    }

    @nn.compact
    def __call__(self, input_ids: Int[Array, "batch length"], seen: Sequence[Seen]) -> tuple[Array, BodyOutput]:
        s = self.settings
        name, head = self.names[s.family]
        body = Body(s, self.how, name=s.family)(input_ids, seen)
        return head(s, self.how, name=name)(body.features, body.embedding), body
