"""The core computes what the torch classes compute with eager attention."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_core
import torch
from flax.traverse_util import flatten_dict

from jaxdistill.models import torch_names, transformers_5
from jaxdistill.models.core import network
from jaxdistill.models.core.modules import How
from jaxdistill.models.families import FAMILIES
from jaxdistill.models.positions import position_ids

TOLERANCE = 1e-4
FAST = {("qwen3", "plain"): "left", ("modernbert", "plain"): "right"}  # with the padding of their one cell
_MISSING = pytest.mark.skip("the torch class is in transformers 5 alone, and the installed transformers is 4")


def _marks(form):
    if form not in tiny_core.INSTALLED:
        return (pytest.mark.slow, _MISSING)
    return () if form in FAST else pytest.mark.slow


FORMS = [pytest.param(*form, marks=_marks(form), id="-".join(form)) for form in tiny_core.FORMS]
CELLS = [(length, padding) for length in (12, 200) for padding in ("", "left", "right")]


def ours(kind, form, params, ids, mask):
    mask = jnp.asarray(mask)
    places = position_ids(mask) if FAMILIES[kind].causal else jnp.broadcast_to(jnp.arange(mask.shape[1]), mask.shape)
    tokens = network.real_tokens(mask, places)
    return network.forward(tiny_core.settings(kind, form), params, jnp.asarray(ids), tokens, How("own", maps=True))


def theirs(kind, model, ids, mask):
    places = {"position_ids": torch.tensor(np.maximum(np.cumsum(mask, axis=1) - 1, 0))} if FAMILIES[kind].causal else {}
    return model(
        input_ids=torch.tensor(ids).long(),
        attention_mask=torch.tensor(mask).long(),
        output_hidden_states=True,
        output_attentions=True,
        **places,
    )


@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_outputs_are_those_of_torch(kind, form):
    params, model = tiny_core.params(kind, form), tiny_core.torch_model(kind, form)
    run = jax.jit(lambda params, ids, mask: ours(kind, form, params, ids, mask))
    for length, padding in [(12, FAST[kind, form])] if (kind, form) in FAST else CELLS:
        ids, mask = tiny_core.batch(length, padding)
        got = jax.device_get(run(params, ids, mask))
        with torch.no_grad():
            wanted = theirs(kind, model, ids, mask)
        close(got.logits, wanted.logits, mask)
        for one, other in zip(states(kind, form, params, got), wanted.hidden_states, strict=True):
            close(one, other, mask)
        for one, other in zip(got.maps, wanted.attentions, strict=True):
            close(np.moveaxis(one, 1, 2), other.transpose(1, 2), mask)


def states(kind, form, params, got):
    """The hidden states as the installed torch class returns them: transformers 5 norms ModernBERT's last."""
    if kind != "modernbert" or not transformers_5.is_5():
        return got.hidden_states
    s = tiny_core.settings(kind, form)
    norm = nn.LayerNorm(s.eps, use_bias=s.norm_bias, use_fast_variance=False)
    last = norm.apply({"params": params["model"]["final_norm"]}, got.hidden_states[-1])
    return [*got.hidden_states[:-1], np.asarray(last)]


def close(got, wanted, mask):
    """At real tokens, relative to the size of the values."""
    got, wanted = got[mask], wanted.detach().numpy()[mask]
    np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE * max(1.0, np.abs(wanted).max()))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "form"), tiny.families(tiny_core.INSTALLED, fast=(), weekly=True))
def test_gradients_are_those_of_torch(kind, form):
    params, model = tiny_core.params(kind, form), tiny_core.torch_model(kind, form)
    ids, mask = tiny_core.batch(20, "left")
    weights = np.random.default_rng(2).normal(size=(*ids.shape, 101)).astype(np.float32) * mask[:, :, None]

    def loss(params):
        return jnp.sum(jax.nn.log_softmax(ours(kind, form, params, ids, mask).logits) * weights)

    torch.sum(torch.log_softmax(theirs(kind, model, ids, mask).logits, -1) * torch.tensor(weights)).backward()
    got = torch_names.to_torch(jax.device_get(jax.jit(jax.grad(loss))(params)))
    wanted = {name: x.grad.numpy() for name, x in model.named_parameters() if name in got}
    assert got.keys() == wanted.keys() == {torch_names.torch_name(path) for path in flatten_dict(params, sep="/")}
    for name, gradient in got.items():
        np.testing.assert_allclose(
            gradient, wanted[name], rtol=0, atol=TOLERANCE * max(1.0, np.abs(wanted[name]).max()), err_msg=name
        )
