"""Per-token distillation losses: pure, unreduced, float32 whatever comes in.

`p` is the teacher's distribution, `q` the student's. No function here takes a mask or a mean: a mean is taken
once, by `masked_sum` over all terms' tokens and one division, so that it is exact over micro-batches, devices
and hosts.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def forward_kl(
    student: Float[Array, "*tokens vocab"], teacher: Float[Array, "*tokens vocab"], *, temperature: float
) -> Float[Array, "*tokens"]:
    """T^2 KL(p || q), with p = softmax(teacher / T) and q = softmax(student / T).

    T^2 sum_v p_v (log p_v - log q_v); its gradient in the student's logits is T (q - p), so it keeps its size
    when T changes (Hinton et al. 2015, section 2). 0 where the distributions are equal.

    Args:
      student: logits.
      teacher: logits.
      temperature: T > 0.
    """
    log_p = jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature)
    log_q = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    p = jnp.exp(log_p)
    # A word the teacher rules out (-inf) costs nothing: 0 log 0 = 0.
    return temperature**2 * jnp.sum(jnp.where(p > 0, p * (log_p - log_q), 0.0), axis=-1)


def cross_entropy(logits: Float[Array, "*tokens vocab"], labels: Int[Array, "*tokens"]) -> Float[Array, "*tokens"]:
    """-log q_label, with q = softmax(logits)."""
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_q, labels[..., None], axis=-1)[..., 0]


def logit_mse(
    student: Float[Array, "*tokens vocab"], teacher: Float[Array, "*tokens vocab"]
) -> Float[Array, "*tokens"]:
    """sum_v (student_v - teacher_v)^2 over the vocabulary, as the reference's `alpha_mse`."""
    return jnp.sum(jnp.square(student.astype(jnp.float32) - teacher.astype(jnp.float32)), axis=-1)


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


def masked_sum(values: Float[Array, "*tokens"], mask: Bool[Array, "*tokens"]) -> Float[Array, ""]:
    """Sum of `values` where `mask`; what is masked out enters neither value nor gradient."""
    return jnp.sum(jnp.where(mask, values, 0.0))
