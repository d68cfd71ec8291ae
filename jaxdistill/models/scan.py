"""Layers of one kind run as a loop, so that the time to compile a model of the core does not grow with its depth.

Outside, the parameters are a tree for each layer, as ever. Inside the program the trees of neighbouring layers that
have the same shapes are stacked, and one layer is compiled for all of them: what differs between them, the reach of
attention and the rotary positions, is data of the loop. Each pass is rematerialised, because a loop that keeps what its
passes computed keeps everything. The stack is a second copy of the parameters.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen.module import InterceptorContext
from jaxtyping import Array, Bool, PyTree

from jaxdistill.models.core.attention import Reach
from jaxdistill.models.core.modules import LayerOutput, Seen
from jaxdistill.models.core.rope import Rotation
from jaxdistill.models.families import Family
from jaxdistill.models.interceptors import Interceptor
from jaxdistill.models.layer_drop import keep_layers
from jaxdistill.models.model import Model
from jaxdistill.models.remat import POLICIES, rematerialise

Run = Callable[[Array, PyTree], tuple[Array, LayerOutput]]  # one pass of the loop


def layer_interceptors(
    model: Model, *, kept: Bool[Array, "layers"] | None = None, remat: str = ""
) -> list[Interceptor]:
    """How a model's layers run: which of them (None = all), what is computed again, and whether they are a loop."""
    if model.scan:
        return [scan_layers(model.family, kept=kept, remat=remat or "full")]
    around = [] if kept is None else [keep_layers(model.family, kept)]
    return around + ([rematerialise(model.family, remat)] if remat else [])


def scan_layers(family: Family, *, kept: Bool[Array, "layers"] | None = None, remat: str = "full") -> Interceptor:
    """An interceptor under which the layers of a model of the core are a loop.

    Dropout draws other numbers than in the layers one by one.

    Args:
      kept: the layers that run, for LayerDrop; None = all.
      remat: what a pass keeps for the backward pass, a name in remat.POLICIES.
    """
    path = tuple(family.layers.split("/")[:-1])

    def intercept(
        next_call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: InterceptorContext
    ) -> Any:
        module: Any = context.module
        if context.method_name != "__call__" or module.path != path:
            return next_call(*args, **kwargs)
        hidden, seen = args
        return _run_all(module, hidden, seen, kept, POLICIES[remat])

    return intercept


def _run_all(
    layers: Any, hidden: Array, seen: Sequence[Seen], kept: Bool[Array, "layers"] | None, policy: Callable[..., bool]
) -> list[LayerOutput]:
    params = layers.variables["params"]
    key = layers.make_rng("dropout") if layers.has_rng("dropout") else None
    outputs: list[LayerOutput] = []
    # A layer that returns its queries, keys and values is a loop of its own, so that no other layer keeps them.
    for _, group in itertools.groupby(range(len(seen)), key=lambda i: (seen[i].projected, _shapes(params[str(i)]))):
        numbers = list(group)
        layer = layers.layer(numbers[0], parent=None)
        see, of_each = _what_differs([seen[i] for i in numbers])
        data = (_stacked([params[str(i)] for i in numbers]), of_each, jnp.asarray(numbers))

        def run(hidden: Array, own: PyTree, layer: Any = layer, see: Any = see) -> tuple[Array, LayerOutput]:
            params, of_layer, i = own
            rngs = {} if key is None else {"dropout": jax.random.fold_in(key, i)}

            def one(hidden: Array) -> LayerOutput:
                return layer.apply({"params": params}, hidden, see(of_layer), rngs=rngs)

            output = one(hidden) if kept is None else _if_kept(kept[i], one, hidden)
            return output.hidden, output

        hidden, stacked = jax.lax.scan(jax.checkpoint(run, policy=policy, prevent_cse=False), hidden, data)
        outputs += [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(len(numbers))]
        outputs[-1] = outputs[-1]._replace(hidden=hidden)
    return outputs


def _if_kept(kept: Bool[Array, ""], layer: Callable[[Array], LayerOutput], hidden: Array) -> LayerOutput:
    def skip(hidden: Array) -> LayerOutput:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(layer, hidden))
        return zeros._replace(hidden=hidden)

    return jax.lax.cond(kept, layer, skip, hidden)


def _what_differs(seen: Sequence[Seen]) -> tuple[Callable[[PyTree], Seen], PyTree]:
    """(what a layer sees, from its entry of the second; what differs between layers, stacked).

    What is the same for all stays as it is, so that a kernel which must know the reach when it is compiled may know it.
    """
    first = seen[0]
    reaches = None
    if any(one.reach != first.reach for one in seen):
        reaches = Reach(*(jnp.asarray(steps) for steps in zip(*(one.reach for one in seen), strict=True)))
    rotations = list({id(one.rotation): one.rotation for one in seen}.values())
    which = None
    if len(rotations) > 1:
        order = {id(rotation): i for i, rotation in enumerate(rotations)}
        which = jnp.asarray([order[id(one.rotation)] for one in seen])
        some = next(rotation for rotation in rotations if rotation is not None)
        # A layer without rotary positions turns by an angle of 0.
        still = Rotation(jnp.ones_like(some.cosine), jnp.zeros_like(some.sine))
        table = _stacked([rotation or still for rotation in rotations])

    def see(own: PyTree) -> Seen:
        reach, index = own
        rotation = first.rotation if index is None else jax.tree.map(lambda x: x[index], table)
        return first._replace(reach=first.reach if reach is None else reach, rotation=rotation)

    return see, (reaches, which)


def _stacked(trees: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _shapes(tree: PyTree) -> Any:
    return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)
