"""Self-attention through `jax.nn.dot_product_attention`, in place of the products and softmax that a class writes out.

The numbers are the same up to rounding, by the kernel that the settings name. Used only where the probabilities
themselves are not needed (not with dropout on them, and not where they are an output), and without a cache: generation
runs the class's own attention.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax.linen.module import InterceptorContext
from jaxtyping import Array, Bool, Float, Int

Heads = Float[Array, "batch length heads size"]


class Projections(NamedTuple):
    """The submodules that a class runs before and after the attention itself, by name."""

    inputs: tuple[str, ...]  # query, key and value, or one submodule that makes all three
    output: str = ""  # "" = the calling module has the output projection
    dropout: str = ""  # after `output`
    rotary: bool = False  # query and key are rotated by their positions
    scale: float | None = None  # of the scores; None = 1 / sqrt(size of a head)
    returns_maps: bool = False  # returns (output, maps) even where the maps were not asked for


_BERT = Projections(("query", "key", "value"))
_ROTARY = Projections(("q_proj", "k_proj", "v_proj"), "o_proj", rotary=True)

CLASSES = {
    "FlaxBertSelfAttention": _BERT,
    "FlaxRobertaSelfAttention": _BERT,
    "FlaxXLMRobertaSelfAttention": _BERT,
    "FlaxElectraSelfAttention": _BERT,
    "FlaxMultiHeadSelfAttention": Projections(("q_lin", "k_lin", "v_lin"), "out_lin"),  # DistilBERT's
    "FlaxGPT2Attention": Projections(("c_attn",), "c_proj", dropout="resid_dropout"),
    "FlaxGPTNeoSelfAttention": Projections(
        ("q_proj", "k_proj", "v_proj"), "out_proj", dropout="resid_dropout", scale=1.0
    ),
    "FlaxOPTAttention": Projections(("q_proj", "k_proj", "v_proj"), "out_proj", returns_maps=True),
    "FlaxLlamaAttention": _ROTARY,
    "FlaxMistralAttention": _ROTARY,
    "FlaxGemmaAttention": _ROTARY,
}


def dot_product_attention(
    attention_mask: Bool[Array, "batch length"],
    position_ids: Int[Array, "batch length"] | None = None,
    *,
    implementation: Literal["xla", "cudnn"],
) -> Callable[..., Any]:
    """An interceptor under which the self-attention of CLASSES is jax's; other classes run as they are.

    Args:
      position_ids: needed by the classes that rotate query and key.
      implementation: as in jax.nn.dot_product_attention; cudnn takes 16-bit numbers on a GPU only.
    """

    def attend(next_call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: InterceptorContext) -> Any:
        module: Any = context.module
        if context.method_name != "__call__" or type(module).__name__ not in CLASSES:
            return next_call(*args, **kwargs)
        names = CLASSES[type(module).__name__]
        hidden: Float[Array, "batch length width"] = args[0] if args else next(iter(kwargs.values()))
        query, key, value = _heads(module, names, hidden)
        if names.rotary:
            key, query = module.rotary_emb(key, query, position_ids)
        mask = _mask(module, attention_mask)
        if implementation == "cudnn":  # takes no mask that is broadcast over the queries
            mask = jnp.broadcast_to(mask, (*mask.shape[:2], hidden.shape[1], mask.shape[3]))
        mixed = jax.nn.dot_product_attention(
            query, key, value, mask=mask, scale=names.scale, implementation=implementation
        )
        output = mixed.reshape(*hidden.shape[:2], -1)
        if names.output:
            output = getattr(module, names.output)(output)
        if names.dropout:
            output = getattr(module, names.dropout)(output, deterministic=kwargs["deterministic"])
        return (output, None) if names.returns_maps else (output,)

    return attend


def _heads(module: Any, names: Projections, hidden: Float[Array, "batch length width"]) -> list[Heads]:
    """Query, key and value; key and value may have fewer heads, each shared by several heads of the query."""
    parts = [getattr(module, name)(hidden) for name in names.inputs]
    if len(parts) == 1:
        parts = jnp.split(parts[0], 3, axis=-1)
    size = parts[0].shape[-1] // module.config.num_attention_heads
    return [x.reshape(*hidden.shape[:2], -1, size) for x in parts]


def _mask(module: Any, attention_mask: Bool[Array, "batch length"]) -> Bool[Array, "rows 1 queries length"]:
    """The keys that each query sees: the real tokens, and of them those that a causal class lets the query see."""
    keys = attention_mask[:, None, None, :]
    length = attention_mask.shape[1]
    # GPT-Neo's local layers and Mistral's window are in causal_mask, and so are packed documents (intercept.apply).
    return keys & module.causal_mask[:, :, :length, :length].astype(bool) if hasattr(module, "causal_mask") else keys
