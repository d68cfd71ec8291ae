"""The family table agrees with the library's classes: paths exist, are called, and point at what they say."""

import flax.linen as nn
import jax.numpy as jnp
import pytest
import tiny
from flax.traverse_util import flatten_dict

from jaxdistill.models.families import FAMILIES
from jaxdistill.models.flax.forward import shortened
from jaxdistill.models.inputs import Inputs
from jaxdistill.models.intercept import apply


def test_every_family_has_a_tiny_config():
    assert set(tiny.CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize("kind", tiny.families(FAMILIES, fast=("bert",)))
def test_row_matches_the_class(kind):
    import transformers

    model, params, family = tiny.model(kind), tiny.params(kind), FAMILIES[kind]
    calls = []

    def record(next_call, args, kwargs, context):
        if context.method_name == "__call__":
            calls.append(("/".join(context.module.path), args[0].shape if args else None))
        return next_call(*args, **kwargs)

    ids, mask = tiny.batch(kind)
    model = shortened(model, ids.shape[1])  # or `apply` builds it, and a model runs while it is built
    with nn.intercept_methods(record):
        apply(model, params, Inputs(jnp.asarray(ids), jnp.asarray(mask)))
    order = [path for path, _ in calls]
    layers = [path for path in order if path in {family.layers.format(i) for i in range(model.num_layers)}]
    assert len(layers) == model.num_layers
    heads = [shape for path, shape in calls if path == family.head]
    assert heads == [(2, 8, model.width)]
    # Inner modules return first, so the head is recorded after the last layer: nothing of it ran before.
    assert not any(path.startswith(family.head) for path in order[: order.index(layers[-1])])

    paths = flatten_dict(params, sep="/")
    assert family.causal or paths[family.projection_bias].shape == (model.vocab_size,)
    assert not family.causal or paths[family.embedding].shape[0] == model.vocab_size
    untied = flatten_dict(tiny.params(kind, tie_word_embeddings=False), sep="/")
    assert set(untied) - set(paths) == {f"{family.projection}/kernel"}
    assert untied[f"{family.projection}/kernel"].shape[1] == model.vocab_size
    assert hasattr(transformers, model.torch_class)
