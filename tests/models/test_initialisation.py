"""A model with random weights begins as PyTorch's class begins."""

import jax
import numpy as np
import pytest
import tiny
import torch
import transformers

from jaxdistill.models import torch_names
from jaxdistill.models.model import init_params, param_shapes


@pytest.mark.parametrize("kind", tiny.families(tiny.CONFIGS))
def test_every_tensor_has_the_mean_and_the_spread_that_torch_gives_it(kind):
    model = tiny.model(kind)
    params = init_params(model, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), param_shapes(model)
    )
    torch.manual_seed(0)
    theirs = getattr(transformers, model.torch_class)(tiny.config(kind)).state_dict()
    for name, ours in torch_names.to_torch(params).items():
        wanted = theirs[name].double().numpy()
        # Five standard errors of the difference between two samples' means, and between their standard deviations.
        assert abs(ours.mean() - wanted.mean()) <= 5 * wanted.std() * np.sqrt(2 / ours.size), name
        assert abs(ours.std() - wanted.std()) <= 5 * wanted.std() / np.sqrt(ours.size), name
