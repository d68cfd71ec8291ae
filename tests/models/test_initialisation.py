"""A model with random weights begins as PyTorch's class begins."""

import jax
import numpy as np
import pytest
import tiny
import torch
import transformers

from jaxdistill.models import torch_names
from jaxdistill.models.model import by_core, init_params, param_shapes


@pytest.mark.parametrize("kind", tiny.families(tiny.CONFIGS))
def test_every_tensor_has_the_mean_and_the_spread_that_torch_gives_it(kind):
    """Drawn for the Flax class, where there is one, and by the core, where it can compute the family."""
    model = tiny.model(kind)
    torch.manual_seed(0)
    theirs = getattr(transformers, model.torch_class)(tiny.config(kind)).state_dict()
    theirs = {name: x.double().numpy() for name, x in theirs.items()}
    core = by_core(model)
    for one in [model] if core is model else [model, core]:
        params = init_params(one, jax.random.key(0))
        drawn, wanted = (jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (params, param_shapes(one)))
        assert drawn == wanted
        for name, ours in torch_names.to_torch(params).items():
            mean, std = theirs[name].mean(), theirs[name].std()
            # Five standard errors of the difference between two samples' means, and between their standard deviations.
            assert abs(ours.mean() - mean) <= 5 * std * np.sqrt(2 / ours.size), name
            assert abs(ours.std() - std) <= 5 * std / np.sqrt(ours.size), name
