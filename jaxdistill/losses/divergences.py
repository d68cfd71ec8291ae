"""Losses on logits, per token: each with its value and its slope, the closed-form gradient, side by side.

`p` is the teacher's distribution, `q` the student's. Pure functions, unreduced, in float32 whatever comes in. None
takes a mask or a mean: a mean is taken once, as a masked sum over all of a loss's tokens and one division, so that it
is exact over micro-batches, devices and hosts.

With -inf among the teacher's logits (words that the teacher rules out) every divergence and its slope stay finite.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Scalar = float | Float[Array, ""]
Logits: TypeAlias = Float[Array, "*tokens vocab"]
PerToken: TypeAlias = Float[Array, "*tokens"]

# log of the smallest normal float32: a probability below it is 0 here, and its logarithm is taken to be this.
LOG_TINY = math.log(float(jnp.finfo(jnp.float32).tiny))


class LogitLoss(NamedTuple):
    """A loss of the student's logits against a target: the teacher's logits, or labels.

    value(student, target, temperature, beta) is [*tokens], slope(...) is its gradient in the student's logits. Both
    ignore the arguments that the loss does not have.
    """

    name: str
    value: Callable[..., PerToken]
    slope: Callable[..., Logits]
    target: Literal["teacher", "labels"] = "teacher"


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


def _forward_kl_slope(student: Logits, teacher: Logits, temperature: Scalar, beta: float) -> Logits:
    # Not exp(log q): on a CPU each exponential would be taken twice, 10 % of the head's time.
    p, q = (softmax(x, temperature) for x in (teacher, student))
    return temperature * (q - p)


def reverse_kl(
    student: Float[Array, "*tokens vocab"], teacher: Float[Array, "*tokens vocab"], *, temperature: Scalar
) -> Float[Array, "*tokens"]:
    """T^2 KL(q || p) (MiniLLM, Gu et al. 2024), gradient T q ((log q - log p) - KL).

    Infinite by the formula where the student gives a share to a word that the teacher rules out; log p is then
    LOG_TINY = -87.3, so that such a word has a high price, a finite one, and a gradient.
    """
    log_p, log_q = log_probs(teacher, temperature), log_probs(student, temperature)
    return -(temperature**2) * jnp.sum(jnp.exp(log_q) * (log_p - log_q), axis=-1)


def _reverse_kl_slope(student: Logits, teacher: Logits, temperature: Scalar, beta: float) -> Logits:
    log_p, log_q = log_probs(teacher, temperature), log_probs(student, temperature)
    return temperature * _through_softmax(jnp.exp(log_q), log_q - log_p)


def symmetric_kl(
    student: Float[Array, "*tokens vocab"], teacher: Float[Array, "*tokens vocab"], *, temperature: Scalar
) -> Float[Array, "*tokens"]:
    """T^2 (KL(p || q) + KL(q || p)), the divergence of Jeffreys (1946).

    The student pays for missing the teacher's words and for words that the teacher finds unlikely.
    """
    return forward_kl(student, teacher, temperature=temperature) + reverse_kl(student, teacher, temperature=temperature)


def _symmetric_kl_slope(student: Logits, teacher: Logits, temperature: Scalar, beta: float) -> Logits:
    forward = _forward_kl_slope(student, teacher, temperature, beta)
    return forward + _reverse_kl_slope(student, teacher, temperature, beta)


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


def _jsd_slope(student: Logits, teacher: Logits, temperature: Scalar, beta: float) -> Logits:
    if beta in (0, 1):
        return (_reverse_kl_slope if beta else _forward_kl_slope)(student, teacher, temperature, beta)
    log_p, log_q = log_probs(teacher, temperature), log_probs(student, temperature)
    _, of_q = log_mixture(log_p, log_q, beta=beta)
    return temperature / beta * _through_softmax(jnp.exp(log_q), -of_q)


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


def _skewed_kl_slope(student: Logits, teacher: Logits, temperature: Scalar, alpha: float) -> Logits:
    if alpha == 0:
        return _forward_kl_slope(student, teacher, temperature, alpha)
    log_p, log_q = log_probs(teacher, temperature), log_probs(student, temperature)
    of_p, _ = log_mixture(log_p, log_q, beta=alpha)
    return temperature * (1 - alpha) * _through_softmax(jnp.exp(log_q), -jnp.exp(-of_p))


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


def _skewed_reverse_kl_slope(student: Logits, teacher: Logits, temperature: Scalar, alpha: float) -> Logits:
    if alpha == 0:
        return _reverse_kl_slope(student, teacher, temperature, alpha)
    log_p, log_q = log_probs(teacher, temperature), log_probs(student, temperature)
    _, of_q = log_mixture(log_p, log_q, beta=1 - alpha)
    return temperature * _through_softmax(jnp.exp(log_q), -of_q - alpha * jnp.exp(-of_q))


def skewed_reverse_kl_to_constant(
    student: Float[Array, "*tokens vocab"],
    teacher: Float[Array, "*tokens vocab"],
    *,
    temperature: Scalar,
    alpha: float,
) -> Float[Array, "*tokens"]:
    """T^2 KL(q || (1 - alpha) p + alpha q') where q' is q without a gradient (DistiLLM-2, Ko et al. 2025).

    The value of `skewed_reverse_kl`, and the part of its gradient that moves q and not the mixture.
    """
    log_p, log_q = log_probs(teacher, temperature), log_probs(student, temperature)
    mixture = jax.lax.stop_gradient(log_q if alpha == 0 else log_q + log_mixture(log_p, log_q, beta=1 - alpha)[1])
    if alpha == 0:
        mixture = log_p
    return temperature**2 * jnp.sum(jnp.exp(log_q) * (log_q - mixture), axis=-1)


def _skewed_reverse_kl_to_constant_slope(student: Logits, teacher: Logits, temperature: Scalar, alpha: float) -> Logits:
    if alpha == 0:
        return _reverse_kl_slope(student, teacher, temperature, alpha)
    log_p, log_q = log_probs(teacher, temperature), log_probs(student, temperature)
    _, of_q = log_mixture(log_p, log_q, beta=1 - alpha)
    return temperature * _through_softmax(jnp.exp(log_q), -of_q)


def total_variation(
    student: Float[Array, "*tokens vocab"], teacher: Float[Array, "*tokens vocab"], *, temperature: Scalar
) -> Float[Array, "*tokens"]:
    """T / 2 sum_v |p_v - q_v| (Wen et al. 2023), gradient q (h - sum_v q_v h_v) with h = sign(q - p) / 2.

    T and not T^2: it is of first order in p - q, so this is what keeps its size when T changes.
    """
    log_p, log_q = log_probs(teacher, temperature), log_probs(student, temperature)
    return temperature / 2 * jnp.sum(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)), axis=-1)


def _total_variation_slope(student: Logits, teacher: Logits, temperature: Scalar, beta: float) -> Logits:
    p, q = jnp.exp(log_probs(teacher, temperature)), jnp.exp(log_probs(student, temperature))
    return _through_softmax(q, jnp.sign(q - p) / 2)


def cross_entropy(logits: Float[Array, "*tokens vocab"], labels: Int[Array, "*tokens"]) -> Float[Array, "*tokens"]:
    """-log q_label, with q = softmax(logits)."""
    # Taken from the logits, as an array of log q would be written out for this one word.
    label = jnp.take_along_axis(logits, labels[..., None], axis=-1).astype(jnp.float32)
    shifted, peak = _below_peak(logits)
    return (jnp.log(jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True)) + peak - label)[..., 0]


def _cross_entropy_slope(logits: Logits, labels: Int[Array, "*tokens"], temperature: Scalar, beta: float) -> Logits:
    words = jnp.arange(logits.shape[-1]).reshape((1,) * labels.ndim + (-1,))
    return softmax(logits, 1.0) - (words == labels[..., None]).astype(jnp.float32)


def logit_mse(
    student: Float[Array, "*tokens vocab"], teacher: Float[Array, "*tokens vocab"]
) -> Float[Array, "*tokens"]:
    """sum_v (student_v - teacher_v)^2 over the vocabulary, as the reference's `alpha_mse`."""
    return jnp.sum(jnp.square(student.astype(jnp.float32) - teacher.astype(jnp.float32)), axis=-1)


def _logit_mse_slope(student: Logits, teacher: Logits, temperature: Scalar, beta: float) -> Logits:
    return 2 * (student.astype(jnp.float32) - teacher.astype(jnp.float32))


def _divergence(value: Callable[..., PerToken], slope: Callable[..., Logits], parameter: str = "") -> LogitLoss:
    """The row of a divergence; `parameter` is the name by which its value takes beta."""

    def positional(student: Logits, teacher: Logits, temperature: Scalar, beta: float) -> PerToken:
        return value(student, teacher, temperature=temperature, **({parameter: beta} if parameter else {}))

    return LogitLoss(value.__name__, positional, slope)


# By name, for alpha_ce. A new divergence is its value, its slope and its row here.
DIVERGENCES: dict[str, LogitLoss] = {
    loss.name: loss
    for loss in (
        _divergence(forward_kl, _forward_kl_slope),
        _divergence(reverse_kl, _reverse_kl_slope),
        _divergence(symmetric_kl, _symmetric_kl_slope),
        _divergence(jsd, _jsd_slope, parameter="beta"),
        _divergence(skewed_kl, _skewed_kl_slope, parameter="alpha"),
        _divergence(skewed_reverse_kl, _skewed_reverse_kl_slope, parameter="alpha"),
        _divergence(total_variation, _total_variation_slope),
    )
}


class ByWriter(NamedTuple):
    """A divergence that depends on who wrote the text of a token."""

    of_others: LogitLoss  # what the teacher wrote, or a person
    of_student: LogitLoss


# By name, for alpha_ce as well.
BY_WRITER: dict[str, ByWriter] = {
    "distillm2": ByWriter(
        DIVERGENCES["skewed_kl"],
        _divergence(skewed_reverse_kl_to_constant, _skewed_reverse_kl_to_constant_slope, parameter="alpha"),
    ),
}
CROSS_ENTROPY = LogitLoss(
    "cross_entropy",
    lambda s, labels, temperature, beta: cross_entropy(s, labels),
    _cross_entropy_slope,
    target="labels",
)
LOGIT_MSE = LogitLoss(
    "logit_mse", lambda student, teacher, temperature, beta: logit_mse(student, teacher), _logit_mse_slope
)


def _through_softmax(q: Logits, of_q: Logits) -> Logits:
    """d/d(logits) of what has the derivative `of_q` in q = softmax(logits)."""
    return q * (of_q - jnp.sum(q * of_q, axis=-1, keepdims=True))


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


def masked_sum(values: Float[Array, "*tokens"], mask: Bool[Array, "*tokens"]) -> Float[Array, ""]:
    """Sum of `values` where `mask`; what is masked out enters neither value nor gradient."""
    return jnp.sum(jnp.where(mask, values, 0.0))
