"""Layers as a loop are the layers one by one, in value and gradient, in a program that does not grow with depth."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import grids
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_causal
import tiny_core
import tiny_run

from jaxdistill.models import scan
from jaxdistill.models.core import network
from jaxdistill.models.core.attention import Tokens
from jaxdistill.models.core.modules import How
from jaxdistill.models.core.rows import read_settings
from jaxdistill.models.families import FAMILIES
from jaxdistill.models.interceptors import Interceptor
from jaxdistill.models.layer_drop import keep_layers
from jaxdistill.models.positions import position_ids

WINDOWS = ("gemma3_text", "plain")  # and two ropes
# One form of every module of the core, and of every way in which layers differ from each other.
STAND_FOR_ALL = (
    *(("llama", "plain"), ("smollm3", "plain"), ("gemma2", "plain"), ("phi3", "plain"), WINDOWS),
    *(("modernbert", "biases"), ("bert", "plain"), ("distilbert", "plain"), ("gpt2", "plain")),
)


def outputs(kind: str, form: str, params: Any, around: Sequence[Interceptor], **how: Any) -> network.Pass:
    ids, mask = (jnp.asarray(x) for x in tiny_core.batch(12, "left"))
    places = position_ids(mask) if FAMILIES[kind].causal else jnp.tile(jnp.arange(12), (2, 1))
    tokens = network.real_tokens(mask, places)
    key = jax.random.key(3) if how.get("train") else None
    with contextlib.ExitStack() as stack:
        for interceptor in around:
            stack.enter_context(nn.intercept_methods(interceptor))
        return network.forward(tiny_core.settings(kind, form), params, ids, tokens, How("xla", **how), dropout_key=key)


def graded(kind: str, form: str, around: Sequence[Interceptor], **how: Any) -> Any:
    """Outputs, and the gradient of a number that every output counts in."""

    def number(params: Any) -> tuple[jax.Array, Any]:
        out = outputs(kind, form, params, around, **how)
        return jnp.asarray(sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(out))), out

    gradient, out = jax.jit(jax.grad(number, has_aux=True))(tiny_core.params(kind, form))
    return out, gradient


def assert_close(ours: Any, expected: Any) -> None:
    """Relative to the largest number: the gradient of a bias of keys is 0 up to rounding."""
    for one, other in zip(ours, expected, strict=True):  # outputs, gradient
        largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(other))
        jax.tree.map(lambda a, b, atol=1e-5 * largest: np.testing.assert_allclose(a, b, rtol=0, atol=atol), one, other)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "form"), grids.everyday(tiny_core.INSTALLED, *STAND_FOR_ALL))
def test_value_and_gradient(kind: str, form: str) -> None:
    """Of logits, all hidden states and all maps."""
    loop = scan.scan_layers(FAMILIES[kind])
    assert_close(graded(kind, form, [loop], maps=True), graded(kind, form, [], maps=True))


@pytest.mark.slow
@pytest.mark.parametrize("kept", [[True, False, True], [False, False, False]], ids=["some", "none"])
def test_layer_drop(kept: list[bool]) -> None:
    family, kept_layers = FAMILIES[WINDOWS[0]], jnp.asarray(kept)
    loop = graded(*WINDOWS, [scan.scan_layers(family, kept=kept_layers)])
    assert_close(loop, graded(*WINDOWS, [keep_layers(family, kept_layers)]))
    layers = loop[1]["model"]["layers"]
    assert [bool(np.any(layers[str(i)]["mlp"]["up_proj"]["kernel"])) for i in range(3)] == kept


@pytest.mark.parametrize("kind", ["gemma3_text", "modernbert"])
def test_the_program_does_not_grow_with_depth(kind: str) -> None:
    def products(layers: int) -> int:
        types = {"layer_types": ["sliding_attention", "full_attention"] * (layers // 2)} if kind != "modernbert" else {}
        settings = read_settings(tiny_core.config(kind, "plain", num_hidden_layers=layers, **types))
        shapes, ids = network.param_shapes(settings), jnp.zeros((1, 8), jnp.int32)

        def number(params: Any) -> jax.Array:
            with nn.intercept_methods(scan.scan_layers(FAMILIES[kind])):
                return network.forward(settings, params, ids, Tokens(ids, ids), How("own")).logits.sum()

        return str(jax.make_jaxpr(jax.grad(number))(shapes)).count("dot_general")

    assert products(4) == products(12)


@pytest.mark.weekly  # logits, gradients and the work of layers in a loop are compared above and in test_plan
def test_a_run_is_that_of_the_layers_one_by_one(tmp_path: Path) -> None:
    """With LayerDrop, micro-batches, parameters that are split, and losses of hidden states and maps."""
    tiny = tiny_causal.make(tmp_path, kind="gemma2", head_dim=8, num_key_value_heads=1, sliding_window=6)
    values = {
        "train__steps": 4,
        "train__accumulation": 2,
        "mesh__fsdp": 2,
        "student__layer_drop": 0.3,
        "loss__alpha_hidden_mse": 1.0,
        "loss__alpha_attention": 1.0,
    }
    for scanned in (True, False):
        tiny_run.train(tiny, tmp_path / str(scanned), **values, student__scan=scanned, teacher__scan=scanned)
    for kind, figure in (("train", "loss"), ("train", "grad_norm"), ("eval", "clm_loss")):
        loop, plain = ([r[figure] for r in tiny_run.records(tmp_path / name, kind)] for name in ("True", "False"))
        assert len(loop) > 1 and loop == pytest.approx(plain, rel=1e-4)
