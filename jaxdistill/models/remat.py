"""Rematerialisation: what the backward pass computes again, layer by layer, in place of keeping it in memory."""

import jax
from jaxtyping import Array

from jaxdistill.models.families import Family
from jaxdistill.models.intercept import Interceptor, Layer, around_layers

# name -> what is kept of a layer beside its input; the rest is computed again.
POLICIES = {
    # Products with parameters alone: of the work, the attention's own two products are done again, and what is cheap
    # (activations, softmax, norms, dropout); its [heads, length, length] arrays are not kept.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,  # a third more work, for the least memory
}


def rematerialise(family: Family, policy: str) -> Interceptor:
    """Runs every layer under `jax.checkpoint` with one of POLICIES; values and gradients are those without it."""

    def around(run: Layer, hidden: Array) -> list[Array]:
        return jax.checkpoint(run, policy=POLICIES[policy])(hidden)

    return around_layers(family, around)
