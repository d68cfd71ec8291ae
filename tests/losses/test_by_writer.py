"""DistiLLM-2: a divergence with a side for what the student wrote, and one for all other text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxdistill.losses import terms
from jaxdistill.losses.divergences import BY_WRITER, reverse_kl, skewed_kl, skewed_reverse_kl
from jaxdistill.losses.term import Objective, Signals
from jaxdistill.models.head import Head, logits
from jaxdistill.models.intercept import Outputs

RNG = np.random.default_rng(0)
S, T = (RNG.normal(size=(3, 4, 7)).astype(np.float32) * 2 for _ in range(2))
OWN = BY_WRITER["distillm2"].of_student


@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.1), (2.0, 0.5), (2.0, 0.0)])
def test_own_side_as_in_pytorch(temperature, alpha):
    s = torch.tensor(S, requires_grad=True)
    p, q = torch.softmax(torch.tensor(T) / temperature, -1), torch.softmax(s / temperature, -1)
    mixture = (1 - alpha) * p + alpha * q.detach()
    expected = temperature**2 * (q * (q.log() - mixture.log())).sum(-1)
    expected.sum().backward()
    value = OWN.value(jnp.asarray(S), jnp.asarray(T), temperature, alpha)
    gradient = jax.grad(lambda s: OWN.value(s, jnp.asarray(T), temperature, alpha).sum())(jnp.asarray(S))
    np.testing.assert_allclose(value, expected.detach(), rtol=1e-4)
    np.testing.assert_allclose(gradient, s.grad, atol=1e-5)
    np.testing.assert_allclose(OWN.slope(jnp.asarray(S), jnp.asarray(T), temperature, alpha), s.grad, atol=1e-5)
    whole = skewed_reverse_kl if alpha else lambda s, t, temperature, alpha: reverse_kl(s, t, temperature=temperature)
    same = whole(jnp.asarray(S), jnp.asarray(T), temperature=temperature, alpha=alpha)
    np.testing.assert_allclose(value, same, rtol=1e-4)


def test_it_is_finite_where_the_teacher_rules_a_word_out():
    t = jnp.asarray(T).at[..., 0].set(-jnp.inf)
    value, slope = OWN.value(jnp.asarray(S), t, 1.0, 0.1), OWN.slope(jnp.asarray(S), t, 1.0, 0.1)
    assert np.isfinite(value).all() and np.isfinite(slope).all()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("side", [1.0, 0.5])
def test_a_row_is_on_the_side_of_its_writer(fused, side):
    """Row 0 is the student's, row 1 the teacher's, and of row 2 nothing counts."""
    mask, own = np.zeros((3, 4), bool), np.zeros((3, 4), bool)
    mask[0, 1:], mask[1], own[0, 1:] = True, True, True
    objective = Objective({"ce": 3.0}, 1.0, "labels", (), "distillm2", 0.1, student_side=side)
    batch = {"attention_mask": mask, "label_mask": mask & ~own, "head_mask": mask, "own_mask": own}
    batch = jax.tree.map(jnp.asarray, batch)
    masks = terms.masks_of(objective, batch)
    kernel = jnp.asarray(RNG.normal(size=(5, 7)), jnp.float32)
    features = [jnp.asarray(RNG.normal(size=(3, 4, 5)), jnp.float32) for _ in range(2)]

    def total(of_student):
        heads = Head(of_student, kernel), Head(features[1], kernel)
        outputs = [Outputs(logits(head), (), ()) for head in heads]
        signals = Signals(*outputs, jnp.zeros((3, 4), jnp.int32), masks, {}, heads if fused else None)
        return terms.weighted_sum(objective, signals, terms.counts_of(objective, batch, group=1))

    (loss, means), gradient = jax.value_and_grad(total, has_aux=True)(features[0])

    def by_hand(of_student):
        s, t = (logits(Head(x, kernel)) for x in (of_student, features[1]))
        of_own = OWN.value(s, t, 1.0, 0.1)[0, 1:].sum()
        return (side * of_own + (2 - side) * skewed_kl(s, t, temperature=1.0, alpha=0.1)[1].sum()) / 7

    expected, expected_gradient = jax.value_and_grad(by_hand)(features[0])
    np.testing.assert_allclose([loss, means["ce"]], [3 * expected, expected], rtol=1e-5)
    np.testing.assert_allclose(gradient, 3 * expected_gradient, atol=1e-5)
