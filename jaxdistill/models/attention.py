"""Self-attention through `jax.nn.dot_product_attention`, in place of the products and softmax that a class writes out.

The same numbers up to rounding, by the kernel that is asked for. Only where the probabilities themselves are not
needed (not with dropout on them, and not where they are an output), and without a cache: generation is the class's own.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Heads = Float[Array, "batch length heads size"]


class Projections(NamedTuple):
    """What a class does before and after the attention itself, by the names of its submodules."""

    inward: tuple[str, ...]  # query, key and value, or all three in one
    outward: str = ""  # "" = its caller's
    dropout: str = ""  # after `outward`
    rotary: bool = False  # turns query and key by their positions
    scale: float | None = None  # of the scores; None = 1 / sqrt(size of a head)
    tells_maps: bool = False  # returns (output, maps), whether or not they were asked for


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
    "FlaxOPTAttention": Projections(("q_proj", "k_proj", "v_proj"), "out_proj", tells_maps=True),
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
      position_ids: of causal models, for those that turn query and key by them.
      implementation: as jax.nn.dot_product_attention has it; cudnn takes 16-bit numbers on a GPU alone.
    """

    def attend(next_call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
        module: Any = context.module
        if context.method_name != "__call__" or type(module).__name__ not in CLASSES:
            return next_call(*args, **kwargs)
        own = CLASSES[type(module).__name__]
        hidden: Float[Array, "batch length width"] = args[0] if args else next(iter(kwargs.values()))
        query, key, value = _heads(module, own, hidden)
        if own.rotary:
            key, query = module.rotary_emb(key, query, position_ids)
        mask = _mask(module, attention_mask)
        if implementation == "cudnn":  # takes no mask that is the same for all queries
            mask = jnp.broadcast_to(mask, (*mask.shape[:2], hidden.shape[1], mask.shape[3]))
        mixed = jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=mask,
            scale=own.scale,
            implementation=implementation,
        )
        mixed = mixed.reshape(*hidden.shape[:2], -1)
        if own.outward:
            mixed = getattr(module, own.outward)(mixed)
        if own.dropout:
            mixed = getattr(module, own.dropout)(mixed, deterministic=kwargs["deterministic"])
        return (mixed, None) if own.tells_maps else (mixed,)

    return attend


def _heads(module: Any, own: Projections, hidden: Float[Array, "batch length width"]) -> list[Heads]:
    """Query, key and value; of the last two there may be fewer heads, which several of the query's share."""
    parts = [getattr(module, name)(hidden) for name in own.inward]
    if len(parts) == 1:
        parts = jnp.split(parts[0], 3, axis=-1)
    size = parts[0].shape[-1] // module.config.num_attention_heads
    return [x.reshape(*hidden.shape[:2], -1, size) for x in parts]


def _mask(module: Any, attention_mask: Bool[Array, "batch length"]) -> Bool[Array, "rows 1 queries length"]:
    """Which keys a query sees: the real tokens, and of them those that a causal class lets it see."""
    keys = attention_mask[:, None, None, :]
    length = attention_mask.shape[1]
    # GPT-Neo's local layers and Mistral's window are in it, and so are packed documents (intercept.apply).
    return keys & module.causal_mask[:, :, :length, :length].astype(bool) if hasattr(module, "causal_mask") else keys
