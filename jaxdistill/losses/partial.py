"""A teacher's distribution that is known in part, as a cache holds it: the loss against it, and how it is taken.

The words that the teacher finds most likely are known with their probabilities. Of all other words, the tail, either
the probability of all together is known (a bucket), or words that were drawn from them. `p` is the teacher's
distribution at temperature T, `q` the student's.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxdistill.losses.divergences import LOG_TINY, LogitLoss, Scalar, log_softmax

_BLOCK = 128  # words of a block that a word is drawn from


class Partial(NamedTuple):
    """What is known of the teacher's distributions of some tokens, at the temperature of the loss."""

    words: Int[Array, "*tokens k"] | None = None  # the k most likely, all different; None = none
    log_probs: Float[Array, "*tokens k"] | None = None  # theirs, at temperature 1
    tail: Float[Array, "*tokens"] | None = None  # log of the probability of all other words, at T; None = 1
    samples: Int[Array, "*tokens n"] | None = None  # words drawn from the tail at T; None = the tail is a bucket
    floor: Float[Array, "*tokens"] | None = None  # sum of p log p over the tail, where there are samples

    def is_whole(self, words: int) -> bool:
        """Whether all words are known with their probabilities."""
        return self.words is not None and self.words.shape[-1] == words


def dense_logits(target: Partial, *, words: int) -> Float[Array, "*tokens words"]:
    """The logits, up to a constant for each token, of a teacher that is known in whole."""
    assert target.words is not None and target.log_probs is not None and target.is_whole(words)
    order = jnp.argsort(target.words, axis=-1)
    return jnp.take_along_axis(target.log_probs.astype(jnp.float32), order, axis=-1)


def partial_kl(
    student: Float[Array, "*tokens vocab"], target: Partial, *, temperature: Scalar
) -> Float[Array, "*tokens"]:
    """T^2 KL(p || q), as far as p is known.

    With a bucket for the tail, T^2 (sum_k p_k (log p_k - log q_k) + p_tail (log p_tail - log q_tail)): the divergence
    of the distributions over k + 1 events, which is at most that over all words. With n samples v_i of the tail, whose
    share is p_tail, T^2 (sum_k p_k (log p_k - log q_k) + sum_tail p log p - p_tail / n sum_i log q_(v_i)): its mean
    over the samples is T^2 KL(p || q), and so is its gradient's (random-sampling distillation, Anshumann et al. 2025,
    arXiv:2503.16870, where there are no known words).
    """
    log_q = log_softmax(student, temperature)
    share = _share_of_tail(target)
    value = jnp.zeros(student.shape[:-1], jnp.float32)
    if target.words is not None:
        log_p = _known_log_probs(target, temperature)
        known = jnp.take_along_axis(log_q, target.words, axis=-1)
        value += jnp.sum(jnp.exp(log_p) * (log_p - known), axis=-1)
    if target.samples is None:
        assert target.tail is not None
        value += share * (_log_of_tail(target) - _log_outside(log_q, target))
    else:
        assert target.floor is not None
        drawn = jnp.take_along_axis(log_q, target.samples, axis=-1)
        value += target.floor.astype(jnp.float32) - share * drawn.mean(axis=-1)
    return temperature**2 * value


def partial_kl_slope(
    student: Float[Array, "*tokens vocab"], target: Partial, temperature: Scalar, beta: float
) -> Float[Array, "*tokens vocab"]:
    """The gradient of `partial_kl` in the student's logits, T (q - t), with t as near to p as p is known.

    t is p_k at the known words. Elsewhere it is p_tail q_v / q_tail with a bucket, and p_tail times the share of the
    samples with samples.
    """
    log_q = log_softmax(student, temperature)
    q, share = jnp.exp(log_q), _share_of_tail(target)[..., None]
    if target.samples is None:
        known = _is_known(q, target)
        to_tail = jnp.where(known, 0.0, jnp.exp(log_q - _log_outside(log_q, target)[..., None]))
        t = share * to_tail
    else:
        t = _added(jnp.zeros_like(q), target.samples, share / target.samples.shape[-1])
    if target.words is not None:
        t = _added(t, target.words, jnp.exp(_known_log_probs(target, temperature)))
    return temperature * (q - t)


def _share_of_tail(target: Partial) -> Float[Array, "*tokens"]:
    if target.tail is None:
        assert target.samples is not None
        return jnp.ones(target.samples.shape[:-1], jnp.float32)
    return jnp.exp(_log_of_tail(target))


def _log_of_tail(target: Partial) -> Float[Array, "*tokens"]:
    """Within float32, also where the tail is empty (-inf), or is everything."""
    assert target.tail is not None
    return jnp.clip(target.tail.astype(jnp.float32), LOG_TINY, -1e-7)


def _known_log_probs(target: Partial, temperature: Scalar) -> Float[Array, "*tokens k"]:
    """log p of the known words at T: their softmax among themselves, times what the tail leaves."""
    assert target.log_probs is not None
    of_known = jnp.log1p(-_share_of_tail(target))[..., None]
    return jnp.maximum(log_softmax(target.log_probs, temperature) + of_known, LOG_TINY)


def _log_outside(log_q: Float[Array, "*tokens vocab"], target: Partial) -> Float[Array, "*tokens"]:
    """log of the student's share of all words that are not known. A sum, as 1 - sum_k q_k would cancel."""
    outside = jnp.where(_is_known(log_q, target), 0.0, jnp.exp(log_q)).sum(axis=-1)
    return jnp.log(jnp.maximum(outside, math.exp(LOG_TINY)))


def _is_known(like: Float[Array, "*tokens vocab"], target: Partial) -> Array:
    if target.words is None:
        return jnp.zeros(like.shape, bool)
    return _added(jnp.zeros(like.shape, jnp.float32), target.words, jnp.ones((1,) * like.ndim)) > 0


def _added(
    values: Float[Array, "*tokens vocab"], words: Int[Array, "*tokens n"], amounts: Float[Array, "..."]
) -> Float[Array, "*tokens vocab"]:
    """`values` with the amounts added at the words of each token; a word that stands there twice gets both."""
    flat = values.reshape(-1, values.shape[-1])
    rows = jnp.arange(len(flat))[:, None]
    amounts = jnp.broadcast_to(amounts, words.shape).reshape(len(flat), -1)
    return flat.at[rows, words.reshape(len(flat), -1)].add(amounts).reshape(values.shape)


# How it is taken from logits.


def best_words(logits: Float[Array, "*tokens vocab"], k: int) -> tuple[Float[Array, "*tokens k"], Int[Array, "..."]]:
    """(the k largest logits, falling, and their words), exactly.

    The k largest stand in the k blocks with the largest maxima. Two searches, among blocks and in these, take far less
    time than one of the whole vocabulary: on two CPU cores a tenth for the 64 best of 30,522 words.
    """
    words = logits.shape[-1]
    size = max(1, int(math.sqrt(words / k)))
    blocks = -(-words // size)
    if blocks <= k or size == 1:
        values, places = jax.lax.top_k(logits, k)
        return values, places
    missing = [(0, 0)] * (logits.ndim - 1) + [(0, blocks * size - words)]
    cut = jnp.pad(logits, missing, constant_values=-jnp.inf).reshape(*logits.shape[:-1], blocks, size)
    _, chosen = jax.lax.top_k(cut.max(axis=-1), k)
    candidates = jnp.take_along_axis(cut, chosen[..., None], axis=-2)
    values, places = jax.lax.top_k(candidates.reshape(*logits.shape[:-1], k * size), k)
    return values, jnp.take_along_axis(chosen, places // size, axis=-1) * size + places % size


def log_tail(
    logits: Float[Array, "*tokens vocab"], words: Int[Array, "*tokens k"], *, temperature: Scalar
) -> Float[Array, "*tokens"]:
    """log of the probability of all other words; -inf where there are none."""
    rest = _outside(logits, words)
    log_p = log_softmax(logits, temperature)
    return jax.nn.logsumexp(jnp.where(jnp.isneginf(rest), -jnp.inf, log_p), axis=-1)


def floor_of(
    logits: Float[Array, "*tokens vocab"], words: Int[Array, "*tokens k"] | None, *, temperature: Scalar
) -> Float[Array, "*tokens"]:
    """Sum of p log p over all words but these."""
    log_p = log_softmax(logits, temperature)
    terms = jnp.where(jnp.isneginf(log_p), 0.0, jnp.exp(log_p) * log_p)
    return jnp.where(jnp.isneginf(_outside(logits, words)), 0.0, terms).sum(axis=-1)


def draw_words(
    key: Key[Array, "*tokens"],
    logits: Float[Array, "*tokens vocab"],
    words: Int[Array, "*tokens k"] | None,
    *,
    temperature: Scalar,
    count: int,
) -> Int[Array, "*tokens count"]:
    """Words drawn from all words but these, with probability ~ exp(logit / T); each token has a key.

    Systematic sampling (Cochran 1977, chapter 8): the words lie side by side on [0, 1), each as wide as its
    probability, and the draws are the words at (u + i) / count, with one random u for all. A word comes count x p
    times, rounded down or up, and on average exactly so. Independent draws would scatter more: on the quickstart's
    teacher, 12 of them have 1.4 times the variance in the gradient of features at T = 1, and 50 of them twice.

    A block of words is found first and then a word in it, so that the sums of float32 are of a few hundred numbers and
    a rare word keeps its share. Where no words are left, one of them comes.
    """
    rest = _outside(logits, words).astype(jnp.float32) / temperature
    peak = rest.max(axis=-1, keepdims=True)
    weights = jnp.exp(rest - jnp.where(jnp.isneginf(peak), 0.0, peak))
    blocks = -(-logits.shape[-1] // _BLOCK)
    weights = jnp.pad(weights, [(0, 0)] * (logits.ndim - 1) + [(0, blocks * _BLOCK - logits.shape[-1])])
    flat = weights.reshape(-1, blocks, _BLOCK)

    def one(key: Array, weights: Array) -> Array:
        uniform = jax.random.uniform(key, (1 + count,))
        ends = jnp.cumsum(weights.sum(axis=-1))
        at = (uniform[0] + jnp.arange(count)) / count * ends[-1]
        block = _at(ends, at)
        # What float32 rounds off of a place among all words is drawn anew, as it is much in a block of rare ones.
        inside = at - ends[block] + weights[block].sum(axis=-1)
        inside += uniform[1:] * jnp.finfo(jnp.float32).eps * ends[-1]
        return block * _BLOCK + jax.vmap(lambda row, at: _at(jnp.cumsum(row), at))(weights[block], inside)

    drawn = jax.vmap(one)(key.reshape(-1), flat)
    return jnp.minimum(drawn, logits.shape[-1] - 1).reshape(*logits.shape[:-1], count)


def _at(sums: Float[Array, " n"], at: Float[Array, "*m"]) -> Int[Array, "*m"]:
    """The places in running sums where `at` lies; never one of weight 0."""
    found = jnp.searchsorted(sums, jnp.maximum(at, 0.0), side="right")
    last = jnp.searchsorted(sums, sums[-1])  # the last place with a weight, where rounding leads beyond
    return jnp.minimum(found, last)


def _outside(logits: Float[Array, "*tokens vocab"], words: Int[Array, "*tokens k"] | None) -> Float[Array, "..."]:
    """The logits, with -inf at these words."""
    if words is None:
        return logits
    flat = logits.reshape(-1, logits.shape[-1])
    rows = jnp.arange(len(flat))[:, None]
    return flat.at[rows, words.reshape(len(flat), -1)].set(-jnp.inf).reshape(logits.shape)


# The losses that a partial distribution can serve, by the names of their rows for logits.
PARTIAL: dict[str, LogitLoss] = {
    "forward_kl": LogitLoss(
        "forward_kl",
        lambda student, target, temperature, beta: partial_kl(student, target, temperature=temperature),
        partial_kl_slope,
    )
}


def resolved(loss: LogitLoss, target: Any, *, words: int) -> tuple[LogitLoss, Any]:
    """The loss and its target, where the target may be a `Partial`: logits where it is known in whole."""
    if not isinstance(target, Partial):
        return loss, target
    if target.is_whole(words):
        return loss, dense_logits(target, words=words)
    return PARTIAL[loss.name], target
