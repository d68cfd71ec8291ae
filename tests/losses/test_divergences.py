"""Every loss against NumPy in float64, by value and by gradient, and what a loss must be whatever the numbers."""

from collections.abc import Callable
from typing import Any

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill.losses import divergences as losses
from jaxdistill.losses import layers

SHAPE = (
    3,
    5,
    11,
)  # rows, tokens, vocabulary or width: the property tests keep it, so that each loss compiles once


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def np_forward_kl(s: np.ndarray, t: np.ndarray, temperature: float = 2.0) -> np.ndarray:
    p, q = softmax(t / temperature), softmax(s / temperature)
    return temperature**2 * (p * (np.log(p) - np.log(q))).sum(-1)


def np_kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * (np.log(a) - np.log(b))).sum(-1)


def np_reverse_kl(s: np.ndarray, t: np.ndarray) -> np.ndarray:
    return 4 * np_kl(softmax(s / 2), softmax(t / 2))


def np_jsd(s: np.ndarray, t: np.ndarray, beta: float) -> np.ndarray:
    p, q = softmax(t / 2), softmax(s / 2)
    middle = beta * p + (1 - beta) * q
    return 4 * (beta * np_kl(p, middle) + (1 - beta) * np_kl(q, middle)) / (beta * (1 - beta))


def np_skewed_kl(s: np.ndarray, t: np.ndarray, alpha: float = 0.1) -> np.ndarray:
    p, q = softmax(t / 2), softmax(s / 2)
    return 4 * np_kl(p, alpha * p + (1 - alpha) * q)


def np_total_variation(s: np.ndarray, t: np.ndarray) -> np.ndarray:
    return 2 / 2 * np.abs(softmax(s / 2) - softmax(t / 2)).sum(-1)


def np_cosine_distance(s: np.ndarray, t: np.ndarray) -> np.ndarray:
    return 1 - (s * t).sum(-1) / np.sqrt(((s**2).sum(-1) + 1e-12) * ((t**2).sum(-1) + 1e-12))


LABELS = np.random.default_rng(5).integers(0, SHAPE[-1], SHAPE[:2])


def np_cross_entropy(s: np.ndarray, t: np.ndarray) -> np.ndarray:
    return -np.log(np.take_along_axis(softmax(s), LABELS[..., None], -1)[..., 0])


# name -> (ours, NumPy's); both of (student, teacher), the labels of cross_entropy in the teacher's place.
LOSSES: dict[str, tuple[Callable, Callable]] = {
    "forward_kl": (jax.jit(lambda s, t: losses.forward_kl(s, t, temperature=2.0)), np_forward_kl),
    "reverse_kl": (jax.jit(lambda s, t: losses.reverse_kl(s, t, temperature=2.0)), np_reverse_kl),
    "symmetric_kl": (
        jax.jit(lambda s, t: losses.symmetric_kl(s, t, temperature=2.0)),
        lambda s, t: np_forward_kl(s, t) + np_reverse_kl(s, t),
    ),
    "jsd_half": (jax.jit(lambda s, t: losses.jsd(s, t, temperature=2.0, beta=0.5)), lambda s, t: np_jsd(s, t, 0.5)),
    "jsd_tenth": (jax.jit(lambda s, t: losses.jsd(s, t, temperature=2.0, beta=0.1)), lambda s, t: np_jsd(s, t, 0.1)),
    "skewed_kl": (jax.jit(lambda s, t: losses.skewed_kl(s, t, temperature=2.0, alpha=0.1)), np_skewed_kl),
    # KL(q || (1 - alpha) p + alpha q): the roles of the two exchanged.
    "skewed_reverse_kl": (
        jax.jit(lambda s, t: losses.skewed_reverse_kl(s, t, temperature=2.0, alpha=0.1)),
        lambda s, t: np_skewed_kl(t, s),
    ),
    "total_variation": (jax.jit(lambda s, t: losses.total_variation(s, t, temperature=2.0)), np_total_variation),
    "cross_entropy": (jax.jit(lambda s, t: losses.cross_entropy(s, jnp.asarray(LABELS))), np_cross_entropy),
    "logit_mse": (jax.jit(losses.logit_mse), lambda s, t: ((s - t) ** 2).sum(-1)),
    "hidden_mse": (jax.jit(layers.hidden_mse), lambda s, t: ((s - t) ** 2).mean(-1)),
    "cosine_distance": (jax.jit(layers.cosine_distance), np_cosine_distance),
}
DIVERGENCES = [name for name in LOSSES if name != "cross_entropy"]


def central_difference(f: Callable[[np.ndarray], np.ndarray], x: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """d sum(f(x)) / dx in float64, one last-axis entry at a time: a token's loss sees that token alone."""
    gradient = np.zeros_like(x)
    for i in range(x.shape[-1]):
        shift = np.zeros_like(x)
        shift[..., i] = step
        gradient[..., i] = (f(x + shift) - f(x - shift)) / (2 * step)
    return gradient


GRADIENTS = {name: jax.jit(jax.grad(lambda s, t, f=f: f(s, t).sum())) for name, (f, _) in LOSSES.items()}


def pair_of(scale: float, dtype: Any = np.float64) -> tuple[np.ndarray, np.ndarray]:
    """float32 numbers, held in `dtype`."""
    rng = np.random.default_rng(0)
    s, t = rng.normal(0, scale, (2, *SHAPE)).astype(np.float32).astype(dtype)
    return s, t


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_against_numpy(name: str, scale: float) -> None:
    s, t = pair_of(scale)
    ours, theirs = LOSSES[name]
    wanted = theirs(s, t)
    # 1 - cosine and a divergence of near distributions are small differences of numbers of size 1.
    np.testing.assert_allclose(ours(np.float32(s), np.float32(t)), wanted, rtol=1e-5, atol=2e-6)
    gradient = central_difference(lambda x: theirs(x, t), s)
    np.testing.assert_allclose(
        GRADIENTS[name](np.float32(s), np.float32(t)), gradient, rtol=1e-5, atol=1e-5 * np.abs(gradient).max()
    )


finite = st.floats(-50, 50, width=32)
arrays = hnp.arrays(np.float32, SHAPE, elements=finite)
temperatures = st.sampled_from([0.5, 1.0, 2.0, 8.0])
kl = jax.jit(lambda s, t, T: losses.forward_kl(s, t, temperature=T), static_argnums=2)
kl_gradient = jax.jit(jax.grad(lambda s, t, T: losses.forward_kl(s, t, temperature=T).sum()), static_argnums=2)
attention_kl = jax.jit(layers.attention_kl)
attention_gradient = jax.jit(jax.grad(lambda s, t, mask: layers.attention_kl(s, t, mask).sum()))


@given(arrays, arrays, temperatures)
@settings(max_examples=50, deadline=None)
def test_forward_kl_gradient_is_t_times_q_minus_p(s: np.ndarray, t: np.ndarray, temperature: float) -> None:
    p, q = (softmax(x.astype(np.float64) / temperature) for x in (t, s))
    np.testing.assert_allclose(kl_gradient(s, t, temperature), temperature * (q - p), rtol=0, atol=2e-5)


@given(arrays, temperatures)
@settings(max_examples=30, deadline=None)
def test_t_squared_is_the_only_scale(s: np.ndarray, temperature: float) -> None:
    """T^2 KL at T of logits is T^2 times KL at 1 of logits / T."""
    t = s[:, ::-1]
    np.testing.assert_allclose(
        kl(s, t, temperature),
        temperature**2 * kl(s / temperature, t / temperature, 1.0),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("name", DIVERGENCES)
@given(x=arrays, other=arrays)
@settings(max_examples=30, deadline=None)
def test_a_divergence_is_zero_at_equality_and_never_negative(name: str, x: np.ndarray, other: np.ndarray) -> None:
    # A vector of 0 has no direction: its cosine distance is 1, to itself as well.
    x = np.where(np.abs(x).max(-1, keepdims=True) < 0.1, np.float32(1.0), x)
    f = LOSSES[name][0]
    np.testing.assert_allclose(f(x, x), 0.0, atol=1e-6)
    assert np.asarray(f(x, other)).min() > -2e-5
    np.testing.assert_allclose(GRADIENTS[name](x, x), 0.0, atol=2e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_sees_a_difference(name: str) -> None:
    s, t = pair_of(1.0)
    assert np.asarray(LOSSES[name][0](np.float32(s), np.float32(t))).min() > 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_unreduced_and_float32_whatever_comes_in(name: str) -> None:
    s, t = (jnp.asarray(x, jnp.bfloat16) for x in pair_of(3.0))
    value = LOSSES[name][0](s, t)
    assert value.dtype == jnp.float32 and value.shape == SHAPE[:-1]
    # Not only the dtype: nothing is rounded to bfloat16's 8 bits on the way.
    exact = LOSSES[name][1](np.asarray(s, np.float64), np.asarray(t, np.float64))
    np.testing.assert_allclose(value, exact, rtol=1e-5, atol=2e-6)


def attention_maps(rng: np.random.Generator, *, heads: int, mask: np.ndarray) -> np.ndarray:
    scores = rng.normal(0, 2, (mask.shape[0], heads, mask.shape[1], mask.shape[1]))
    return softmax(np.where(mask[:, None, None, :], scores, -1e9)).astype(np.float32)


def np_attention_kl(s: np.ndarray, t: np.ndarray, mask: np.ndarray) -> np.ndarray:
    if s.shape[1] != t.shape[1]:
        s, t = s.mean(1, keepdims=True), t.mean(1, keepdims=True)
    keys = mask[:, None, None, :]
    ratio = np.log(np.where(keys, t, 1)) - np.log(np.where(keys, s, 1))
    return (np.where(keys, t, 0) * ratio).sum(-1).mean(1)


MASK = np.arange(6) < np.array([6, 4, 1])[:, None]


@pytest.mark.parametrize("heads", [(4, 4), (2, 6)])
def test_attention_kl_value_and_gradient(heads: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    s, t = (attention_maps(rng, heads=h, mask=MASK) for h in heads)
    s64, t64 = s.astype(np.float64), t.astype(np.float64)
    np.testing.assert_allclose(attention_kl(s, t, MASK), np_attention_kl(s64, t64, MASK), rtol=1e-5, atol=1e-6)
    gradient = attention_gradient(s, t, MASK)
    # d/ds = -t / s over the heads, of the heads' means where their numbers differ.
    if heads[0] != heads[1]:
        s64, t64 = s64.mean(1, keepdims=True), t64.mean(1, keepdims=True)
    wanted = np.where(MASK[:, None, None, :], -t64 / np.where(s64 > 0, s64, 1), 0) / heads[0]
    np.testing.assert_allclose(gradient, np.broadcast_to(wanted, s.shape), rtol=1e-4, atol=1e-6)


def test_attention_kl_is_a_divergence_and_ignores_padded_keys() -> None:
    rng = np.random.default_rng(1)
    s, t = (attention_maps(rng, heads=3, mask=MASK) for _ in range(2))
    np.testing.assert_allclose(attention_kl(s, s, MASK), 0, atol=1e-6)
    assert np.asarray(attention_kl(s, t, MASK))[:2].min() > 1e-3
    padded = ~MASK[:, None, None, :]
    junk = lambda x: np.where(padded, rng.random(x.shape, dtype=np.float32), x)  # noqa: E731
    np.testing.assert_array_equal(attention_kl(junk(s), junk(t), MASK), attention_kl(s, t, MASK))


def test_attention_kl_stays_finite_where_softmax_rounds_to_zero() -> None:
    s = np.zeros((1, 2, 3, 3), np.float32)
    s[..., 0] = 1  # one key has all of the student's attention
    t = np.full_like(s, 1 / 3)
    mask = np.ones((1, 3), bool)
    value, gradient = np.sum(attention_kl(s, t, mask)), attention_gradient(s, t, mask)
    assert np.isfinite(value) and value > 1 and np.isfinite(gradient).all()
    assert np.isfinite(attention_kl(t, s, mask)).all()  # and the other way round


@pytest.mark.parametrize("name", LOSSES)
def test_huge_values(name: str) -> None:
    """Logits of 1e4 and hidden states of 1e4 are far beyond any real model's."""
    s, t = (np.float32(1e4) * np.sign(x) for x in pair_of(1.0, dtype=np.float32))
    ours, theirs = LOSSES[name]
    value = np.asarray(ours(s, t))
    assert np.isfinite(value).all() and np.isfinite(GRADIENTS[name](s, t)).all()
    if name in ("logit_mse", "hidden_mse", "cosine_distance"):  # elsewhere NumPy's own softmax runs to 0
        np.testing.assert_allclose(value, theirs(s.astype(np.float64), t.astype(np.float64)), rtol=1e-5)


@pytest.mark.parametrize("name", losses.DIVERGENCES)
@pytest.mark.parametrize("both", [True, False])
def test_no_divergence_is_nan_with_a_word_ruled_out(name: str, both: bool) -> None:
    s, t = pair_of(1.0, dtype=np.float32)
    t[..., 3] = -np.inf
    if both:
        s[..., 3] = -np.inf
    loss = jax.jit(lambda s, t: losses.DIVERGENCES[name].value(s, t, 2.0, 0.1))
    value, gradient = loss(s, t), jax.grad(lambda s: loss(s, t).sum())(s)
    assert np.isfinite(value).all() and np.asarray(value).min() > 0 and np.isfinite(gradient).all()
    rest = [i for i in range(SHAPE[-1]) if i != 3]
    if both:  # as if the vocabulary did not have the word
        np.testing.assert_allclose(value, loss(s[..., rest], t[..., rest]), rtol=1e-4, atol=1e-5)
    else:
        assert np.asarray(gradient)[..., 3].min() > 0  # whatever the divergence, the word is pushed down


@pytest.mark.parametrize("beta", [1e-6, 1e-3, 1 - 1e-3, 1 - 1e-6])
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_jsd_is_continuous_at_its_ends(beta: float, scale: float) -> None:
    """As beta -> 0 it is the forward, as beta -> 1 the reverse KL, in value and gradient; unscaled it would be 0."""
    s, t = pair_of(scale)

    def at(beta: float) -> tuple[jax.Array, jax.Array]:
        loss = lambda s: losses.jsd(s, jnp.float32(t), temperature=2.0, beta=beta)  # noqa: E731
        return loss(jnp.float32(s)), jax.grad(lambda s: loss(s).sum())(jnp.float32(s))

    value, gradient = at(beta)
    np.testing.assert_allclose(value, np_jsd(s, t, beta), rtol=1e-5, atol=2e-6)
    if min(beta, 1 - beta) > 1e-5:  # nearer to an end, float64 differences of NumPy's are too coarse
        wanted = central_difference(lambda x: np_jsd(x, t, beta), s)
        np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
        return
    end, end_gradient = at(float(round(beta)))
    plain = losses.reverse_kl if beta > 0.5 else losses.forward_kl
    np.testing.assert_array_equal(end, plain(jnp.float32(s), jnp.float32(t), temperature=2.0))
    np.testing.assert_allclose(value, end, rtol=1e-3, atol=2e-6)
    np.testing.assert_allclose(gradient, end_gradient, rtol=0, atol=1e-3 * np.abs(end_gradient).max())


def test_skew_zero_is_no_skew() -> None:
    s, t = (jnp.asarray(x, jnp.float32) for x in pair_of(3.0))
    for skewed, plain in ((losses.skewed_kl, losses.forward_kl), (losses.skewed_reverse_kl, losses.reverse_kl)):
        np.testing.assert_array_equal(skewed(s, t, temperature=2.0, alpha=0.0), plain(s, t, temperature=2.0))
        np.testing.assert_allclose(
            skewed(s, t, temperature=2.0, alpha=1e-5), plain(s, t, temperature=2.0), rtol=1e-3, atol=1e-5
        )
        far = skewed(-30 * t, 30 * t, temperature=2.0, alpha=0.1)
        assert float(far.max()) <= 4 * np.log(10) * (1 + 1e-6)  # T^2 log(1 / alpha)


@pytest.mark.parametrize("name", losses.DIVERGENCES)
def test_a_gradient_keeps_its_size_as_the_temperature_grows(name: str) -> None:
    s, t = (jnp.asarray(x, jnp.float32) for x in pair_of(1.0))

    def size(temperature: float) -> float:
        loss = lambda s: losses.DIVERGENCES[name].value(s, t, temperature, 0.1).sum()  # noqa: E731
        return float(jnp.abs(jax.grad(loss)(s)).mean())

    assert size(40.0) == pytest.approx(size(20.0), rel=0.05)


@pytest.mark.parametrize("both", [True, False])
def test_a_word_ruled_out_by_minus_infinity_costs_nothing(both: bool) -> None:
    s, t = pair_of(1.0, dtype=np.float32)
    t[..., 3] = -np.inf
    if both:
        s[..., 3] = -np.inf
    value, gradient = kl(s, t, 2.0), kl_gradient(s, t, 2.0)
    p, q = softmax(t / 2), softmax(s / 2)
    assert np.isfinite(value).all() and np.asarray(value).min() > 0
    np.testing.assert_allclose(gradient, 2 * (q - p), atol=1e-5)
    if both:  # as if the vocabulary did not have the word
        rest = [i for i in range(SHAPE[-1]) if i != 3]
        np.testing.assert_allclose(value, np_forward_kl(s[..., rest], t[..., rest]), rtol=1e-4, atol=1e-5)


def test_a_word_the_student_alone_rules_out_costs_everything() -> None:
    s, t = pair_of(1.0, dtype=np.float32)
    s[..., 3] = -np.inf
    assert np.isposinf(kl(s, t, 2.0)).all()


@pytest.mark.parametrize("zero", ["student", "teacher", "both"])
def test_cosine_of_zero_vectors_is_finite(zero: str) -> None:
    s, t = pair_of(1.0, dtype=np.float32)
    s = np.zeros_like(s) if zero != "teacher" else s
    t = np.zeros_like(t) if zero != "student" else t
    np.testing.assert_allclose(LOSSES["cosine_distance"][0](s, t), 1.0, atol=1e-6)
    assert np.isfinite(GRADIENTS["cosine_distance"](s, t)).all()


masks = hnp.arrays(bool, SHAPE[:2])


@given(hnp.arrays(np.float32, SHAPE[:2], elements=finite), masks)
@settings(max_examples=30, deadline=None)
def test_masked_sum_sees_nothing_behind_the_mask(values: np.ndarray, mask: np.ndarray) -> None:
    junk, chosen = jnp.asarray(np.where(mask, values, np.float32(np.nan))), jnp.asarray(mask)
    wanted = values[mask].sum(dtype=np.float64)
    np.testing.assert_allclose(losses.masked_sum(junk, chosen), wanted, rtol=1e-5, atol=1e-3)
    np.testing.assert_array_equal(jax.grad(losses.masked_sum)(junk, chosen), mask.astype(np.float32))
