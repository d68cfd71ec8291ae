"""Interceptors of flax.linen, which read and change a model's forward pass from inside.

An interceptor is `f(next, args, kwargs, context)`. It is called in place of every submodule, which it recognises by
`context.module.path` and `context.method_name`.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import flax.linen as nn
import jax
from flax.linen.module import InterceptorContext
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array, Float, Int

from jaxdistill.models.families import Family
from jaxdistill.models.positions import gather_tokens

Interceptor = Callable[[Callable[..., Any], tuple, dict[str, Any], InterceptorContext], Any]
Layer = Callable[[Float[Array, "batch length width"]], list[Array]]  # the outputs of a layer, hidden states among them


@contextmanager
def intercepted(active: Sequence[Interceptor]) -> Iterator[None]:
    """Runs modules under interceptors, the first outermost."""
    with ExitStack() as stack:
        for interceptor in active:
            stack.enter_context(nn.intercept_methods(interceptor))
        yield


def is_call(context: InterceptorContext, path: str) -> bool:
    return context.method_name == "__call__" and "/".join(context.module.path) == path


def layer_path(family: Family) -> Callable[[str], Any]:
    """Whether a path is that of a layer."""
    return re.compile(re.escape(family.layers).replace(r"\{\}", r"\d+")).fullmatch


def around_layers(family: Family, around: Callable[[Layer, Array], list[Array]]) -> Interceptor:
    """Runs every layer as `around(layer, hidden)`, where `layer` is a pure function of its input hidden states.

    Parameters and masks are constants of that function, so `lax.cond` and `jax.checkpoint` can run it.
    """
    is_layer = layer_path(family)

    def intercept(
        next_call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: InterceptorContext
    ) -> Any:
        if context.method_name != "__call__" or not is_layer("/".join(context.module.path)):
            return next_call(*args, **kwargs)
        # The hidden states come first in every family; DistilBERT's class names all its arguments.
        name = None if args else next(iter(kwargs))
        hidden = args[0] if name is None else kwargs[name]

        def run(hidden: Array) -> Any:
            return next_call(hidden, *args[1:], **kwargs) if name is None else next_call(**{**kwargs, name: hidden})

        # Traced once, so that dropout draws the same numbers as in the plain model.
        traced, shapes = jax.make_jaxpr(run, return_shape=True)(hidden)
        return jax.tree.structure(shapes).unflatten(around(jaxpr_as_fun(traced), hidden))

    return intercept


def record_input(projection: str, inputs: list[Array]) -> Interceptor:
    def record(next_call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: InterceptorContext) -> Any:
        # Where the embeddings are tied, BERT and similar classes run decoder.apply(...), a root module of that name.
        root = not context.module.path and context.module.name == projection.split("/")[-1]
        if is_call(context, projection) or (root and context.method_name == "__call__"):
            inputs.append(args[0])
        return next_call(*args, **kwargs)

    return record


def gather_before(head: str, positions: Int[Array, "groups k"]) -> Interceptor:
    """Gives the head only the tokens at `positions` (see `gather_tokens`)."""

    def gather(next_call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: InterceptorContext) -> Any:
        if is_call(context, head):
            args = (gather_tokens(args[0], positions), *args[1:])
        return next_call(*args, **kwargs)

    return gather
