"""LayerDrop (Fan et al. 2019, arXiv:1909.11556): layers left out at random in training, and by choice afterwards.

A layer that is left out is the identity, and costs nothing: `lax.cond` runs one branch. So a sub-network of a trained
model is measured without cutting it out, and one compiled program measures them all.
"""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxdistill.models.families import Family
from jaxdistill.models.intercept import Interceptor, Layer, around_layers
from jaxdistill.models.settings import StudentConfig

DropRates = Callable[[Int[Array, ""]], Float[Array, "layers"]]  # training step -> probability of each layer


def make_drop_rates(*, rate: float, layers: int, depth: str, schedule: str, steps: int) -> DropRates:
    """Probability that each layer is left out of a training step.

    Args:
      rate: p, of every layer and at every step where `depth` and `schedule` are constant.
      depth: constant | linear: layer l of L at p l / L, the last at p (Huang et al. 2016, eq. 4).
      schedule: constant | linear: from 0 at the first step to p at the last (as Zhang and He 2020 grow it).
    """
    shares = {"constant": jnp.ones(layers), "linear": jnp.arange(1, layers + 1) / layers}[depth]
    growth = {"constant": lambda step: jnp.float32(1.0), "linear": lambda step: step / max(steps - 1, 1)}[schedule]
    return lambda step: rate * growth(step) * shares


def drop_rates(settings: StudentConfig, *, layers: int, steps: int) -> DropRates | None:
    """LayerDrop's rate of every one of `layers` student layers at each of `steps` steps; None where it is off."""
    if not settings.layer_drop:
        return None
    return make_drop_rates(
        rate=settings.layer_drop,
        layers=layers,
        depth=settings.layer_drop_depth,
        schedule=settings.layer_drop_schedule,
        steps=steps,
    )


def draw_kept(key: Key[Array, ""], rates: Float[Array, "layers"]) -> Bool[Array, "layers"]:
    """One uniform number a layer: it runs where that is at or above its rate. All may be left out, as in fairseq."""
    return jax.random.uniform(key, rates.shape) >= rates


def kept_mask(layers: Sequence[int], *, of: int) -> Bool[np.ndarray, "layers"]:
    """True at the layers named, of a model that runs `of`."""
    return np.isin(np.arange(of), layers)


def keep_layers(family: Family, kept: Bool[Array, "layers"]) -> Interceptor:
    """An interceptor under which only the layers in `kept` run; the others hand their input on, unscaled.

    It counts the calls of a forward pass (ALBERT runs one set of parameters several times), so make one for each.
    """
    calls = itertools.count()

    def drop(run: Layer, hidden: Array) -> list[Array]:
        def skip(hidden: Array) -> list[Array]:
            # What a layer returns beside its hidden states (attention maps) is 0 where it does not run.
            shapes = jax.eval_shape(run, hidden)
            return [hidden if x.shape == hidden.shape else jnp.zeros(x.shape, x.dtype) for x in shapes]

        return jax.lax.cond(kept[next(calls)], run, skip, hidden)

    return around_layers(family, drop)
