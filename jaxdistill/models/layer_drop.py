"""LayerDrop (Fan et al. 2019, arXiv:1909.11556): layers skipped at random in training, and by choice afterwards.

A skipped layer is the identity and costs nothing: `lax.cond` runs one branch. So a sub-network of a trained model is
measured without cutting it out, and one compiled program measures every sub-network.
"""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxdistill.models.families import Family
from jaxdistill.models.interceptors import Interceptor, Layer, around_layers
from jaxdistill.models.settings import StudentConfig

DropRates = Callable[[Int[Array, ""]], Float[Array, "layers"]]  # training step -> probability of each layer


def drop_rates(settings: StudentConfig, *, layers: int, steps: int) -> DropRates | None:
    """The probability with which each of `layers` layers is skipped at each of `steps` steps; None = LayerDrop is off.

    With p = settings.layer_drop. By depth: p for all layers, or p l / L for layer l of L, so p at the last (Huang et
    al. 2016, eq. 4). By step: the same at all steps, or growing from 0 at the first to p at the last (as in Zhang and
    He 2020).
    """
    rate = settings.layer_drop
    if not rate:
        return None
    by_depth = {"constant": jnp.ones(layers), "linear": jnp.arange(1, layers + 1) / layers}
    by_step = {"constant": lambda step: jnp.float32(1.0), "linear": lambda step: step / max(steps - 1, 1)}
    shares = by_depth[settings.layer_drop_depth]
    growth = by_step[settings.layer_drop_schedule]
    return lambda step: rate * growth(step) * shares


def draw_kept(key: Key[Array, ""], rates: Float[Array, "layers"]) -> Bool[Array, "layers"]:
    """Draws which layers run, each with probability 1 - rate. All may be skipped, as in fairseq."""
    return jax.random.uniform(key, rates.shape) >= rates


def kept_mask(layers: Sequence[int], *, of: int) -> Bool[np.ndarray, "layers"]:
    """True at the given layers of a model that has `of`."""
    return np.isin(np.arange(of), layers)


def keep_layers(family: Family, kept: Bool[Array, "layers"]) -> Interceptor:
    """An interceptor under which only the layers in `kept` run; the others return their input, unscaled.

    The interceptor counts the layers of a forward pass by its calls (ALBERT runs one set of parameters several times),
    so make one for each forward pass.
    """
    calls = itertools.count()

    def drop(run: Layer, hidden: Array) -> list[Array]:
        def skip(hidden: Array) -> list[Array]:
            # Other outputs of a layer (attention maps) are 0 where the layer does not run.
            shapes = jax.eval_shape(run, hidden)
            return [hidden if x.shape == hidden.shape else jnp.zeros(x.shape, x.dtype) for x in shapes]

        return jax.lax.cond(kept[next(calls)], run, skip, hidden)

    return around_layers(family, drop)
