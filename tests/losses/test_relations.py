"""MiniLMv2's relations: value and gradient as in PyTorch, padding and other documents unseen, in chunks or at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxdistill.losses import relations
from jaxdistill.losses.relations import relation_kl, vectors
from jaxdistill.models.core.modules import Projected

HEADS, LENGTH = 6, 10
RNG = np.random.default_rng(0)
STUDENT, TEACHER = (RNG.normal(size=(3, LENGTH, width)).astype(np.float32) for width in (12, 24))
# A whole row, one with padding on both sides, and two documents with padding after them.
DOCUMENTS = np.array([[1] * 10, [0, 0, 1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 2, 2, 2, 0, 0, 0]], np.int32)
REAL = DOCUMENTS > 0


def oracle(student: torch.Tensor) -> torch.Tensor:
    """The mean over real tokens and heads, token by token as the paper writes it."""
    total, count = torch.zeros(()), 0
    for row, token in np.argwhere(REAL):
        keys = np.flatnonzero(DOCUMENTS[row] == DOCUMENTS[row, token])
        for head in range(HEADS):
            logs = []
            for x in (torch.tensor(TEACHER), student):
                size = x.shape[-1] // HEADS
                own = x[row, :, head * size : (head + 1) * size]
                logs.append(torch.log_softmax(own[keys] @ own[token] / size**0.5, dim=0))
            total = total + torch.sum(logs[0].exp() * (logs[0] - logs[1])) / HEADS
        count += 1
    return total / count


def mean(student, teacher=TEACHER, documents=DOCUMENTS):
    values = relation_kl(student, jnp.asarray(teacher), jnp.asarray(documents), heads=HEADS)
    return jnp.sum(jnp.where(documents > 0, values, 0.0)) / (documents > 0).sum()


@pytest.mark.parametrize("queries", [LENGTH, 4, 1])
def test_value_and_gradient_are_the_oracle_s(queries, monkeypatch):
    monkeypatch.setattr(relations, "AT_ONCE", 4 * HEADS * LENGTH * queries)
    value, gradient = jax.jit(jax.value_and_grad(mean))(jnp.asarray(STUDENT))
    student = torch.tensor(STUDENT, requires_grad=True)
    expected = oracle(student)
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    assert student.grad is not None
    np.testing.assert_allclose(gradient, student.grad, atol=1e-6)
    assert float(np.abs(gradient[REAL]).min(axis=-1).max()) > 1e-4


def test_equal_vectors_cost_nothing():
    values = relation_kl(jnp.asarray(TEACHER), jnp.asarray(TEACHER), jnp.asarray(DOCUMENTS), heads=HEADS)
    np.testing.assert_allclose(values, 0.0, atol=1e-6)


def test_padding_and_other_documents_are_not_seen():
    inside = DOCUMENTS == 1
    other = np.where(inside[:, :, None], STUDENT, RNG.normal(size=STUDENT.shape).astype(np.float32) * 9)
    before, after = (
        relation_kl(jnp.asarray(x), jnp.asarray(TEACHER), jnp.asarray(DOCUMENTS), heads=HEADS) for x in (STUDENT, other)
    )
    np.testing.assert_array_equal(before[inside], after[inside])
    alone = relation_kl(
        jnp.asarray(STUDENT[2:, :4]), jnp.asarray(TEACHER[2:, :4]), jnp.ones((1, 4), jnp.int32), heads=HEADS
    )
    np.testing.assert_allclose(before[2, :4], alone[0], rtol=1e-5)


def test_the_relations_of_a_row_are_never_whole(monkeypatch):
    """Neither forward nor backward is there an array of all heads, queries and keys."""
    length = 64
    monkeypatch.setattr(relations, "AT_ONCE", 4 * HEADS * length * 4)
    x = jnp.zeros((1, length, HEADS))
    documents = jnp.ones((1, length), jnp.int32)
    loss = lambda x: relation_kl(x, x, documents, heads=HEADS).sum()  # noqa: E731
    compiled = jax.jit(jax.grad(loss)).lower(x).compile().as_text() or ""
    assert f"[1,{HEADS},4,{length}]" in compiled
    assert f"{HEADS},{length},{length}]" not in compiled


def test_shared_key_heads_are_repeated():
    query, key = (RNG.normal(size=(1, 2, heads, 3)).astype(np.float32) for heads in (4, 2))
    of_query, of_key, _ = vectors(Projected(jnp.asarray(query), jnp.asarray(key), jnp.asarray(key)))
    np.testing.assert_array_equal(of_query, query.reshape(1, 2, 12))
    np.testing.assert_array_equal(of_key, key[:, :, [0, 0, 1, 1]].reshape(1, 2, 12))
