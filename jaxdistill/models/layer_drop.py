"""LayerDrop (Fan et al. 2019, arXiv:1909.11556): whole layers are skipped at random in training, or for good in a probe.

One draw a layer a step, shared by the batch and all devices, so that a skipped layer is not computed at all
(`lax.cond`); no 1 / (1 - rate) rescaling; every layer runs in evaluation.
"""

import itertools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from jaxdistill.models.families import Family
from jaxdistill.models.intercept import Interceptor


def drop_rates(rate: float, *, layers: int, depth: str) -> Float[Array, "layers"]:
    """The rate of each layer: the same for all (`constant`), or rate * (i + 1) / layers (`linear`)."""
    ramp = jnp.arange(1, layers + 1) / layers if depth == "linear" else jnp.ones(layers)
    return rate * ramp


def draw_kept(key: Key[Array, ""], rates: Float[Array, "layers"]) -> Bool[Array, "layers"]:
    """True with probability 1 - rate, layer by layer; all of them may be dropped."""
    return jax.random.uniform(key, rates.shape) >= rates


def skip_layers(family: Family, kept: Bool[Array, "layers"]) -> Interceptor:
    """An interceptor that runs layer i only where kept[i]; a layer that is skipped passes its input on.

    Layers are counted as they are called, so ALBERT's shared ones count once a repetition. Good for one forward pass.
    """
    layer = re.compile(re.escape(family.layers).replace(r"\{\}", r"\d+"))
    count = itertools.count()

    def skip(next_call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
        is_layer = context.method_name == "__call__" and layer.fullmatch("/".join(context.module.path))
        if not is_layer:
            return next_call(*args, **kwargs)
        # The hidden states come first; DistilBERT gives them by name.
        name = None if args else next(iter(kwargs))
        hidden = args[0] if args else kwargs[name]

        def run(hidden: Array) -> Any:
            return next_call(hidden, *args[1:], **kwargs) if args else next_call(**{**kwargs, name: hidden})

        def identity(hidden: Array) -> Any:
            # Families differ in the order of what a layer returns. Attention maps of one that did not run are zeros.
            passed = lambda x: hidden if x.shape == hidden.shape else jnp.zeros(x.shape, x.dtype)  # noqa: E731
            return jax.tree.map(passed, jax.eval_shape(run, hidden))

        return jax.lax.cond(kept[next(count)], run, identity, hidden)

    return skip
