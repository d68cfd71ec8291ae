"""The fused head is the dense one, with autodiff for its gradients and without torch: for the newest JAX too."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxdistill.losses import terms
from jaxdistill.losses.divergences import DIVERGENCES
from jaxdistill.losses.term import Objective, Signals
from jaxdistill.models import intercept
from jaxdistill.models.head import Head, logits

pytestmark = [pytest.mark.slow, pytest.mark.newest]

TOKENS, VOCAB = (3, 7), 19


def head(seed: int, width: int) -> Head:
    shapes = [(*TOKENS, width), (width, VOCAB), (VOCAB,)]
    return Head(*(2 * jax.random.normal(jax.random.key(seed + i), shape) for i, shape in enumerate(shapes)))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_value_and_gradients(divergence: str) -> None:
    student, teacher = head(0, 6), head(3, 9)
    labels = jax.random.randint(jax.random.key(6), TOKENS, 0, VOCAB)
    counted = jax.random.bernoulli(jax.random.key(7), 0.6, TOKENS)
    masks = {"tokens": counted, "head": counted, "labels": counted}
    aim = Objective({"mse": 0.1, "ce": 5.0, "mlm": 2.0}, 2.0, "all", (), divergence=divergence, beta=0.3)
    counts = terms.token_counts(terms.masks_of(aim, {"attention_mask": counted, "label_mask": counted}))

    def dense(student: Head) -> Any:
        outputs = [intercept.Outputs(logits(one), (), ()) for one in (student, teacher)]
        return terms.weighted_sum(aim, Signals(*outputs, labels, masks, {}), counts)

    def fused(student: Head) -> Any:
        nothing = intercept.Outputs(jnp.zeros((0, 0, 0)), (), ())
        return terms.weighted_sum(aim, Signals(nothing, nothing, labels, masks, {}, (student, teacher)), counts)

    ours, theirs = (jax.jit(jax.value_and_grad(f, has_aux=True))(student) for f in (fused, dense))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert jnp.abs(a - b).max() <= 1e-5 * (1 + jnp.abs(b).max())
