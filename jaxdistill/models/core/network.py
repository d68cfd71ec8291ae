"""The core's models as functions of their parameters: a forward pass, with a cache or without, and parameters.

Everything is a pure function. The cache of keys and values goes in and comes out.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxdistill.models.core import bert, decoder, distilbert, gpt2, modernbert
from jaxdistill.models.core.attention import Tokens
from jaxdistill.models.core.modules import Cached, How, Projected, Seen
from jaxdistill.models.core.rope import rotation
from jaxdistill.models.core.settings import (
    BertSettings,
    DecoderSettings,
    DistilBertSettings,
    Gpt2Settings,
    ModernBertSettings,
    Settings,
)

# Settings -> the module that computes them.
MODULES: dict[type[Settings], type[nn.Module]] = {
    DecoderSettings: decoder.LanguageModel,
    Gpt2Settings: gpt2.CausalModel,
    ModernBertSettings: modernbert.MaskedModel,
    BertSettings: bert.MaskedModel,
    DistilBertSettings: distilbert.MaskedModel,
}


Cache = Sequence[Cached]  # one a layer


class Pass(NamedTuple):
    """The outputs of a forward pass."""

    logits: Float[Array, "rows tokens vocab"]
    hidden_states: Sequence[Float[Array, "batch length width"]]  # the embeddings first
    maps: Sequence[Float[Array, "batch heads queries keys"]]  # () where they were not asked for
    cache: Cache | None = None
    projected: Projected | None = None


def real_tokens(
    attention_mask: Bool[Array, "batch length"],
    places: Int[Array, "batch length"],
    segment_ids: Int[Array, "batch length"] | None = None,
) -> Tokens:
    """The tokens of rows of text: each row is one document, or has those that `segment_ids` counts from 0."""
    document = attention_mask.astype(jnp.int32)
    return Tokens(places, document if segment_ids is None else document * (segment_ids.astype(jnp.int32) + 1))


def forward(
    settings: Settings,
    params: PyTree,
    input_ids: Int[Array, "batch length"],
    tokens: Tokens,
    how: How,
    *,
    dropout_key: Key[Array, ""] | None = None,
    projected: int | None = None,
) -> Pass:
    """The forward pass over whole rows.

    Args:
      projected: the layer whose queries, keys and values are returned.
    """
    seen = _seen(settings, tokens, tokens)
    if projected is not None:
        seen[projected] = seen[projected]._replace(projected=True)
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    logits, body = _module(settings, how).apply({"params": params}, input_ids, seen, rngs=rngs)
    maps = [layer.maps for layer in body.layers] if how.maps else ()
    of_layer = None if projected is None else body.layers[projected].projected
    return Pass(logits, body.hidden_states, maps, projected=of_layer)


def empty_cache(settings: Settings, *, batch: int, length: int, dtype: Any) -> Cache:
    """Room for the keys and values of `length` tokens."""
    zeros = jnp.zeros((batch, settings.kv_heads, length, settings.head_size), dtype)
    return [Cached(zeros, zeros, jnp.int32(0))] * len(settings.layers)


def forward_cached(
    settings: Settings,
    params: PyTree,
    input_ids: Int[Array, "batch new"],
    all_tokens: Tokens,
    how: How,
    cache: Cache,
) -> Pass:
    """The forward pass over the tokens that follow those of the cache.

    Args:
      all_tokens: of the whole cache, [batch, length]; slots that are not yet filled count as real tokens.
    """
    new, filled = input_ids.shape[1], cache[0].filled
    queries = Tokens(*(jax.lax.dynamic_slice_in_dim(x, filled, new, axis=1) for x in all_tokens))
    slots = jnp.arange(all_tokens.document.shape[1])[None, :]
    keys = all_tokens._replace(document=jnp.where(slots < filled + new, all_tokens.document, -1))
    seen = [one._replace(cached=layer) for one, layer in zip(_seen(settings, queries, keys), cache, strict=True)]
    logits, body = _module(settings, how).apply({"params": params}, input_ids, seen)
    return Pass(logits, body.hidden_states, (), [layer.cached for layer in body.layers])


def init_params(settings: Settings, key: Key[Array, ""]) -> dict[str, Any]:
    """Random float32 parameters."""
    input_ids = jnp.zeros((1, 2), jnp.int32)
    tokens = Tokens(input_ids, input_ids + 1)
    variables = _module(settings, How(kernel="own")).init(key, input_ids, _seen(settings, tokens, tokens))
    return variables["params"]


def param_shapes(settings: Settings) -> dict[str, Any]:
    """The parameter tree as jax.ShapeDtypeStruct, without computing anything."""
    return jax.eval_shape(lambda: init_params(settings, jax.random.key(0)))


def _module(settings: Settings, how: How) -> Any:
    return MODULES[type(settings)](settings, how)


def _seen(settings: Settings, queries: Tokens, keys: Tokens) -> list[Seen]:
    """What each layer sees; the angles of rotary positions are computed once for all layers that share them."""
    ropes = {kind.rope for kind in settings.layers if kind.rope is not None}
    rotations = {rope: rotation(rope, queries.place) for rope in ropes}
    return [
        Seen(queries, keys, kind.reach, None if kind.rope is None else rotations[kind.rope]) for kind in settings.layers
    ]
