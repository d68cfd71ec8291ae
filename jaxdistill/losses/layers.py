"""Losses between layers of student and teacher: hidden states, and attention maps.

Pure functions, per token, float32 whatever comes in.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxdistill.losses.term import Objective, Signals, Term


def hidden_mse(
    student: Float[Array, "*tokens width"], teacher: Float[Array, "*tokens width"]
) -> Float[Array, "*tokens"]:
    """(1 / width) sum_d (student_d - teacher_d)^2 (TinyBERT, Jiao et al. 2020, eq. 8)."""
    return jnp.mean(jnp.square(student.astype(jnp.float32) - teacher.astype(jnp.float32)), axis=-1)


def cosine_distance(
    student: Float[Array, "*tokens width"], teacher: Float[Array, "*tokens width"]
) -> Float[Array, "*tokens"]:
    """1 - <s, t> / sqrt((|s|^2 + eps) (|t|^2 + eps)), eps = 1e-12 as in torch's CosineEmbeddingLoss.

    eps keeps value and gradient finite where a vector is 0 (Sanh et al. 2019, section 3).
    """
    s, t = student.astype(jnp.float32), teacher.astype(jnp.float32)
    norms = (jnp.sum(s * s, axis=-1) + 1e-12) * (jnp.sum(t * t, axis=-1) + 1e-12)
    return 1.0 - jnp.sum(s * t, axis=-1) * jax.lax.rsqrt(norms)


def attention_kl(
    student: Float[Array, "batch student_heads length length"],
    teacher: Float[Array, "batch teacher_heads length length"],
    attention_mask: Bool[Array, "batch length"],
) -> Float[Array, "batch length"]:
    """Mean over heads of KL(teacher's || student's attention) for every query position.

    (1 / H) sum_h sum_k t_hk (log t_hk - log s_hk) over real keys k (MobileBERT, Sun et al. 2020, eq. 2). Where
    the numbers of heads differ, both are averaged over their heads first.

    Args:
      student: attention probabilities, rows sum to 1.
      teacher: attention probabilities.
      attention_mask: the keys that are real tokens.
    """
    s, t = student.astype(jnp.float32), teacher.astype(jnp.float32)
    if s.shape[1] != t.shape[1]:
        s, t = s.mean(axis=1, keepdims=True), t.mean(axis=1, keepdims=True)
    keys = attention_mask[:, None, None, :] & (t > 0)
    # Softmax can round to an exact 0; the smallest normal number keeps the logarithm finite.
    tiny = jnp.finfo(jnp.float32).tiny
    log_ratio = jnp.log(jnp.maximum(t, tiny)) - jnp.log(jnp.maximum(s, tiny))
    return jnp.sum(jnp.where(keys, t * log_ratio, 0.0), axis=-1).mean(axis=1)


def mean_over_layers(
    loss: Callable, layer_map: tuple[tuple[int, int], ...], x: Signals
) -> Float[Array, "batch length"]:
    """The mean of a loss on hidden states over pairs of layers, the student's projected where the widths differ."""
    assert x.teacher is not None
    values = []
    for s, t in layer_map:
        student = x.student.hidden_states[s]
        if (projection := x.projections.get(projection_name(s, t))) is not None:
            student = student.astype(jnp.float32) @ projection["kernel"]
        values.append(loss(student, x.teacher.hidden_states[t]))
    return jnp.stack(values).mean(axis=0)


def projection_name(student_layer: int, teacher_layer: int) -> str:
    return f"{student_layer}>{teacher_layer}"


def _hidden_mse(o: Objective, x: Signals) -> Float[Array, "batch length"]:
    return mean_over_layers(hidden_mse, o.layer_map, x)


def _hidden_cos(o: Objective, x: Signals) -> Float[Array, "batch length"]:
    return mean_over_layers(cosine_distance, o.layer_map, x)


def _attention(o: Objective, x: Signals) -> Float[Array, "batch length"]:
    assert x.teacher is not None
    pairs = [
        attention_kl(x.student.attentions[s - 1], x.teacher.attentions[t - 1], x.masks["tokens"])
        for s, t in o.layer_map
        if s > 0 and t > 0  # the embeddings have no attention
    ]
    return jnp.stack(pairs).mean(axis=0)


TERMS = {
    "hidden_mse": Term(
        "Weight of the squared difference of hidden states, mean over the width, for the pairs of layer_map.",
        tokens="tokens",
        sees="hidden_states",
        per_token=_hidden_mse,
        by_layer=True,
    ),
    "hidden_cos": Term(
        "Weight of 1 - cosine of hidden states, for the pairs of layer_map.",
        tokens="tokens",
        sees="hidden_states",
        per_token=_hidden_cos,
        by_layer=True,
    ),
    "attention": Term(
        "Weight of the KL divergence of attention maps (MobileBERT's attention transfer), for the pairs of layer_map.",
        tokens="tokens",
        sees="attentions",
        per_token=_attention,
        by_layer=True,
    ),
}
