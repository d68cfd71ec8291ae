"""Queries, keys and values of a layer, as PyTorch's modules make them, under everything that runs layers otherwise."""

import functools
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_core
import torch

from jaxdistill.models import torch_names
from jaxdistill.models.families import FAMILIES
from jaxdistill.models.inputs import Asked, Inputs
from jaxdistill.models.intercept import apply
from jaxdistill.models.model import build_model
from jaxdistill.models.scan import layer_interceptors

# One submodule for all three, or one for each, in torch and in transformers' Flax classes alike.
JOINED = ("c_attn", "qkv_proj", "Wqkv")
EACH = (("query", "q_proj", "q_lin"), ("key", "k_proj", "k_lin"), ("value", "v_proj", "v_lin"))
NORMS = ("q_norm", "k_norm", "")


def torch_projected(model, theirs, inputs, layer):
    """Queries, keys and values [batch, length, width] of a layer, before rotation, by hooks."""
    made = defaultdict(list)
    for path, module in theirs.named_modules():
        name = path.rpartition(".")[2]
        if name in JOINED or any(name in names for names in EACH) or name in NORMS[:2]:
            module.register_forward_hook(lambda m, args, out, name=name: made[name].append(out))
    with torch.no_grad():
        theirs(**inputs)

    def of_layer(name):
        calls = made[name]
        each = len(calls) // model.num_layers
        return calls[(layer + 1) * each - 1]

    if joined := [name for name in JOINED if name in made]:
        out = of_layer(joined[0])
        heads = model.config.num_attention_heads
        shared = getattr(model.config, "num_key_value_heads", None) or heads
        size = out.shape[-1] // (heads + 2 * shared)
        return out.split([heads * size, shared * size, shared * size], dim=-1)
    found = []
    for names, norm in zip(EACH, NORMS, strict=True):
        name = norm if norm in made else next(name for name in names if name in made)
        found.append(of_layer(name))
    return found


def check(model, params, theirs, kind, layer):
    ids, mask = tiny.batch(kind)
    inputs = {"input_ids": torch.tensor(ids).long(), "attention_mask": torch.tensor(mask).long()}
    if FAMILIES[kind].causal:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    expected = torch_projected(model, theirs, inputs, layer)
    run = functools.partial(apply, model, asked=Asked(projected=layer))
    rows = Inputs(jnp.asarray(ids), jnp.asarray(mask))
    jitted = jax.jit(lambda params: run(params, rows).projected, compiler_options=tiny.QUICK)
    for ours, torchs in zip(jitted(params), expected, strict=True):
        # Head norms of torch see [batch length heads size], or with the heads before the length.
        flat = torchs.reshape(*mask.shape, -1) if torchs.ndim == 3 or torchs.shape[1] == mask.shape[1] else None
        flat = torchs.transpose(1, 2).reshape(*mask.shape, -1) if flat is None else flat
        np.testing.assert_allclose(ours.reshape(*mask.shape, -1)[mask], flat.numpy()[mask], atol=2e-5)


@pytest.mark.parametrize("kind", tiny.families(FAMILIES, fast=("bert",), weekly=True))
def test_projected_as_in_torch(kind):
    import transformers

    model, params = tiny.model(kind), tiny.params(kind)
    theirs = getattr(transformers, model.torch_class)._from_config(model.config, attn_implementation="eager").eval()
    tensors = {name: torch.tensor(array) for name, array in torch_names.to_torch(params).items()}
    theirs.load_state_dict(tensors, strict=False)
    theirs.tie_weights()
    check(model, params, theirs, kind, layer=0)
    check(model, params, theirs, kind, layer=model.num_layers - 1)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "form"), [("bert", "plain"), ("gpt2", "plain"), ("llama", "plain")])
def test_projected_of_the_core_as_in_torch(kind, form):
    model = build_model(tiny_core.config(kind, form), classes="core")
    check(model, tiny_core.params(kind, form), tiny_core.torch_model(kind, form), kind, layer=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("classes", "how"), [("flax", "remat"), ("flax", "kept"), ("core", "remat"), ("core", "kept"), ("core", "scan")]
)
def test_however_the_layers_run(classes, how):
    plain = build_model(tiny.config("bert", num_hidden_layers=3), classes=classes)
    model = build_model(tiny.config("bert", num_hidden_layers=3), classes=classes, scan=how == "scan")
    params = tiny.params("bert", num_hidden_layers=3)
    ids, mask = (jnp.asarray(x) for x in tiny.batch("bert"))
    kept = jnp.ones(3, bool) if how == "kept" else None
    around = layer_interceptors(model, kept=kept, remat="full" if how == "remat" else "")

    def value(params, model, around):
        out = apply(model, params, Inputs(ids, mask), asked=Asked(projected=1), interceptors=around)
        return sum(jnp.sum(jnp.sin(x)) for x in out.projected or ())

    results = [
        jax.jit(jax.value_and_grad(functools.partial(value, model=m, around=a)), compiler_options=tiny.QUICK)(params)
        for m, a in ((plain, ()), (model, around))
    ]
    for left, right in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_later_layers_are_not_computed(scan):
    model = build_model(tiny.config("bert", num_hidden_layers=4), classes="core", scan=scan)
    params = tiny.params("bert", num_hidden_layers=4)
    ids, mask = (jnp.asarray(x) for x in tiny.batch("bert"))

    def flops(layer):
        def projected(params):
            around = layer_interceptors(model)
            out = apply(model, params, Inputs(ids, mask), asked=Asked(projected=layer), interceptors=around)
            return out.projected

        return (jax.jit(projected).lower(params).compile().cost_analysis() or {})["flops"]

    first, second = flops(0), flops(1)
    assert first < 0.4 * second
    if not scan:  # of a loop, the arithmetic of one pass is counted
        assert flops(3) > 2.5 * second
