"""The optimizer: an optax chain with warm-up, clipping, weight decay by pattern and frozen parameters."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Annotated

import jax
import optax
import pydantic
from jaxtyping import PyTree

from jaxdistill.errors import UserError
from jaxdistill.knobs import OneOf, Rule, Section, knob


def _then_decayed(
    optimizer: optax.GradientTransformation, rate: optax.Schedule, settings: "OptimConfig", decayed: Callable
) -> optax.GradientTransformation:
    """The optimizer, and after it decoupled weight decay, as adamw and lion have it (Loshchilov & Hutter 2019).

    optax's adafactor decays after the learning rate is applied, so by weight_decay alone; and decay that is added to
    the gradient goes through sgd's momentum, which multiplies it by 1 / (1 - momentum).
    """
    if not settings.weight_decay:
        return optimizer
    return optax.chain(optimizer, optax.add_decayed_weights(lambda step: -settings.weight_decay * rate(step), decayed))


# name -> (learning rate, settings, the leaves of a tree that have weight decay) -> optimizer. Each takes
# learning rate x weight_decay x parameter from a parameter in a step, besides the optimizer's own update.
OPTIMIZERS: dict[str, Callable[[optax.Schedule, "OptimConfig", Callable], optax.GradientTransformation]] = {
    "adamw": lambda rate, s, decayed: optax.adamw(rate, *s.betas, s.eps, weight_decay=s.weight_decay, mask=decayed),
    "lion": lambda rate, s, decayed: optax.lion(rate, *s.betas, weight_decay=s.weight_decay, mask=decayed),
    "adafactor": lambda rate, s, decayed: _then_decayed(optax.adafactor(rate), rate, s, decayed),
    # The first part does nothing. Checkpoints of sgd without weight decay have its place, from when it did the decay.
    "sgd": lambda rate, s, decayed: _then_decayed(
        optax.chain(optax.add_decayed_weights(0.0, decayed), optax.sgd(rate, s.betas[0])), rate, s, decayed
    ),
}
# name -> (peak, steps) -> the learning rate after the warm-up
SCHEDULES: dict[str, Callable[[float, int], optax.Schedule]] = {
    "linear": lambda peak, steps: optax.linear_schedule(peak, 0.0, steps),
    "cosine": optax.cosine_decay_schedule,
    "constant": lambda peak, steps: optax.constant_schedule(peak),
}


def _patterns(values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"holds {value!r}, which is no regular expression ({error})") from None
    return values


def _are_betas(values: tuple[float, float]) -> bool:
    return all(0 <= value < 1 for value in values)


Patterns = Annotated[tuple[str, ...], pydantic.AfterValidator(_patterns)]


class OptimConfig(Section):
    """The optimizer."""

    name: Annotated[str, OneOf(OPTIMIZERS)] = knob("adamw", "Optimizer.")
    learning_rate: float = knob(5e-4, "Learning rate at the end of the warm-up, which is its peak.", gt=0)
    schedule: Annotated[str, OneOf(SCHEDULES)] = knob(
        "linear", "Learning rate after the warm-up: `linear` or `cosine` to 0, or `constant`."
    )
    warmup: float = knob(0.05, "Share of all steps in which the learning rate rises from 0.", ge=0, le=1)
    betas: Annotated[tuple[float, float], Rule("must be two numbers in [0, 1)", _are_betas)] = knob(
        (0.9, 0.98), "Decay rates of adamw's and lion's moments; the first one is the momentum of sgd."
    )
    eps: float = knob(1e-6, "Term added to the denominator of adamw.", gt=0)
    weight_decay: float = knob(
        0.0,
        "Weight decay: a step takes learning rate x weight decay x parameter from all parameters but no_decay's.",
        ge=0,
    )
    no_decay: Patterns = knob(
        ("bias$", "(?i)(norm|ln_[a-z0-9]+)/(scale|weight)$"),
        "Regular expressions: parameters whose path, such as student/bert/pooler/bias, contains a match have no weight "
        "decay.",
    )
    clip: float = knob(5.0, "Largest global norm of the gradient; 0 = no clipping.", ge=0)


def make_schedule(settings: OptimConfig, *, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 over ceil(warmup * steps), then as settings.schedule says, reaching its end at `steps`."""
    rise, peak = math.ceil(settings.warmup * steps), settings.learning_rate
    tail = SCHEDULES[settings.schedule](peak, max(steps - rise, 1))
    return optax.join_schedules([optax.linear_schedule(0.0, peak, rise), tail], [rise])


def path_name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def matching(tree: PyTree, patterns: Sequence[str]) -> PyTree:
    """True at every leaf whose path contains one of the regular expressions."""
    return jax.tree_util.tree_map_with_path(lambda path, _: any(re.search(p, path_name(path)) for p in patterns), tree)


def check_patterns(params: PyTree, settings: OptimConfig, *, freeze: Sequence[str]) -> None:
    """Checks the patterns of no_decay and freeze: one that matches nothing is a typing error.

    The default patterns of no_decay need not match, as there are models without biases.

    Args:
      params: the tree that `make_optimizer` gets: {"student": ..., "projections": ...}.

    Raises:
      UserError: names the pattern and some of the paths that exist; or all of the student is frozen.
    """
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    own = [pattern for pattern in settings.no_decay if pattern not in OptimConfig().no_decay]
    for key, patterns in (("config.optim.no_decay", own), ("config.train.freeze", freeze)):
        for pattern in patterns:
            if not any(re.search(pattern, path) for path in paths):
                raise UserError(
                    f"{key} holds {pattern!r}, which no parameter's path contains; "
                    f"such paths are {paths[-1]}, {paths[0]}"
                )
    if freeze and all(jax.tree.leaves(matching({"student": params["student"]}, freeze))):
        raise UserError(
            f"config.train.freeze={tuple(freeze)!r} matches every parameter of the student, so nothing would be "
            "trained; remove a pattern"
        )


def make_optimizer(
    params: PyTree, settings: OptimConfig, *, steps: int, freeze: Sequence[str]
) -> optax.GradientTransformation:
    """Clips by global norm, then updates; frozen parameters take part in neither and have no optimizer state."""
    decayed = lambda tree: jax.tree.map(lambda x: not x, matching(tree, settings.no_decay))  # noqa: E731
    update = OPTIMIZERS[settings.name](make_schedule(settings, steps=steps), settings, decayed)
    clip = optax.clip_by_global_norm(settings.clip) if settings.clip else optax.identity()
    train = optax.chain(clip, update)
    if not freeze:
        return train
    labels = jax.tree.map(lambda frozen: "freeze" if frozen else "train", matching(params, freeze))
    return optax.partition({"train": train, "freeze": optax.set_to_zero()}, labels)
