"""A model is built without noise, has the sizes of its configuration, and begins where torch does."""

import logging

import jax
import numpy as np
import pytest
import tiny

from jaxdistill.models.inputs import Inputs
from jaxdistill.models.intercept import apply
from jaxdistill.models.model import build_model, by_core, init_params, param_shapes

CAUSAL = ("gpt2", "gpt_neo", "opt", "llama", "mistral", "gemma")


def test_build_is_quiet_and_leaves_the_verbosity(caplog):
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity(logging.INFO)
    try:
        with caplog.at_level(logging.INFO, logger="transformers"):
            build_model(tiny.config("bert", vocab_size=77))
        assert hf_logging.get_verbosity() == logging.INFO
        assert not caplog.records
    finally:
        hf_logging.set_verbosity_warning()


@pytest.mark.parametrize(
    ("kind", "length"),
    tiny.families(
        [("bert", 20), ("roberta", 18), ("xlm-roberta", 18), ("albert", 20), *((kind, 20) for kind in CAUSAL)],
        fast=["llama"],
    ),
)
def test_sizes(kind, length):
    model = tiny.model(kind)
    assert (model.width, model.vocab_size, model.max_length) == (16, 101, length)
    ids = np.full((1, length), 9, np.int32)
    out = apply(model, tiny.params(kind), Inputs(jax.numpy.asarray(ids), jax.numpy.ones((1, length), bool)))
    assert np.isfinite(out.logits).all()


def test_gemma_begins_where_torch_does():
    """Its norms multiply by 1 + weight: torch begins with 0, the Flax class with 1."""
    norms = [
        x
        for path, x in jax.tree_util.tree_leaves_with_path(init_params(tiny.model("gemma"), jax.random.key(0)))
        if "norm" in path[-2].key
    ]
    assert len(norms) == 5 and all(not x.any() for x in norms)


@pytest.mark.parametrize(("kind", "computed"), [("gpt2", True), ("gpt_neo", False)])
def test_the_core_takes_over_from_a_flax_class_where_it_can(kind, computed):
    model = tiny.model(kind)
    core = by_core(model)
    assert (core.core is not None) == computed and (core is model) != computed and by_core(core) is core
    shapes = [jax.tree.map(lambda x: x.shape, param_shapes(one)) for one in (model, core)]
    assert shapes[0] == shapes[1]
