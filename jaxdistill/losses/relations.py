"""Self-attention relations of one layer of student and teacher (MiniLMv2, Wang et al. 2020, arXiv:2012.15828).

Queries are compared with queries, keys with keys, and values with values, by their scaled products within a row. So
student and teacher need neither the same width nor the same number of layers or heads.

A few queries are compared at a time and computed again in the backward pass, so no array [heads, length, length] exists
for a whole row: at 48 heads and 128 tokens it would take 3 MB a row, a relation and a model.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdistill.losses.term import Objective, Signals, Term
from jaxdistill.models.core.modules import Projected

AT_ONCE = 2**20  # bytes of relations of one row and one model, at most, and at least those of one query


def relation_kl(
    student: Float[Array, "batch length student_width"],
    teacher: Float[Array, "batch length teacher_width"],
    documents: Int[Array, "batch length"],
    *,
    heads: int,
) -> Float[Array, "batch length"]:
    """Mean over relation heads of KL(teacher's || student's relation) for every token.

    (1 / R) sum_h sum_k t_hk (log t_hk - log s_hk), with the relation softmax_k(<a_q, a_k> / sqrt(width / R)) of the
    vectors a of head h (MiniLMv2, equations 5 to 8). In causal models, too, a token is compared with all tokens of its
    document, those after it included: what is imitated is how vectors lie to each other, and nothing is predicted.

    Args:
      student: queries, keys or values, all heads of attention one after another.
      teacher: the same of the teacher.
      documents: a token is compared with the tokens of equal number; padding may have a number of its own.
      heads: R, which divides both widths.
    """
    length = student.shape[1]
    sides = [x.reshape(*x.shape[:2], heads, -1) for x in (student, teacher)]
    count = min(max(AT_ONCE // (4 * heads * length), 1), length)
    pieces = -(-length // count)

    def cut(x: Array) -> Array:
        """[batch length ...] -> [pieces batch count ...], the last piece filled up with what is dropped again."""
        padded = jnp.pad(x, [(0, 0), (0, pieces * count - length), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(padded.reshape(len(x), pieces, count, *x.shape[2:]), 1, 0)

    of_queries = partial(jax.checkpoint(_of_queries), *sides, documents)
    values = jax.lax.map(lambda piece: of_queries(*piece), tuple(cut(x) for x in (*sides, documents)))
    return jnp.moveaxis(values, 0, 1).reshape(len(documents), -1)[:, :length]


def _of_queries(
    student_keys: Array, teacher_keys: Array, key_documents: Array, student: Array, teacher: Array, documents: Array
) -> Float[Array, "batch queries"]:
    """The mean over heads of the divergence, of a few queries against all keys."""
    same = (documents[:, :, None] == key_documents[:, None, :])[:, None]
    log_s = _log_relation(student, student_keys, same)
    log_t = _log_relation(teacher, teacher_keys, same)
    return jnp.where(same, jnp.exp(log_t) * (log_t - log_s), 0.0).sum(axis=-1).mean(axis=1)


def _log_relation(queries: Array, keys: Array, same: Array) -> Float[Array, "batch heads queries keys"]:
    products = jnp.einsum("bqhd,bkhd->bhqk", queries, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(same, products * queries.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)
    return jax.nn.log_softmax(scores, axis=-1)


def vectors(projected: Projected) -> Sequence[Float[Array, "batch length width"]]:
    """Queries, keys and values of all heads of queries: a head of keys that several share is repeated for each."""
    heads = projected.query.shape[2]
    repeated = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in projected)
    return [x.reshape(*x.shape[:2], -1) for x in repeated]


def _relation(o: Objective, x: Signals) -> Float[Array, "batch length"]:
    assert x.teacher is not None and o.relation is not None and x.documents is not None
    assert x.student.projected is not None and x.teacher.projected is not None
    pairs = zip(o.relation.weights, vectors(x.student.projected), vectors(x.teacher.projected), strict=True)
    values = [
        weight * relation_kl(student, teacher, x.documents, heads=o.relation.heads)
        for weight, student, teacher in pairs
        if weight
    ]
    return jnp.stack(values).sum(axis=0)


TERMS = {
    "relation": Term(
        "Weight of the KL divergence of self-attention relations (MiniLMv2) between the student's last layer and the "
        "teacher's relation_layer, summed over queries, keys and values by relation_weights.",
        tokens="tokens",
        sees="relations",
        per_token=_relation,
    ),
}
