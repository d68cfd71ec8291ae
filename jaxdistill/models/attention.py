"""Self-attention through `jax.nn.dot_product_attention`, in place of the products and softmax that a class writes out.

The same numbers up to rounding, by the kernel that is asked for. Only where the probabilities themselves are not
needed: not with dropout on them, and not where they are an output.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
from jaxtyping import Array, Bool, Float

# class -> its projections of query, key and value, and what follows the attention in the class itself ("" = nothing).
# Causal classes are not among them: their masks, caches and rotations are in the same call.
CLASSES = {
    "FlaxBertSelfAttention": ("query", "key", "value", ""),
    "FlaxRobertaSelfAttention": ("query", "key", "value", ""),
    "FlaxXLMRobertaSelfAttention": ("query", "key", "value", ""),
    "FlaxElectraSelfAttention": ("query", "key", "value", ""),
    "FlaxMultiHeadSelfAttention": ("q_lin", "k_lin", "v_lin", "out_lin"),  # DistilBERT's
}


def dot_product_attention(
    attention_mask: Bool[Array, "batch length"], *, implementation: Literal["xla", "cudnn"]
) -> Callable[..., Any]:
    """An interceptor under which the self-attention of CLASSES is jax's; other classes run as they are.

    Args:
      implementation: as jax.nn.dot_product_attention has it; cudnn takes 16-bit numbers on a GPU alone.
    """
    keys = attention_mask[:, None, None, :]

    def attend(next_call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
        module: Any = context.module
        if context.method_name != "__call__" or type(module).__name__ not in CLASSES:
            return next_call(*args, **kwargs)
        *inward, outward = CLASSES[type(module).__name__]
        hidden: Float[Array, "batch length width"] = args[0] if args else kwargs["query"]

        def heads(name: str) -> Float[Array, "batch length heads size"]:
            return getattr(module, name)(hidden).reshape(*hidden.shape[:2], module.config.num_attention_heads, -1)

        mixed = jax.nn.dot_product_attention(*map(heads, inward), mask=keys, implementation=implementation)
        mixed = mixed.reshape(hidden.shape)
        return (getattr(module, outward)(mixed) if outward else mixed,)

    return attend
