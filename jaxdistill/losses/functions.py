"""Per-token distillation losses: pure, unreduced, float32 whatever comes in.

`p` is the teacher's distribution, `q` the student's. No function here takes a mask or a mean: a mean is taken
once, by `masked_sum` over all terms' tokens and one division, so that it is exact over micro-batches, devices
and hosts.

With -inf among the teacher's logits (words it rules out) every divergence and its gradient stay finite.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Scalar = float | Float[Array, ""]

# log of the smallest normal float32: a probability below it is 0 here, and its logarithm is taken to be this.
LOG_TINY = math.log(float(jnp.finfo(jnp.float32).tiny))


def forward_kl(
    student: Float[Array, "*tokens vocab"], teacher: Float[Array, "*tokens vocab"], *, temperature: Scalar
) -> Float[Array, "*tokens"]:
    """T^2 KL(p || q), with p = softmax(teacher / T) and q = softmax(student / T).

    T^2 sum_v p_v (log p_v - log q_v); its gradient in the student's logits is T (q - p), so it keeps its size
    when T changes (Hinton et al. 2015, section 2). 0 where the distributions are equal.

    Args:
      student: logits.
      teacher: logits.
      temperature: T > 0.
    """
    # Divided by the teacher's sum at the end, all four sums are taken in one pass over the logits.
    of_p, of_q = _below_peak(teacher)[0] / temperature, _below_peak(student)[0] / temperature
    weights = jnp.exp(of_p)
    total_p, total_q = (jnp.sum(x, axis=-1, keepdims=True) for x in (weights, jnp.exp(of_q)))
    # A word the teacher rules out (-inf) costs nothing: 0 log 0 = 0.
    above = jnp.sum(jnp.where(weights > 0, weights * (of_p - of_q), 0.0), axis=-1, keepdims=True)
    return (temperature**2 * (above / total_p - (jnp.log(total_p) - jnp.log(total_q))))[..., 0]


def reverse_kl(
    student: Float[Array, "*tokens vocab"], teacher: Float[Array, "*tokens vocab"], *, temperature: Scalar
) -> Float[Array, "*tokens"]:
    """T^2 KL(q || p) (MiniLLM, Gu et al. 2024), gradient T q ((log q - log p) - KL).

    Infinite by the formula where the student gives a share to a word that the teacher rules out; log p is then
    LOG_TINY = -87.3, so that such a word has a high price, a finite one, and a gradient.
    """
    log_p, log_q = log_probs(teacher, temperature), log_probs(student, temperature)
    return -(temperature**2) * jnp.sum(jnp.exp(log_q) * (log_p - log_q), axis=-1)


def jsd(
    student: Float[Array, "*tokens vocab"],
    teacher: Float[Array, "*tokens vocab"],
    *,
    temperature: Scalar,
    beta: float,
) -> Float[Array, "*tokens"]:
    """Generalised Jensen-Shannon divergence, scaled so that it is continuous in beta, the ends included.

    T^2 / (beta (1 - beta)) (beta KL(p || M) + (1 - beta) KL(q || M)), M = beta p + (1 - beta) q (GKD, Agarwal et al.
    2024, whose unscaled form tends to 0 at both ends). At beta = 0 it is `forward_kl`, at 1 `reverse_kl`: its limits.
    For the unscaled form, multiply the weight by beta (1 - beta): a quarter at 0.5.
    """
    if beta == 0:
        return forward_kl(student, teacher, temperature=temperature)
    if beta == 1:
        return reverse_kl(student, teacher, temperature=temperature)
    log_p, log_q = log_probs(teacher, temperature), log_probs(student, temperature)
    of_p, of_q = log_mixture(log_p, log_q, beta=beta)
    # Each divided by its own beta first: neither is lost in rounding near an end.
    values = jnp.exp(log_p) * of_p / (1 - beta) + jnp.exp(log_q) * of_q / beta
    return -(temperature**2) * jnp.sum(values, axis=-1)


def skewed_kl(
    student: Float[Array, "*tokens vocab"],
    teacher: Float[Array, "*tokens vocab"],
    *,
    temperature: Scalar,
    alpha: float,
) -> Float[Array, "*tokens"]:
    """T^2 KL(p || alpha p + (1 - alpha) q) (DistiLLM, Ko et al. 2024, section 3.1; there alpha = 0.1).

    `forward_kl` at alpha = 0; at most T^2 log(1 / alpha).
    """
    if alpha == 0:
        return forward_kl(student, teacher, temperature=temperature)
    log_p, log_q = log_probs(teacher, temperature), log_probs(student, temperature)
    of_p, _ = log_mixture(log_p, log_q, beta=alpha)
    return -(temperature**2) * jnp.sum(jnp.exp(log_p) * of_p, axis=-1)


def skewed_reverse_kl(
    student: Float[Array, "*tokens vocab"],
    teacher: Float[Array, "*tokens vocab"],
    *,
    temperature: Scalar,
    alpha: float,
) -> Float[Array, "*tokens"]:
    """T^2 KL(q || (1 - alpha) p + alpha q) (DistiLLM, Ko et al. 2024, section 3.1; there alpha = 0.1).

    `reverse_kl` at alpha = 0; at most T^2 log(1 / alpha).
    """
    if alpha == 0:
        return reverse_kl(student, teacher, temperature=temperature)
    log_p, log_q = log_probs(teacher, temperature), log_probs(student, temperature)
    _, of_q = log_mixture(log_p, log_q, beta=1 - alpha)
    return -(temperature**2) * jnp.sum(jnp.exp(log_q) * of_q, axis=-1)


def total_variation(
    student: Float[Array, "*tokens vocab"], teacher: Float[Array, "*tokens vocab"], *, temperature: Scalar
) -> Float[Array, "*tokens"]:
    """T / 2 sum_v |p_v - q_v| (Wen et al. 2023), gradient q (h - sum_v q_v h_v) with h = sign(q - p) / 2.

    T and not T^2: it is of first order in p - q, so this is what keeps its size when T changes.
    """
    log_p, log_q = log_probs(teacher, temperature), log_probs(student, temperature)
    return temperature / 2 * jnp.sum(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)), axis=-1)


# What `ce` may be: f(student, teacher, temperature, beta); beta is that of jsd, or the skew.
DIVERGENCES: dict[str, Callable[..., Float[Array, "..."]]] = {
    "forward_kl": lambda s, t, temperature, beta: forward_kl(s, t, temperature=temperature),
    "reverse_kl": lambda s, t, temperature, beta: reverse_kl(s, t, temperature=temperature),
    "jsd": lambda s, t, temperature, beta: jsd(s, t, temperature=temperature, beta=beta),
    "skewed_kl": lambda s, t, temperature, beta: skewed_kl(s, t, temperature=temperature, alpha=beta),
    "skewed_reverse_kl": lambda s, t, temperature, beta: skewed_reverse_kl(s, t, temperature=temperature, alpha=beta),
    "total_variation": lambda s, t, temperature, beta: total_variation(s, t, temperature=temperature),
}


def log_softmax(logits: Float[Array, "*tokens vocab"], temperature: Scalar) -> Float[Array, "*tokens vocab"]:
    """log softmax(logits / T) in float32.

    The maximum is that of the logits, whatever T: losses at several temperatures share one pass for it.
    """
    shifted = _below_peak(logits)[0] / temperature
    return shifted - jnp.log(jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True))


def softmax(logits: Float[Array, "*tokens vocab"], temperature: Scalar) -> Float[Array, "*tokens vocab"]:
    """softmax(logits / T) in float32, of the same exponentials and sum as `forward_kl` and `cross_entropy` take."""
    weights = jnp.exp(_below_peak(logits)[0] / temperature)
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


def _below_peak(
    logits: Float[Array, "*tokens vocab"],
) -> tuple[Float[Array, "*tokens vocab"], Float[Array, "*tokens 1"]]:
    """(logits minus their maximum, the maximum), in float32."""
    peak = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)).astype(jnp.float32)
    return logits.astype(jnp.float32) - peak, peak


def log_probs(logits: Float[Array, "*tokens vocab"], temperature: Scalar) -> Float[Array, "*tokens vocab"]:
    """log softmax(logits / T), at least LOG_TINY."""
    return jnp.maximum(log_softmax(logits, temperature), LOG_TINY)


def log_mixture(
    log_p: Float[Array, "*tokens vocab"], log_q: Float[Array, "*tokens vocab"], *, beta: float
) -> tuple[Float[Array, "*tokens vocab"], Float[Array, "*tokens vocab"]]:
    """(log M - log p, log M - log q) with M = beta p + (1 - beta) q, 0 < beta < 1.

    Not as differences: log(M / q) = log1p(beta (p / q - 1)) is as exact for a small beta as for any.
    """
    far = 80.0  # e^80 is within float32; beyond, the smaller of p and q is nothing beside the other

    def over(difference: Float[Array, "*tokens vocab"], share: float) -> Float[Array, "*tokens vocab"]:
        near = jnp.log1p(share * jnp.expm1(jnp.minimum(difference, far)))
        return jnp.where(difference < far, near, difference + math.log(share))

    return over(log_q - log_p, 1 - beta), over(log_p - log_q, beta)


def cross_entropy(logits: Float[Array, "*tokens vocab"], labels: Int[Array, "*tokens"]) -> Float[Array, "*tokens"]:
    """-log q_label, with q = softmax(logits)."""
    # Of the logits, and not of log q: that would be written out for the one word.
    label = jnp.take_along_axis(logits, labels[..., None], axis=-1).astype(jnp.float32)
    shifted, peak = _below_peak(logits)
    return (jnp.log(jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True)) + peak - label)[..., 0]


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
