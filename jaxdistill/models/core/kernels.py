"""The kernels of attention by name, for the layers that need neither its probabilities nor dropout on them."""

from collections.abc import Callable
from typing import Literal

import jax
from jaxtyping import Array, Float

from jaxdistill.models.core.attention import Reach, Tokens, visible, written_out


def _own(
    query: Array, key: Array, value: Array, queries: Tokens, keys: Tokens, reach: Reach, *, scale: float, cap: float
) -> Array:
    return written_out(query, key, value, queries, keys, reach, scale=scale, cap=cap)[0]


def _jax(implementation: Literal["xla", "cudnn"]) -> Callable[..., Array]:
    """jax.nn.dot_product_attention, which has no cap: scores that have one are written out."""

    def kernel(
        query: Array, key: Array, value: Array, queries: Tokens, keys: Tokens, reach: Reach, *, scale: float, cap: float
    ) -> Array:
        if cap:
            return _own(query, key, value, queries, keys, reach, scale=scale, cap=cap)
        mask = visible(queries, keys, reach)[:, None]
        return jax.nn.dot_product_attention(query, key, value, mask=mask, scale=scale, implementation=implementation)

    return kernel


# Name of a kernel, as in the setting `attention` -> the kernel, with the arguments of `attend`.
KERNELS: dict[str, Callable[..., Array]] = {"own": _own, "xla": _jax("xla"), "cudnn": _jax("cudnn")}


def attend(
    name: str,
    query: Float[Array, "batch queries heads size"],
    key: Float[Array, "batch keys kv_heads size"],
    value: Float[Array, "batch keys kv_heads size"],
    queries: Tokens,
    keys: Tokens,
    reach: Reach,
    *,
    scale: float,
    cap: float = 0.0,
) -> Float[Array, "batch queries heads size"]:
    """Attention by the kernel of that name; see `attention.written_out` for the arguments."""
    return KERNELS[name](query, key, value, queries, keys, reach, scale=scale, cap=cap).astype(value.dtype)
