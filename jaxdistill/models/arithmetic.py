"""The arithmetic of a model's forward pass by a formula, where no program has to be compiled to count it."""

import math

import jax

from jaxdistill.models.model import Model, param_shapes


def forward_flops(model: Model, *, length: float, head_share: float) -> float:
    """Floating-point operations for a token, counted as by Chowdhery et al. (2022, appendix B).

    2 for each weight of a projection, 4 x width for each token that is attended to in each layer (causal models are
    counted as if they saw the whole row, as in the paper), and the vocabulary projection.

    Args:
      length: tokens of a row.
      head_share: the share of the tokens whose logits are computed.
    """
    words = model.vocab_size
    leaves = jax.tree_util.tree_leaves_with_path(param_shapes(model))
    # Tables are looked up, and the head is counted by its share, whether it is a table or a projection.
    projections = [
        math.prod(leaf.shape)
        for path, leaf in leaves
        if len(leaf.shape) > 1 and words not in leaf.shape and "embedding" not in jax.tree_util.keystr(path[-1:])
    ]
    passes = model.num_layers / getattr(model.config, "num_hidden_groups", 1) if model.family.shared_layers else 1
    attention = 4 * model.num_layers * model.width * length
    return 2 * passes * sum(projections) + attention + 2 * head_share * words * model.width
