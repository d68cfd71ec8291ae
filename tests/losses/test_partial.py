"""A teacher that is known in part: the loss against it by a NumPy oracle, and how it is taken from logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.losses import divergences as losses
from jaxdistill.losses.fused_head import HeadLoss, fused_head
from jaxdistill.losses.partial import (
    PARTIAL,
    Partial,
    best_words,
    dense_logits,
    draw_words,
    floor_of,
    log_tail,
    partial_kl,
    partial_kl_slope,
)
from jaxdistill.models.head import Head

TOKENS, VOCAB, K = 5, 23, 4
RNG = np.random.default_rng(0)
STUDENT, TEACHER = (RNG.normal(0, 2, (TOKENS, VOCAB)).astype(np.float32) for _ in range(2))
temperatures = pytest.mark.parametrize("temperature", [1.0, 2.5])


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    weights = np.exp((logits.astype(np.float64) - logits.max(-1, keepdims=True)) / temperature)
    return weights / weights.sum(-1, keepdims=True)


def known(logits: np.ndarray, *, k: int, temperature: float) -> Partial:
    _, words = best_words(jnp.asarray(logits), k)
    log_probs = jnp.take_along_axis(losses.log_softmax(jnp.asarray(logits), 1.0), words, axis=-1)
    return Partial(words, log_probs, log_tail(jnp.asarray(logits), words, temperature=temperature))


def with_samples(target: Partial, logits: np.ndarray, *, count: int, temperature: float) -> Partial:
    keys = jax.random.split(jax.random.key(1), len(logits))
    samples = draw_words(keys, jnp.asarray(logits), target.words, temperature=temperature, count=count)
    return target._replace(samples=samples, floor=floor_of(jnp.asarray(logits), target.words, temperature=temperature))


def bucket_kl(student: np.ndarray, teacher: np.ndarray, *, k: int, temperature: float) -> np.ndarray:
    """T^2 KL over k + 1 events, in float64."""
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    values = []
    for p_row, q_row in zip(p, q, strict=True):
        best = np.argsort(-p_row)[:k]
        rest = np.setdiff1d(np.arange(VOCAB), best)
        a = np.append(p_row[best], p_row[rest].sum())
        b = np.append(q_row[best], q_row[rest].sum())
        values.append(temperature**2 * np.sum(a * np.log(a / b)))
    return np.asarray(values)


@pytest.mark.slow
@temperatures
def test_with_a_bucket_it_is_the_divergence_of_k_and_one_events(temperature: float) -> None:
    target = known(TEACHER, k=K, temperature=temperature)
    np.testing.assert_allclose(
        partial_kl(jnp.asarray(STUDENT), target, temperature=temperature),
        bucket_kl(STUDENT, TEACHER, k=K, temperature=temperature),
        rtol=1e-5,
    )
    # By central differences in float64, so by no formula of ours.
    slope = np.zeros(STUDENT.shape)
    for word in range(VOCAB):
        step = np.zeros(VOCAB)
        step[word] = 1e-5
        up, down = (bucket_kl(STUDENT + s * step, TEACHER, k=K, temperature=temperature) for s in (1.0, -1.0))
        slope[:, word] = (up - down) / 2e-5
    np.testing.assert_allclose(partial_kl_slope(jnp.asarray(STUDENT), target, temperature, 0.0), slope, atol=1e-5)


@temperatures
@pytest.mark.parametrize("samples", [0, 6])
@pytest.mark.parametrize("k", [0, K])
def test_the_slope_is_the_gradient_of_the_value(temperature: float, samples: int, k: int) -> None:
    if not (samples or k):
        return
    target = known(TEACHER, k=k, temperature=temperature) if k else Partial()
    if samples:
        target = with_samples(target, TEACHER, count=samples, temperature=temperature)
    gradient = jax.grad(lambda s: partial_kl(s, target, temperature=temperature).sum())(jnp.asarray(STUDENT))
    slope = partial_kl_slope(jnp.asarray(STUDENT), target, temperature, 0.0)
    np.testing.assert_allclose(slope, gradient, atol=1e-5)
    np.testing.assert_allclose(slope.sum(axis=-1), 0, atol=1e-5)  # a constant more in all logits changes nothing


@temperatures
def test_with_all_words_it_is_the_live_teacher(temperature: float) -> None:
    """Also with words that the teacher rules out, and every divergence."""
    teacher = TEACHER.copy()
    teacher[1, 3] = -np.inf
    target = known(teacher, k=VOCAB, temperature=temperature)
    assert target.is_whole(VOCAB)
    again = dense_logits(target, words=VOCAB)
    for loss in losses.DIVERGENCES.values():
        for function, tolerance in ((loss.value, 2e-5), (loss.slope, 2e-5)):
            live = function(jnp.asarray(STUDENT), jnp.asarray(teacher), temperature, 0.3)
            np.testing.assert_allclose(
                function(jnp.asarray(STUDENT), again, temperature, 0.3), live, rtol=tolerance, atol=tolerance
            )


@temperatures
@pytest.mark.parametrize("k", [0, K])
def test_samples_are_unbiased_in_value_and_gradient(temperature: float, k: int) -> None:
    """The mean over 4,000 draws for each token, within four standard errors of independent draws."""
    count = 4_000
    target = known(TEACHER, k=k, temperature=temperature) if k else Partial()
    target = with_samples(target, TEACHER, count=count, temperature=temperature)
    p, q = softmax(TEACHER, temperature), softmax(STUDENT, temperature)
    share = (
        np.ones(TOKENS)
        if target.words is None
        else p.sum(-1) - np.take_along_axis(p, np.asarray(target.words), -1).sum(-1)
    )
    deviation = share * np.std(np.log(np.take_along_axis(q, np.asarray(target.samples), -1)), axis=-1)
    live = losses.forward_kl(jnp.asarray(STUDENT), jnp.asarray(TEACHER), temperature=temperature)
    error = partial_kl(jnp.asarray(STUDENT), target, temperature=temperature) - live
    assert (np.abs(error) < 4 * temperature**2 * deviation / np.sqrt(count) + 1e-4).all()
    slope = partial_kl_slope(jnp.asarray(STUDENT), target, temperature, 0.0)
    error = np.abs(slope - temperature * (q - p))
    assert (error < 4 * temperature * np.sqrt(share[:, None] * p / count) + 1e-4).all()
    assert error.max() > 2e-5  # the test sees samples, and no exact answers


@pytest.mark.slow
def test_draws_keep_the_share_of_rare_words_and_leave_out_what_is_known() -> None:
    """Shares from a half down to a ten-thousandth, over more words than a block has."""
    words = 1_000
    logits = np.log(np.r_[0.5, np.full(9, 0.04), np.full(words - 10, 0.14 / (words - 10))]).astype(np.float32)
    drawn = np.asarray(
        draw_words(jax.random.key(0)[None], jnp.asarray(logits[None]), None, temperature=1.0, count=40_000)
    )
    counts = np.bincount(drawn[0], minlength=words)
    expected = 40_000 * np.exp(logits.astype(np.float64))
    assert (np.abs(counts - expected) < 1.5).all()  # a word comes as often as its share says, rounded down or up
    out = jnp.arange(10)[None]
    rest = np.asarray(
        draw_words(jax.random.key(0)[None], jnp.asarray(logits[None]), out, temperature=2.0, count=20_000)
    )
    assert rest.min() == 10 and len(np.unique(rest)) == words - 10


@pytest.mark.slow
def test_few_draws_keep_the_shares_on_average() -> None:
    """Over 4,000 tokens; 12 draws of each scatter less than independent ones."""
    logits = RNG.normal(size=300).astype(np.float32) * 2
    keys = jax.random.split(jax.random.key(1), 4_000)
    drawn = draw_words(keys, jnp.broadcast_to(jnp.asarray(logits), (4_000, 300)), None, temperature=1.0, count=12)
    counts = np.stack([np.bincount(row, minlength=300) for row in np.asarray(drawn)])
    p = softmax(logits[None], 1.0)[0]
    assert (np.abs(counts - 12 * p) < 1 + 1e-4).all()
    independent = 12 * p * (1 - p)
    assert (np.abs(counts.mean(axis=0) - 12 * p) < 5 * np.sqrt(independent / 4_000) + 1e-3).all()
    assert counts.var(axis=0).sum() < 0.9 * independent.sum()


@pytest.mark.parametrize("k", [1, 7, 40, 100])
def test_the_best_words_are_those_of_a_sort(k: int) -> None:
    logits = RNG.normal(size=(3, 2, 100)).astype(np.float32)
    values, words = best_words(jnp.asarray(logits), k)
    np.testing.assert_array_equal(words, np.argsort(-logits, axis=-1)[..., :k])
    np.testing.assert_array_equal(values, -np.sort(-logits, axis=-1)[..., :k])


@pytest.mark.slow
@pytest.mark.parametrize("tail", [0.0, -np.inf, -1e-9, -90.0])
def test_it_is_finite_at_the_ends(tail: float) -> None:
    """A tail of everything or of nothing, and places without an answer, which hold zeros."""
    target = Partial(jnp.zeros((1, K), jnp.int32), jnp.zeros((1, K)), jnp.full((1,), tail, jnp.float32))
    sharp = jnp.asarray(np.r_[200.0, np.zeros(VOCAB - 1)][None], jnp.float32)
    for student in (sharp, -sharp, 0 * sharp):
        value, gradient = jax.value_and_grad(lambda s: partial_kl(s, target, temperature=1.0).sum())(student)
        assert np.isfinite(value) and np.isfinite(gradient).all()
        assert np.isfinite(partial_kl_slope(student, target, 1.0, 0.0)).all()


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [4, 8])
def test_the_fused_head_computes_it_in_chunks(chunk: int) -> None:
    target = with_samples(known(TEACHER, k=K, temperature=2.0), TEACHER, count=6, temperature=2.0)
    features, kernel = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((TOKENS, 6), (6, VOCAB)))
    mask = jnp.asarray([True, True, False, True, True])
    labels = jnp.zeros(TOKENS, jnp.int32)

    def fused(features: jax.Array) -> jax.Array:
        loss = {"ce": HeadLoss(losses.DIVERGENCES["forward_kl"], mask, 0.7)}
        return fused_head(Head(features, kernel), target, labels, loss, temperature=2.0, chunk=chunk)[0]

    def dense(features: jax.Array) -> jax.Array:
        values = PARTIAL["forward_kl"].value(features @ kernel, target, 2.0, 0.0)
        return 0.7 * losses.masked_sum(values, mask)

    np.testing.assert_allclose(fused(features), dense(features), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(fused)(features), jax.grad(dense)(features), atol=1e-5)
