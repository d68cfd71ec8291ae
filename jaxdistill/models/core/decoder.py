"""Llama and its kin as one decoder: placement of norms, heads, scales and caps are settings. Paths are torch's."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxdistill.models.core.activations import ACTIVATIONS
from jaxdistill.models.core.modules import (
    BodyOutput,
    Hidden,
    LayerOutput,
    Layers,
    ModelPart,
    Projected,
    Projection,
    RmsNorm,
    Seen,
    mix_values,
)
from jaxdistill.models.core.settings import DecoderSettings


class _Part(ModelPart):
    """What the modules of a decoder have in common."""

    settings: DecoderSettings

    def dense(self, size: int, name: str, *, bias: bool = False) -> nn.Dense:
        start = nn.initializers.normal(self.settings.initializer_range)
        return nn.Dense(size, use_bias=bias, dtype=self.how.dtype, kernel_init=start, name=name)

    def norm(self, name: str, x: Array) -> Array:
        """The norm of this name; x itself where there is none."""
        if not name:
            return x
        s = self.settings
        return RmsNorm(s.eps, self.how.dtype, s.norm_plus_one, name=name)(x)


class Attention(_Part):
    """Self-attention, with grouped key heads, norms of queries and keys, and rotary positions."""

    @nn.compact
    def __call__(self, hidden: Hidden, seen: Seen) -> LayerOutput:
        s = self.settings
        query, key, value = self._projected(hidden)
        query = self._normed_heads("q_norm", query, s.heads)
        key = self._normed_heads("k_norm", key, s.kv_heads)
        value = value.reshape(*value.shape[:2], s.kv_heads, s.head_size)
        output = mix_values(self, Projected(query, key, value), seen, scale=s.score_scale, cap=s.score_cap)
        return output._replace(hidden=self.dense(s.width, "o_proj", bias=s.out_bias)(output.hidden))

    def _projected(self, hidden: Array) -> Sequence[Array]:
        s = self.settings
        sizes = [heads * s.head_size for heads in (s.heads, s.kv_heads, s.kv_heads)]
        if s.fused:
            ends = [sizes[0], sizes[0] + sizes[1]]
            return jnp.split(self.dense(sum(sizes), "qkv_proj", bias=s.qkv_bias)(hidden), ends, axis=-1)
        names = ("q_proj", "k_proj", "v_proj")
        return [self.dense(size, name, bias=s.qkv_bias)(hidden) for name, size in zip(names, sizes, strict=True)]

    def _normed_heads(self, name: str, x: Array, heads: int) -> Array:
        by_head = (*x.shape[:2], heads, self.settings.head_size)
        match self.settings.head_norm:
            case "each":
                return self.norm(name, x.reshape(by_head))
            case "all":
                return self.norm(name, x).reshape(by_head)
        return x.reshape(by_head)


class Mlp(_Part):
    """The gated MLP (Shazeer 2020, arXiv:2002.05202)."""

    @nn.compact
    def __call__(self, hidden: Hidden) -> Hidden:
        s = self.settings
        if s.fused:
            gate, up = jnp.split(self.dense(2 * s.inner, "gate_up_proj", bias=s.mlp_bias)(hidden), 2, axis=-1)
        else:
            gate, up = (self.dense(s.inner, name, bias=s.mlp_bias)(hidden) for name in ("gate_proj", "up_proj"))
        return self.dense(s.width, "down_proj", bias=s.mlp_bias)(ACTIVATIONS[s.activation](gate) * up)


class Layer(_Part):
    """One layer; takes its hidden states first, so that interceptors can run it as a function of them."""

    @nn.compact
    def __call__(self, hidden: Hidden, seen: Seen) -> LayerOutput:
        norms = self.settings.norms
        output = Attention(self.settings, self.how, name="self_attn")(self.norm(norms.before_attention, hidden), seen)
        hidden = self._added(hidden, self.norm(norms.after_attention, output.hidden))
        branch = Mlp(self.settings, self.how, name="mlp")(self.norm(norms.before_mlp, hidden))
        return output._replace(hidden=self._added(hidden, self.norm(norms.after_mlp, branch)))

    def _added(self, hidden: Array, branch: Array) -> Array:
        s = self.settings
        if s.residual_dropout:
            branch = nn.Dropout(s.residual_dropout, deterministic=not self.how.train)(branch)
        return hidden + branch * s.residual_scale if s.residual_scale != 1 else hidden + branch


class Body(_Part):
    """Everything but the head."""

    @nn.compact
    def __call__(self, input_ids: Int[Array, "batch length"], seen: Sequence[Seen]) -> BodyOutput:
        s = self.settings
        start = nn.initializers.normal(s.initializer_range)
        embed = nn.Embed(s.vocab, s.width, dtype=self.how.dtype, embedding_init=start, name="embed_tokens")
        hidden = embed(input_ids)
        if s.embedding_scale != 1:
            hidden = hidden * jnp.asarray(s.embedding_scale, hidden.dtype)
        layers = Layers(lambda i, **place: Layer(s, self.how, **place), name="layers")(hidden, seen)
        features = self.norm("norm", layers[-1].hidden)
        between = [layer.hidden for layer in layers[:-1]]
        return BodyOutput(features, [hidden, *between, features], layers, jnp.asarray(embed.embedding))


class LanguageModel(_Part):
    """The language model; causal, or masked (EuroBERT)."""

    @nn.compact
    def __call__(self, input_ids: Int[Array, "batch length"], seen: Sequence[Seen]) -> tuple[Array, BodyOutput]:
        s = self.settings
        body = Body(s, self.how, name="model")(input_ids, seen)
        head = Projection(
            s.vocab,
            s.projection_bias,
            s.logit_scale,
            s.logit_cap,
            nn.initializers.normal(s.initializer_range),
            name="lm_head",
        )
        return head(body.features, body.embedding if s.tied else None), body
