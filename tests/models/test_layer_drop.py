"""LayerDrop by interception: what is kept is untouched, what is dropped is not there, and how layers are drawn."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxdistill.models import intercept, layer_drop
from jaxdistill.models.inputs import Asked, Inputs
from jaxdistill.models.model import build_model
from jaxdistill.models.settings import StudentConfig
from jaxdistill.models.student import cut_student, student_config

# Those that distil today; ALBERT runs each set of parameters several times.
KINDS = ("bert", "roberta", "xlm-roberta", "distilbert", "electra", "albert")
EVERY_OTHER = {kind: (0,) for kind in KINDS} | {"albert": (0, 2)}


@functools.cache
def graded(kind: str, plain: bool) -> Any:
    """Jitted (params, kept, dropout key) -> ((a number, outputs), gradient of the number); `plain`: no interceptor."""
    model = tiny.model(kind)
    ids, mask = tiny.batch(kind)

    def f(params: Any, kept: Any, key: Any) -> Any:
        dropped = () if plain else (layer_drop.keep_layers(model.family, kept),)
        outputs = intercept.apply(
            model,
            params,
            Inputs(jnp.asarray(ids), jnp.asarray(mask), dropout_key=key),
            asked=Asked(hidden_states=True, attentions=True),
            interceptors=dropped,
        )
        return jnp.sum(jnp.sin(outputs.logits)), outputs

    return jax.jit(jax.value_and_grad(f, has_aux=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_all_kept_is_the_plain_model(kind: str) -> None:
    """Dropout included: an interceptor that traced a layer twice would draw other numbers."""
    key = jax.random.key(3)
    kept = np.ones(tiny.model(kind).num_layers, bool)
    (_, plain), plain_gradient = graded(kind, True)(tiny.params(kind), kept, key)
    (_, outputs), gradient = graded(kind, False)(tiny.params(kind), kept, key)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), outputs, plain)
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(plain_gradient))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest), gradient, plain_gradient)


@pytest.mark.parametrize("kind", tiny.families(KINDS))
def test_a_sub_network_is_the_student_that_is_cut_out(kind: str) -> None:
    teacher, params, layers = tiny.model(kind), tiny.params(kind), EVERY_OTHER[kind]
    student = build_model(student_config(teacher.config, family=kind, layers=layers))
    cut = cut_student(params, teacher=teacher, student=student, layers=layers)
    ids, mask = tiny.batch(kind)
    inputs = Inputs(jnp.asarray(ids), jnp.asarray(mask))
    run = functools.partial(intercept.apply, student, asked=Asked(hidden_states=True))
    wanted = jax.jit(run, compiler_options=tiny.QUICK)(cut, inputs)
    kept = layer_drop.kept_mask(layers, of=teacher.num_layers)
    (_, outputs), _ = graded(kind, False)(params, kept, None)
    np.testing.assert_allclose(outputs.logits[mask], wanted.logits[mask], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(outputs.hidden_states[-1][mask], wanted.hidden_states[-1][mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", tiny.families(["bert", "distilbert"]))
def test_a_dropped_layer_is_the_identity_and_gets_no_gradient(kind: str) -> None:
    kept = np.array([False, True])
    (_, outputs), gradient = graded(kind, False)(tiny.params(kind), kept, None)
    np.testing.assert_array_equal(outputs.hidden_states[1], outputs.hidden_states[0])
    assert not np.array_equal(outputs.hidden_states[2], outputs.hidden_states[1])
    assert not np.any(outputs.attentions[0]) and np.any(outputs.attentions[1])
    dropped, run = (layer_of(gradient, kind, i) for i in (0, 1))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(dropped))
    # A key's bias shifts every score of a row alike, so its gradient is but rounding; the others are real.
    assert sum(bool(np.any(leaf)) for leaf in jax.tree.leaves(run)) >= len(jax.tree.leaves(run)) - 1


def layer_of(params: Any, kind: str, index: int) -> Any:
    for name in tiny.model(kind).family.layers.format(index).split("/"):
        params = params[name]
    return params


def test_with_no_layer_at_all_the_embeddings_meet_the_head() -> None:
    (_, outputs), _ = graded("bert", False)(tiny.params("bert"), np.zeros(2, bool), None)
    np.testing.assert_array_equal(outputs.hidden_states[-1], outputs.hidden_states[0])
    assert np.all(np.isfinite(outputs.logits))


def test_a_dropped_layer_is_branched_over_and_not_computed() -> None:
    """One conditional a layer is left in the compiled program: neither became a select of two results."""
    kind = "bert"
    compiled = graded(kind, False).lower(tiny.params(kind), np.ones(2, bool), None).compile()
    branches = [line for line in compiled.as_text().splitlines() if " conditional(" in line]
    assert len(branches) >= 2 * tiny.model(kind).num_layers  # forward and backward
    inside = {name for line in branches for name in line.split("branch_computations={")[-1].split("}")[0].split(", ")}
    assert len(inside) == 2 * len(branches)


def test_rates() -> None:
    def make(**schedule: str) -> layer_drop.DropRates:
        rates = layer_drop.drop_rates(StudentConfig(layer_drop=0.4, **schedule), layers=4, steps=11)
        assert rates is not None
        return rates

    constant = make(layer_drop_depth="constant", layer_drop_schedule="constant")
    np.testing.assert_allclose(constant(jnp.int32(0)), [0.4] * 4, rtol=1e-6)
    np.testing.assert_allclose(constant(jnp.int32(10)), [0.4] * 4, rtol=1e-6)
    linear = make(layer_drop_depth="linear", layer_drop_schedule="constant")
    np.testing.assert_allclose(linear(jnp.int32(3)), [0.1, 0.2, 0.3, 0.4], rtol=1e-6)
    growing = make(layer_drop_depth="constant", layer_drop_schedule="linear")
    for step, rate in ((0, 0.0), (5, 0.2), (10, 0.4)):
        np.testing.assert_allclose(growing(jnp.int32(step)), [rate] * 4, rtol=1e-6)
    both = make(layer_drop_depth="linear", layer_drop_schedule="linear")
    np.testing.assert_allclose(both(jnp.int32(5)), [0.05, 0.1, 0.15, 0.2], rtol=1e-6)


def test_rate_zero_leaves_the_plain_model() -> None:
    """No branches and no draws: the step is compiled as if there were no LayerDrop."""
    layers = tiny.model("bert").num_layers
    assert layer_drop.drop_rates(StudentConfig(), layers=layers, steps=10) is None
    rates = layer_drop.drop_rates(StudentConfig(layer_drop=0.5), layers=layers, steps=10)
    assert rates is not None
    np.testing.assert_allclose(rates(jnp.int32(3)), [0.5, 0.5])


def test_the_depth_drawn_is_the_one_expected() -> None:
    """Each layer by itself within five standard deviations, and no two of them linked."""
    draws, rates = 20_000, np.array([0.0, 0.1, 0.2, 0.5], np.float32)
    keys = jax.random.split(jax.random.key(0), draws)
    kept = np.asarray(jax.vmap(lambda key: layer_drop.draw_kept(key, jnp.asarray(rates)))(keys), float)
    error = 5 * np.sqrt(rates * (1 - rates) / draws)
    assert np.all(np.abs(kept.mean(axis=0) - (1 - rates)) <= error)
    assert kept[:, 0].all()  # rate 0 never drops
    linked = np.corrcoef(kept[:, 1:], rowvar=False)[np.triu_indices(3, 1)]
    assert np.all(np.abs(linked) < 5 / np.sqrt(draws))
