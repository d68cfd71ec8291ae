"""The families that have both, computed by transformers' Flax class and by the core with the same parameters."""

import grids
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict

from jaxdistill.models.core.rows import ROWS
from jaxdistill.models.families import FAMILIES
from jaxdistill.models.flax.supported import has_flax_class
from jaxdistill.models.head import logits as logits_of
from jaxdistill.models.inputs import Asked, Inputs
from jaxdistill.models.intercept import apply, head_of
from jaxdistill.models.model import build_model, param_shapes
from jaxdistill.sampling.decoding import Decoding
from jaxdistill.sampling.generate import make_generator

BOTH = grids.covering([kind for kind in ROWS if has_flax_class(kind)], (True, False))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tie"), BOTH)
def test_both_are_one_model(kind, tie):
    config = tiny.config(kind, tie_word_embeddings=tie)
    params = tiny.params(kind, tie_word_embeddings=tie)
    ids, mask = (jnp.asarray(x) for x in tiny.batch(kind))
    asked = Asked(hidden_states=True, attentions=True)
    positions = None if FAMILIES[kind].causal else jnp.asarray([[0, 2], [1, 2]])
    found = {}
    for classes in ("flax", "core"):
        model = build_model(config, classes=classes)
        assert model.classes == classes
        shapes = {path: x.shape for path, x in flatten_dict(param_shapes(model), sep="/").items()}
        assert shapes == {path: x.shape for path, x in flatten_dict(params, sep="/").items()}

        def loss(params, model=model):
            out = apply(model, params, Inputs(ids, mask), asked=asked, positions=positions)
            return jnp.sum(jnp.sin(out.logits)), out

        (_, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        found[classes] = jax.device_get((out, gradient, logits_of(head_of(model, params, out.features))))
    (flax, flax_gradient, _), (core, gradient, logits) = found["flax"], found["core"]
    np.testing.assert_allclose(core.logits, logits, atol=1e-5)
    real = mask if FAMILIES[kind].causal else np.ones((2, 2), bool)
    np.testing.assert_allclose(core.logits[real], flax.logits[real], atol=2e-5)
    for one, other in zip(core.hidden_states, flax.hidden_states, strict=True):
        np.testing.assert_allclose(one[mask], other[mask], atol=2e-5)
    for one, other in zip(core.attentions, flax.attentions, strict=True):
        np.testing.assert_allclose(np.moveaxis(one, 1, 2)[mask], np.moveaxis(other, 1, 2)[mask], atol=2e-5)
    if real.all():  # gradients through the logits of padding differ
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradient, flax_gradient)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "mistral"])
def test_both_write_the_same_text(kind):
    """Prompts padded on the left, and text beyond the window, from the caches of both."""
    decoding = Decoding(max_new_tokens=8, pad_id=1, end_ids=(), temperature=0.0)
    params = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, tiny.params(kind))
    written = []
    for classes in ("flax", "core"):
        model = build_model(tiny.config(kind), classes=classes)
        generate = make_generator(model, decoding=decoding, batch_size=2)
        written.append(generate(params, [[17, 40, 8, 99, 23, 64], [50]], jax.random.key(0)))
    assert written[0] == written[1]
