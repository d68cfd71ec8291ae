"""The optimizer: one optax chain by name, with warm-up, clipping, decay by pattern and frozen parameters."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from jaxdistill.errors import UserError


def make_schedule(*, learning_rate: float, schedule: str, warmup: float, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 over ceil(warmup * steps), then linear or cosine to 0 at `steps`, or constant."""
    rise = math.ceil(warmup * steps)
    tails = {
        "linear": lambda: optax.linear_schedule(learning_rate, 0.0, max(steps - rise, 1)),
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, max(steps - rise, 1)),
        "constant": lambda: optax.constant_schedule(learning_rate),
    }
    return optax.join_schedules([optax.linear_schedule(0.0, learning_rate, rise), tails[schedule]()], [rise])


def path_name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def matching(tree: Any, patterns: Sequence[str]) -> Any:
    """True at every leaf whose path contains one of the regular expressions."""
    return jax.tree_util.tree_map_with_path(lambda path, _: any(re.search(p, path_name(path)) for p in patterns), tree)


def check_patterns(params: Any, patterns: Sequence[str], *, key: str) -> None:
    """A pattern that matches nothing is a typing error in the making.

    Raises:
      UserError: names the pattern and some of the paths there are.
    """
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in paths):
            raise UserError(
                f"{key} holds {pattern!r}, which no parameter's path contains; such paths are {paths[0]}, {paths[-1]}"
            )


def make_optimizer(
    params: Any,
    *,
    name: str,
    learning_rate: optax.Schedule,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    no_decay: Sequence[str],
    clip: float,
    freeze: Sequence[str],
) -> optax.GradientTransformation:
    """Clip by global norm, then the update; frozen parameters have no part in either, nor any optimizer state."""
    decayed = lambda tree: jax.tree.map(lambda x: not x, matching(tree, no_decay))  # noqa: E731
    b1, b2 = betas
    optimizers: dict[str, Callable[[], optax.GradientTransformation]] = {
        "adamw": lambda: optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=decayed),
        "lion": lambda: optax.lion(learning_rate, b1, b2, weight_decay=weight_decay, mask=decayed),
        "adafactor": lambda: optax.adafactor(
            learning_rate, weight_decay_rate=weight_decay or None, weight_decay_mask=decayed
        ),
        "sgd": lambda: optax.chain(optax.add_decayed_weights(weight_decay, decayed), optax.sgd(learning_rate, b1)),
    }
    train = optax.chain(optax.clip_by_global_norm(clip) if clip else optax.identity(), optimizers[name]())
    if not freeze:
        return train
    labels = jax.tree.map(lambda frozen: "freeze" if frozen else "train", matching(params, freeze))
    return optax.partition({"train": train, "freeze": optax.set_to_zero()}, labels)
