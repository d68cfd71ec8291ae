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


@pytest.mark.parametrize("model_type", tiny.INSTALLED)
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


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_decay_takes_learning_rate_times_decay_times_parameter_at_every_step(name: str) -> None:
    """With gradients of 0 a parameter is the product of 1 - learning rate x decay over the steps, momentum or not."""
    schedule = {"learning_rate": 0.1, "schedule": "linear", "warmup": 0.25}
    optimizer = make(name, weight_decay=0.5, betas=(0.9, 0.98), **schedule)
    rate: Any = optim.make_schedule(OptimConfig(**schedule), steps=STEPS)
    nothing, left = jax.tree.map(jnp.zeros_like, PARAMS), 2.0
    params: Any = PARAMS
    state, step = optimizer.init(params), jax.jit(optimizer.update)
    for at in range(STEPS):
        updates, state = step(nothing, state, params)
        params = optax.apply_updates(params, updates)
        left *= 1 - float(rate(at)) * 0.5
        np.testing.assert_allclose(params["a"]["kernel"], left, rtol=2e-6)
    assert left < 1.0
    np.testing.assert_array_equal(params["a"]["bias"], 2)
    np.testing.assert_array_equal(params["LayerNorm"]["scale"], 2)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_decay_is_apart_from_the_gradient(name: str) -> None:
    """Decay adds the same to an update, whatever the gradient is and however the optimizer scales it."""
    grads = jax.tree.map(lambda x: 3 * x, PARAMS)
    with_decay, without = (paths(update(make(name, weight_decay=decay), grads)[0]) for decay in (0.5, 0.0))
    np.testing.assert_allclose(with_decay["a/kernel"] - without["a/kernel"], -0.1 * 0.5 * 2.0, rtol=1e-5)
    np.testing.assert_array_equal(with_decay["a/bias"], without["a/bias"])


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_frozen_parameters_do_not_decay(name: str) -> None:
    updates = paths(update(make(name, weight_decay=0.5, freeze=("kernel",)), PARAMS)[0])
    np.testing.assert_array_equal(updates["a/kernel"], 0)


def test_states_without_decay_are_those_of_earlier_checkpoints() -> None:
    """A checkpoint is read by the structure of the state, so runs of version 0.1.0 need the structure of then."""
    spared = lambda tree: jax.tree.map(lambda x: not x, optim.matching(tree, DEFAULTS.no_decay))  # noqa: E731
    rate = optim.make_schedule(OptimConfig(), steps=STEPS)
    earlier = {
        "adamw": optax.adamw(rate, 0.9, 0.98, 1e-6, weight_decay=0.0, mask=spared),
        "lion": optax.lion(rate, 0.9, 0.98, weight_decay=0.0, mask=spared),
        "adafactor": optax.adafactor(rate, weight_decay_rate=None, weight_decay_mask=spared),
        "sgd": optax.chain(optax.add_decayed_weights(0.0, spared), optax.sgd(rate, 0.9)),
    }
    assert earlier.keys() == optim.OPTIMIZERS.keys()
    for name, optimizer in earlier.items():
        before = optax.chain(optax.clip_by_global_norm(5.0), optimizer).init(PARAMS)
        now = optim.make_optimizer(PARAMS, OptimConfig(name=name), steps=STEPS, freeze=()).init(PARAMS)
        assert jax.tree.structure(now) == jax.tree.structure(before), name


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


TRAINED = {"student": PARAMS, "projections": {"1>2": {"kernel": jnp.zeros((3, 4))}}}


def refused(freeze: tuple[str, ...] = (), **settings: Any) -> str:
    with pytest.raises(UserError) as error:
        optim.check_patterns(TRAINED, OptimConfig(**settings), freeze=freeze)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("pattern", ["layernorm", "^a/", "^LayerNorm", "bias/$", "^kernel$"])
def test_a_pattern_that_matches_nothing_is_named(pattern: str) -> None:
    for key, message in (
        ("config.train.freeze", refused(("bias$", pattern))),
        ("config.optim.no_decay", refused(no_decay=("bias$", pattern))),
    ):
        assert message.startswith(f"{key} holds {pattern!r}") and "student/a/kernel" in message


@pytest.mark.parametrize("pattern", ["bias$", "LayerNorm", "^student/a/", "^projections/", "student/a/kernel"])
def test_patterns_match_the_paths_that_the_message_shows(pattern: str) -> None:
    optim.check_patterns(TRAINED, OptimConfig(no_decay=(pattern,)), freeze=(pattern,))
    marked = paths(optim.matching(TRAINED, (pattern,)))
    assert any(marked.values()) and not all(marked.values())


@pytest.mark.parametrize("patterns", [("",), (".",), ("^student/",), ("^student/a/", "LayerNorm")])
def test_freezing_the_whole_student_is_refused(patterns: tuple[str, ...]) -> None:
    assert "matches every parameter of the student" in refused(patterns)


def test_the_default_patterns_need_not_match() -> None:
    """Llama has no biases."""
    optim.check_patterns({"student": shapes_of("llama"), "projections": {}}, DEFAULTS, freeze=())
