"""Rematerialisation: parts of each layer are computed again in the backward pass, instead of being kept in memory."""

import jax
from jaxtyping import Array

from jaxdistill.models.families import Family
from jaxdistill.models.interceptors import Interceptor, Layer, around_layers

# name -> which values of a layer are kept besides its input; the others are computed again.
POLICIES = {
    # Keeps products with parameters only. Computed again are the two products of attention and the cheap operations
    # (activations, softmax, norms, dropout); the [heads, length, length] arrays of attention are not kept.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,  # a third more work, for the least memory
}


def rematerialise(family: Family, policy: str) -> Interceptor:
    """Runs every layer under `jax.checkpoint` with one of POLICIES; values and gradients are those without it."""

    def around(run: Layer, hidden: Array) -> list[Array]:
        return jax.checkpoint(run, policy=POLICIES[policy])(hidden)

    return around_layers(family, around)
