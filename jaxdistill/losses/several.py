"""What a loss on logits compares with, where there are several teachers: the mean of its values, or one mixture.

With the forward KL both have the same gradient, as sum_i w_i (q - p_i) = q - sum_i w_i p_i. Their values differ by what
the teachers differ among themselves, which the student cannot change. With every other divergence the gradients differ.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdistill.losses import partial
from jaxdistill.losses.divergences import LogitLoss, Scalar, log_softmax
from jaxdistill.losses.partial import Partial
from jaxdistill.models.head import Head
from jaxdistill.models.pair import Mix


@functools.partial(jax.tree_util.register_dataclass, data_fields=("targets",), meta_fields=("mix",))
@dataclass(frozen=True)
class Several:
    """The answers of several teachers on the same tokens, in the place of those of one."""

    targets: tuple[Any, ...]  # of each teacher its logits, its head, or what a cache holds of its distributions
    mix: Mix


# What losses on logits compare with, before the logits are made.
Target: TypeAlias = Head | Partial | Several | None


def each(function: Callable[..., Any], target: Any, *rest: Any) -> Any:
    """The target with a function of each teacher's part, and of the parts of `rest` that stand in the same place."""
    return jax.tree.map(function, target, *rest, is_leaf=lambda x: isinstance(x, Head | Partial))


def resolved(loss: LogitLoss, target: Any, *, words: int, temperature: Scalar) -> tuple[LogitLoss, Any]:
    """The loss against one target that stands for what is given: as partial.resolved, also for several teachers."""
    if not isinstance(target, Several):
        return partial.resolved(loss, target, words=words)
    parts = [partial.resolved(loss, one, words=words) for one in target.targets]
    if target.mix.combine == "probabilities":
        return loss, mixture([logits for _, logits in parts], target.mix.shares, temperature=temperature)

    def mean(functions: Sequence[Callable[..., Array]]) -> Callable[..., Array]:
        def of_teachers(student: Array, targets: Sequence[Any], temperature: Scalar, beta: float) -> Array:
            each = zip(target.mix.shares, functions, targets, strict=True)
            first, *others = [share * f(student, one, temperature, beta) for share, f, one in each]
            return sum(others, first)

        return of_teachers

    value, slope = mean([one.value for one, _ in parts]), mean([one.slope for one, _ in parts])
    return loss._replace(value=value, slope=slope), [answers for _, answers in parts]


def mixture(
    logits: Sequence[Float[Array, "*tokens vocab"]], shares: Sequence[float], *, temperature: Scalar
) -> Float[Array, "*tokens vocab"]:
    """Logits whose softmax at T is sum_i w_i p_i, with p_i = softmax(logits_i / T): T log sum_i w_i p_i.

    -inf where all teachers rule a word out.
    """
    logs = [math.log(share) + log_softmax(one, temperature) for share, one in zip(shares, logits, strict=True)]
    return temperature * functools.reduce(jnp.logaddexp, logs)
