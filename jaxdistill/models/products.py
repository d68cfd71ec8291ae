"""Products of tokens with a matrix that has a row for each output, such as an embedding table."""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

# Tokens up to which a CPU multiplies faster with the matrix as the first factor: it then reads every row once, where
# the other order first packs the matrix anew. From 64 tokens on there is no difference (docs/performance.md).
FEW = 32


def times_rows(
    tokens: Float[Array, "*tokens width"], rows: Float[Array, "outputs width"], *, sums: Any = None
) -> Float[Array, "*tokens outputs"]:
    """tokens @ rows.T

    Args:
      sums: the dtype of the sums and of the result; None = that of the factors.
    """
    if math.prod(tokens.shape[:-1]) > FEW:
        return jnp.einsum("...w,vw->...v", tokens, rows, preferred_element_type=sums)
    return jnp.moveaxis(jnp.einsum("vw,...w->v...", rows, tokens, preferred_element_type=sums), 0, -1)
