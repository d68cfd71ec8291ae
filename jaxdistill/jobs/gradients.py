"""The gradient of each loss on the real batches of a recipe: which loss moves the student, and which work together."""

import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxdistill.config import Config
from jaxdistill.errors import UserError
from jaxdistill.losses import terms
from jaxdistill.losses.objective import make_objective
from jaxdistill.run.assemble import Parts, assemble
from jaxdistill.run.training import distillation_of
from jaxdistill.step import optimizer as optimizers
from jaxdistill.step import sharding
from jaxdistill.step.batch import Batch, micro_batches
from jaxdistill.step.forward import Distillation, StudentPass, loss_fn


class Gradients(NamedTuple):
    """What each loss asks of the student before the first step."""

    names: tuple[str, ...]
    weights: dict[str, float]
    values: dict[str, float]  # mean of each loss, unweighted
    norms: dict[str, float]  # of the gradient of weight x mean
    cosines: Float[np.ndarray, "losses losses"]
    rows: int  # of all batches

    def lines(self) -> Iterator[str]:
        """A table: a row for each loss, and its cosine with every other."""
        yield f"{'loss':16} {'weight':>8} {'value':>10} {'gradient':>10}  cosine with {'  '.join(self.names)}"
        for i, name in enumerate(self.names):
            cosines = " ".join(
                f"{self.cosines[i, j]:{max(len(other), 6) + 1}.3f}" for j, other in enumerate(self.names)
            )
            yield f"{name:16} {self.weights[name]:8.4g} {self.values[name]:10.4g} {self.norms[name]:10.4g}  {cosines}"
        yield f"norms of the gradients of weight x loss, without dropout, over {self.rows} rows of the text"

    def results(self) -> dict[str, Any]:
        """For a script."""
        return {
            "rows": self.rows,
            "losses": {
                name: {"weight": self.weights[name], "value": self.values[name], "gradient": self.norms[name]}
                for name in self.names
            },
            "cosines": {
                name: {other: float(self.cosines[i, j]) for j, other in enumerate(self.names)}
                for i, name in enumerate(self.names)
            },
        }


def gradients(config: Config, *, batches: int, allow_pickle: bool) -> Gradients:
    """The gradient of every loss of a config, alone, at the start of its run, over its first batches.

    Of a batch in micro-batches the first one is taken.

    Raises:
      UserError: the run could not begin; teacher and student have devices of their own.
    """
    if batches < 1:
        raise UserError(f"--batches {batches} must be at least 1")
    if config.student.devices:
        raise UserError("config.student.devices: gradients are measured on one set of devices; set both devices to 0")
    with tempfile.TemporaryDirectory() as folder:
        parts = assemble(config, Path(folder) / "run", allow_pickle=allow_pickle)
        return _measured(config, parts, batches=batches)


def _measured(config: Config, parts: Parts, *, batches: int) -> Gradients:
    objective = make_objective(config.loss, config.policy, parts.pair)
    distillation = distillation_of(config, parts.pair, objective)
    params = parts.training.init(parts.pair.student_params).params
    teacher_params = jax.device_put(parts.pair.params_of_teachers, parts.training.teacher_shardings)
    functions = {name: _gradient_of(name, distillation, config, parts) for name in objective.weights}
    sums: dict[str, PyTree] = {}
    values = dict.fromkeys(functions, 0.0)
    rows = 0
    for at, host in enumerate(itertools.islice(parts.batches, batches)):
        if parts.rollouts is None:
            batch = sharding.put_batch(host, parts.meshes.student)
        else:
            batch = parts.rollouts(at, host, params["student"], parts.pair.of_first(teacher_params))
        if config.train.accumulation > 1:
            pieces = micro_batches(batch, accumulation=config.train.accumulation, group=config.mask.group)
            batch = {name: x[0] for name, x in pieces.items()}
        rows += len(batch["input_ids"])
        for name, function in functions.items():
            value, grads = function(params, teacher_params, batch)
            sums[name] = jax.tree.map(jnp.add, sums[name], grads) if name in sums else grads
            values[name] += float(value) / batches
    names = tuple(functions)
    gram = np.array([[float(_dot(sums[a], sums[b])) for b in names] for a in names]) / batches**2
    norms = np.sqrt(np.diag(gram))
    cosines = gram / np.maximum(np.outer(norms, norms), 1e-30)
    return Gradients(
        names,
        {name: float(weight) for name, weight in objective.weights.items()},
        values,
        dict(zip(names, norms.tolist(), strict=True)),
        cosines,
        rows,
    )


def _gradient_of(
    name: str, distillation: Distillation, config: Config, parts: Parts
) -> Callable[[PyTree, PyTree, Batch], tuple[Array, PyTree]]:
    """(mean of a loss, gradient of weight x mean), compiled, of (params, teacher_params, batch)."""
    objective = distillation.objective
    alone = objective._replace(weights={name: objective.weights[name]})
    how = StudentPass(mesh=parts.meshes.student, teacher_mesh=parts.meshes.teacher)

    def loss(params: PyTree, teacher_params: PyTree, batch: Batch) -> tuple[Array, Array]:
        counts = terms.token_counts(terms.masks_of(alone, batch))
        total, means = loss_fn(params, teacher_params, batch, counts, distillation._replace(objective=alone), how)
        return total, means[name]

    def gradient(params: PyTree, teacher_params: PyTree, batch: Batch) -> tuple[Array, PyTree]:
        (_, mean), grads = jax.value_and_grad(loss, has_aux=True)(params, teacher_params, batch)
        frozen = optimizers.matching(grads, config.train.freeze)
        return mean, jax.tree.map(lambda g, is_frozen: jnp.zeros_like(g) if is_frozen else g, grads, frozen)

    return jax.jit(gradient)


@jax.jit
def _dot(a: PyTree, b: PyTree) -> Array:
    return jnp.stack(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b))).sum()
