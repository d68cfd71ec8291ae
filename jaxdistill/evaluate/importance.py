"""How much channels, inner units and heads of a model matter, by their activations on a text.

The scores are Minitron's (Muralidharan et al. 2024, arXiv:2407.14679, section 2.2): the mean over a row's tokens of an
activation's size, and the root of the sum of squares of that over rows. A channel's activations are the outputs of all
norms over the residual stream, an inner unit's the input of the down projection, and a head's the norm of its entries
in the input of the output projection.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.module import InterceptorContext
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, PyTree

from jaxdistill.evaluate.context import Context
from jaxdistill.models import intercept
from jaxdistill.models.inputs import Inputs
from jaxdistill.models.model import Model, param_shapes
from jaxdistill.models.narrow import Scores, inputs_of, is_norm, layer_of
from jaxdistill.step import sharding

Sums = dict[str, dict[str, Float[Array, "..."]]]  # kind of score -> module path -> sums over the rows of a batch


def score(context: Context, params: PyTree) -> Scores:
    """The scores of context.student on its held-out batches."""
    model = context.student
    everywhere = sharding.replicated(context.mesh)  # so that each of several processes has them
    sums = jax.jit(lambda params, batch: _sums(model, params, batch, context.mesh), out_shardings=everywhere)
    total: Any = {}
    for batch in context.batches:
        found = jax.device_get(sums(params, sharding.put_batch(dict(batch), context.mesh)))
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), found)
        total = jax.tree.map(np.add, total, wide) if total else wide
    return _scores(model, total)


def _scores(model: Model, total: Any) -> Scores:
    """The scores from the sums over all rows."""

    def roots(kind: str) -> dict[str, np.ndarray]:
        return {layer_of(path, model.family): np.sqrt(x) for path, x in total[kind].items()}

    energies = {path: x / max(x.mean(), 1e-30) for path, x in total["energy"].items()}
    channels = np.sum([np.sqrt(x) for x in total["channels"].values()], axis=0)
    return Scores(channels, roots("inner"), roots("heads"), energies)


def _sums(model: Model, params: PyTree, batch: Mapping[str, Array], mesh: Mesh | None = None) -> Sums:
    """Sums over the rows of a batch, from one forward pass."""
    mask = batch["attention_mask"]
    norms = {p.rpartition("/")[0] for p, x in _shapes(model).items() if is_norm(p, x.shape, model)}
    sums: Sums = {kind: {} for kind in ("channels", "inner", "heads", "energy")}

    def by_token(x: Array) -> Array:
        return x.reshape(*mask.shape, -1)  # OPT runs its MLP, and the norm before it, on tokens without rows

    def add(kind: str, path: str, values: Array) -> None:
        # ALBERT runs one set of parameters several times.
        sums[kind][path] = sums[kind].get(path, jnp.zeros(())) + values

    def record(next_call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: InterceptorContext) -> Any:
        output = next_call(*args, **kwargs)
        path = "/".join(context.module.path)
        if context.method_name != "__call__":
            return output
        if path in norms:
            add("channels", path, _over_rows(jnp.abs(by_token(output)), mask))
            add("energy", path, _energy(by_token(args[0]), mask, centred="scale" in context.module.variables["params"]))
        elif inputs_of(path) == "inner":
            add("inner", path, _over_rows(jnp.abs(by_token(args[0])), mask))
        elif inputs_of(path) == "heads":
            by_head = args[0].reshape(*mask.shape, model.config.num_attention_heads, -1).astype(jnp.float32)
            add("heads", path, _over_rows(jnp.linalg.norm(by_head, axis=-1), mask))
        return output

    inputs = Inputs(batch["input_ids"], mask, batch.get("segment_ids"))
    intercept.apply(model, params, inputs, interceptors=[record], mesh=mesh)
    return sums


def _shapes(model: Model) -> Mapping[str, Any]:
    return flatten_dict(param_shapes(model), sep="/")


def _over_rows(sizes: Float[Array, "batch length of"], mask: Bool[Array, "batch length"]) -> Float[Array, " of"]:
    """sum over rows of (mean over the row's real tokens)^2."""
    inside = jnp.where(mask[:, :, None], sizes.astype(jnp.float32), 0.0).sum(axis=1)
    return jnp.square(inside / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)).sum(axis=0)


def _energy(x: Float[Array, "batch length width"], mask: Bool[Array, "batch length"], *, centred: bool) -> Array:
    """The sum over tokens of each channel's square, in parts of what the norm divides by."""
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(axis=-1, keepdims=True) if centred else wide
    square = jnp.square(wide)
    shares = square / jnp.maximum(square.mean(axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return jnp.where(mask[:, :, None], shares, 0.0).sum(axis=(0, 1))
