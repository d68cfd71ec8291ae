"""Which tokens the student is least certain of, how many, and that only these are compared with the teacher."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxdistill.losses import selection, terms
from jaxdistill.losses.term import Objective
from jaxdistill.models import intercept
from jaxdistill.models.head import Head, logits
from jaxdistill.models.inputs import Inputs
from jaxdistill.step import sharding
from jaxdistill.step.forward import Distillation, loss_fn

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("share", "numbers"), [(0.2, {0: 0, 1: 1, 5: 1, 6: 2, 10: 2}), (1.0, {7: 7}), (0.35, {8: 3})])
def test_a_share_is_rounded_up_and_no_further(share, numbers):
    for count, expected in numbers.items():
        mask = jnp.arange(10).reshape(2, 5) < count
        assert int(selection.chosen(mask, share=share, group=2)[0]) == expected


def test_the_most_uncertain_of_a_group_are_chosen():
    entropies, mask = RNG.random((4, 6)).astype(np.float32), RNG.random((4, 6)) < 0.6
    positions, valid = selection.most_uncertain(jnp.asarray(entropies), jnp.asarray(mask), share=0.3, group=2)
    for group in range(2):
        flat = np.where(mask, entropies, -1)[2 * group : 2 * group + 2].ravel()
        count = int(np.ceil(0.3 * mask[2 * group : 2 * group + 2].sum()))
        assert set(np.asarray(positions[group])[np.asarray(valid[group])]) == set(np.argsort(-flat)[:count])


@pytest.mark.parametrize("devices", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_entropies_in_pieces_are_those_of_all_logits(devices, monkeypatch):
    monkeypatch.setattr(selection, "chunk_size", lambda *, tokens, platform: 3)
    head = Head(*(jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((4, 7, 5), (5, 11), (11,))), cap=2.0)
    mesh = sharding.make_mesh(data=devices, fsdp=1, devices=jax.devices()[:devices])
    found = jax.jit(functools.partial(selection.entropies_of, mesh=mesh))(head)
    q = np.asarray(jax.nn.softmax(logits(head)), np.float64)
    np.testing.assert_allclose(found, -(q * np.log(q)).sum(-1), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "head"), [("llama", "fused"), ("llama", "dense"), ("bert", "fused")])
def test_loss_and_gradient_are_those_of_the_chosen_tokens(kind, head):
    """The other losses see all of their tokens."""
    label = "clm" if tiny.FAMILIES[kind].causal else "mlm"
    objective = Objective({"ce": 2.0, label: 0.5, "mse": 0.01}, 2.0, "uncertain", (), head=head, share=0.4)
    teacher, student = tiny.model(kind), tiny.model(kind, **tiny.depth(kind, 1))
    teacher_params, params = tiny.params(kind), tiny.params(kind, **tiny.depth(kind, 1))
    ids, mask = tiny.batch(kind, rows=4)
    label_mask = mask & (RNG.random(mask.shape) < 0.8)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids[:, ::-1].copy(), "label_mask": label_mask}
    batch = jax.tree.map(jnp.asarray, batch)
    inputs = Inputs(batch["input_ids"], batch["attention_mask"])
    found = selection.entropy(jax.jit(lambda params: intercept.apply(student, params, inputs).logits)(params))
    positions, valid = selection.most_uncertain(found, batch["label_mask"], share=0.4, group=2)
    chosen = np.zeros((2, 2 * mask.shape[1]), bool)
    for group in range(2):
        chosen[group, np.asarray(positions[group])[np.asarray(valid[group])]] = True
    assert 0 < chosen.sum() < label_mask.sum()

    def value(params, objective, batch):
        distillation = Distillation(student, teacher, objective, 2, lambda n: n)
        counts = terms.counts_of(objective, batch, group=2)
        return loss_fn({"student": params, "projections": {}}, teacher_params, batch, counts, distillation)

    def graded(objective, batch):
        both = jax.value_and_grad(functools.partial(value, objective=objective), has_aux=True)
        return jax.jit(both, compiler_options=tiny.QUICK)(params, batch=batch)

    by_entropy = graded(objective, batch)
    masked = {**batch, "head_mask": jnp.asarray(chosen.reshape(mask.shape))}
    by_mask = graded(objective._replace(tokens="labels"), masked)
    for left, right in zip(*map(jax.tree.leaves, (by_entropy, by_mask)), strict=True):
        np.testing.assert_allclose(left, right, atol=2e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_head_costs_less():
    """Arithmetic of loss and gradient, with a vocabulary beside which the rest is little."""
    kind, words = "llama", {"vocab_size": 6000}
    teacher, student = tiny.model(kind, **words), tiny.model(kind, **words, **tiny.depth(kind, 1))
    ids, mask = (jnp.asarray(x) for x in tiny.batch(kind, rows=4))
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids, "label_mask": mask}

    def flops(tokens):
        objective = Objective({"ce": 1.0}, 2.0, tokens, (), share=0.2)
        distillation = Distillation(student, teacher, objective, 2, lambda n: n)

        def value(params, teacher_params):
            counts = terms.counts_of(objective, batch, group=2)
            return loss_fn({"student": params, "projections": {}}, teacher_params, batch, counts, distillation)[0]

        arguments = tiny.params(kind, **words, **tiny.depth(kind, 1)), tiny.params(kind, **words)
        return (jax.jit(jax.grad(value)).lower(*arguments).compile().cost_analysis() or {})["flops"]

    assert flops("uncertain") < 0.6 * flops("labels")
