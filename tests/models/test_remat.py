"""Rematerialisation changes what is kept for the backward pass, and nothing else."""

import functools
from typing import Any

import grids
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.ad_checkpoint import print_saved_residuals

from jaxdistill.models import intercept, layer_drop, remat
from jaxdistill.models.inputs import Asked, Inputs

KINDS = ("bert", "distilbert", "albert", "gpt2", "llama")  # every way of calling a layer


def value(kind: str, policy: str, *, attentions: bool = False) -> Any:
    """(params, kept layers, dropout key) -> a number that all outputs enter."""
    model = tiny.model(kind)
    ids, mask = tiny.batch(kind)

    def f(params: Any, kept: Any, key: Any) -> jax.Array:
        around = [] if kept is None else [layer_drop.keep_layers(model.family, kept)]
        around += [remat.rematerialise(model.family, policy)] if policy else []
        outputs = intercept.apply(
            model,
            params,
            Inputs(jnp.asarray(ids), jnp.asarray(mask), dropout_key=key),
            asked=Asked(hidden_states=True, attentions=attentions),
            interceptors=around,
        )
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(outputs))

    return f


@functools.cache
def graded(kind: str, policy: str) -> Any:
    return jax.jit(jax.value_and_grad(value(kind, policy, attentions=True)), compiler_options=tiny.QUICK)


def assert_same(ours: Any, plain: Any) -> None:
    np.testing.assert_allclose(ours[0], plain[0], rtol=1e-5)
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(plain[1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest), ours[1], plain[1])


@pytest.mark.parametrize(("kind", "policy"), grids.covering(KINDS, remat.POLICIES))
@pytest.mark.slow
def test_value_and_gradient_are_those_of_the_plain_model(kind: str, policy: str) -> None:
    """Dropout included: what is computed again draws the numbers that were drawn first."""
    arguments = tiny.params(kind), None, jax.random.key(3)
    assert_same(graded(kind, policy)(*arguments), graded(kind, "")(*arguments))


@pytest.mark.slow
@pytest.mark.parametrize("policy", remat.POLICIES)
def test_with_layer_drop(policy: str) -> None:
    kept = np.array([True, False])
    arguments = tiny.params("bert"), kept, jax.random.key(3)
    assert_same(graded("bert", policy)(*arguments), graded("bert", "")(*arguments))


def kept_for_the_backward_pass(kind: str, policy: str, capsys: pytest.CaptureFixture) -> list[str]:
    print_saved_residuals(value(kind, policy), tiny.params(kind), None, None)
    lines = capsys.readouterr().out.splitlines()
    return [line.split(" ")[0] for line in lines if "from the argument" not in line]


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_what_is_kept(kind: str, capsys: pytest.CaptureFixture) -> None:
    rows, length = tiny.batch(kind)[0].shape
    config = tiny.model(kind).config
    maps = f"f32[{rows},{config.num_attention_heads},{length},{length}]"
    inner = f"f32[{rows},{length},{getattr(config, 'n_inner', None) or config.intermediate_size}]"
    plain, dots, full = (kept_for_the_backward_pass(kind, policy, capsys) for policy in ("", "dots", "full"))
    assert maps in plain and maps not in dots and maps not in full
    assert inner in plain and inner in dots and inner not in full
    assert len(full) < len(dots) < len(plain)
