"""Schedules in closed form, which parameters decay and stay frozen in every family, and clipping."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxdistill.errors import UserError
from jaxdistill.models.families import FAMILIES
from jaxdistill.models.model import param_shapes
from jaxdistill.step import optimizer as optim
from jaxdistill.step.optimizer import OptimConfig

DEFAULTS = OptimConfig()
PEAK, STEPS = 3e-4, 40


def schedule_of(name: str, warmup: float) -> Any:
    return optim.make_schedule(OptimConfig(learning_rate=PEAK, schedule=name, warmup=warmup), steps=STEPS)


@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.33, 1.0])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_schedule_in_closed_form(schedule: str, warmup: float) -> None:
    rate = schedule_of(schedule, warmup)
    rise = math.ceil(warmup * STEPS)
    for step in range(STEPS + 3):
        if step < rise:
            wanted = PEAK * step / rise
        else:
            done = min((step - rise) / max(STEPS - rise, 1), 1)
            tail = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}
            wanted = PEAK * tail[schedule]
        # optax computes in float32.
        assert float(rate(step)) == pytest.approx(wanted, rel=1e-5, abs=1e-6 * PEAK), step


def test_schedule_ends() -> None:
    rate = schedule_of("linear", 0.05)
    assert float(rate(0)) == 0 and float(rate(2)) == pytest.approx(PEAK) and float(rate(STEPS)) == 0
    without = schedule_of("linear", 0.0)
    assert float(without(0)) == pytest.approx(PEAK)


def shapes_of(model_type: str) -> dict[str, Any]:
    return param_shapes(tiny.model(model_type))


def paths(tree: Any) -> dict[str, Any]:
    return {optim.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_weight_decay_touches_matrices_alone(model_type: str) -> None:
    """Biases and layer norms are the vectors. The names in the reference scripts miss DistilBERT's layer norms."""
    params = {
        "student": shapes_of(model_type),
        "projections": {"1>2": {"kernel": jax.ShapeDtypeStruct((3, 4), jnp.float32)}},
    }
    spared = paths(optim.matching(params, DEFAULTS.no_decay))
    assert spared == {path: leaf.ndim == 1 for path, leaf in paths(params).items()}
    assert not spared["projections/1>2/kernel"]


@pytest.mark.parametrize(
    ("model_type", "path"),
    [
        ("bert", "bert/encoder/layer/1/attention/output/LayerNorm/scale"),
        ("bert", "cls/predictions/bias"),
        ("roberta", "lm_head/layer_norm/scale"),
        ("distilbert", "distilbert/transformer/layer/0/sa_layer_norm/scale"),
        ("distilbert", "distilbert/transformer/layer/0/output_layer_norm/scale"),
        ("distilbert", "vocab_layer_norm/scale"),
        ("distilbert", "vocab_projector/bias"),
        ("gpt2", "transformer/ln_f/scale"),
        ("llama", "model/norm/weight"),
    ],
)
def test_names_that_must_not_decay(model_type: str, path: str) -> None:
    assert paths(optim.matching(shapes_of(model_type), DEFAULTS.no_decay))[path]


PARAMS = {
    "a": {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full((3,), 2.0)},
    "LayerNorm": {"scale": jnp.full((3,), 2.0)},
}


def make(name: str = "adamw", *, freeze: tuple[str, ...] = (), **changes: Any) -> optax.GradientTransformation:
    """An optimizer whose learning rate is 0.1 at every step."""
    plain = {"learning_rate": 0.1, "schedule": "constant", "warmup": 0.0, "clip": 0.0}
    return optim.make_optimizer(PARAMS, OptimConfig(name=name, **plain | changes), steps=STEPS, freeze=freeze)


def update(optimizer: optax.GradientTransformation, grads: Any) -> tuple[Any, Any]:
    updates, state = jax.jit(optimizer.update)(grads, jax.jit(optimizer.init)(PARAMS), PARAMS)
    return updates, state


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_decay_is_learning_rate_times_decay_times_weight(name: str) -> None:
    nothing = jax.tree.map(jnp.zeros_like, PARAMS)
    updates = paths(update(make(name, weight_decay=0.5), nothing)[0])
    np.testing.assert_allclose(updates["a/kernel"], -0.1 * 0.5 * 2.0, rtol=1e-6)
    np.testing.assert_array_equal(updates["a/bias"], 0)
    np.testing.assert_array_equal(updates["LayerNorm/scale"], 0)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "sgd"])
def test_every_optimizer_goes_downhill(name: str) -> None:
    updates = update(make(name), PARAMS)[0]  # the gradient of |params|^2 / 2
    assert all(np.all(np.asarray(leaf) < 0) for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize("size", [0.1, 100.0])
def test_clipping_by_the_global_norm(size: float) -> None:
    """The update of plain gradient descent is the clipped gradient."""
    grads = jax.tree.map(lambda x: size * x, PARAMS)
    norm = size * 2.0 * math.sqrt(12)
    updates = update(make("sgd", betas=(0.0, 0.0), clip=5.0), grads)[0]
    for path, leaf in paths(updates).items():
        np.testing.assert_allclose(leaf, -0.1 * min(1, 5.0 / norm) * paths(grads)[path], rtol=1e-5)


def test_frozen_parameters_have_no_update_no_state_and_no_part_in_clipping() -> None:
    grads = jax.tree.map(lambda x: 100 * x, PARAMS)
    updates, state = update(make("sgd", betas=(0.5, 0.0), clip=5.0, freeze=("^a/",)), grads)
    np.testing.assert_array_equal(updates["a"]["kernel"], 0)
    np.testing.assert_array_equal(updates["a"]["bias"], 0)
    # 5 is the norm over the trained parameters, not over all.
    np.testing.assert_allclose(np.linalg.norm(updates["LayerNorm"]["scale"]), 0.1 * 5.0, rtol=1e-5)
    assert [x.shape for x in jax.tree.leaves(state) if x.ndim] == [(3,)]  # momentum of the trained parameter


def test_the_optimizer_of_the_reference_has_two_moments_a_parameter() -> None:
    state = jax.eval_shape(make("adamw", freeze=("LayerNorm",)).init, PARAMS)
    assert sorted(x.shape for x in jax.tree.leaves(state) if x.ndim) == [(2, 3), (2, 3), (3,), (3,)]


def test_a_pattern_that_matches_nothing_is_named() -> None:
    optim.check_patterns(PARAMS, ("bias$", "LayerNorm"), key="config.train.freeze")
    with pytest.raises(UserError, match=r"config\.train\.freeze.*'layernorm'.*a/kernel") as error:
        optim.check_patterns(PARAMS, ("bias$", "layernorm"), key="config.train.freeze")
    assert "\n" not in str(error.value)
