"""Losses against several teachers, in the fused and the dense head: values and gradients against NumPy in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.losses import terms
from jaxdistill.losses.divergences import DIVERGENCES, LOGIT_MSE, LogitLoss
from jaxdistill.losses.fused_head import HeadLoss, fused_head
from jaxdistill.losses.several import Several, mixture, resolved
from jaxdistill.losses.term import Objective, Signals
from jaxdistill.models.axes import ROWS
from jaxdistill.models.head import Head, logits, over_words
from jaxdistill.models.intercept import Outputs
from jaxdistill.models.pair import Mix, mix_of
from jaxdistill.models.settings import TeacherConfig
from jaxdistill.step import sharding

WORDS, T, SHARES, TOKENS = 13, 2.0, (0.5, 0.3, 0.2), (8, 3)
RNG = np.random.default_rng(0)
COUNTED = RNG.random(TOKENS) < 0.7
# What is computed by hand for one token: p and q are distributions at T, s and t logits.
KL = lambda a, b: (a * np.log(a / b)).sum()  # noqa: E731
BY_HAND: dict[str, Any] = {
    "forward_kl": lambda p, q: T**2 * KL(p, q),
    "reverse_kl": lambda p, q: T**2 * KL(q, p),
    "symmetric_kl": lambda p, q: T**2 * (KL(p, q) + KL(q, p)),
    "jsd": lambda p, q: T**2 / 0.21 * (0.3 * KL(p, 0.3 * p + 0.7 * q) + 0.7 * KL(q, 0.3 * p + 0.7 * q)),
    "skewed_kl": lambda p, q: T**2 * KL(p, 0.3 * p + 0.7 * q),
    "skewed_reverse_kl": lambda p, q: T**2 * KL(q, 0.7 * p + 0.3 * q),
    "total_variation": lambda p, q: T / 2 * np.abs(p - q).sum(),
}


def head(width: int, words: int, **kind: Any) -> Head:
    """A head as a model has it, of its own width and padded size, with its soft cap or scale."""
    kernel = RNG.normal(size=(words, width) if kind.get("tied") else (width, words))
    draw = [RNG.normal(size=(*TOKENS, width)), kernel, RNG.normal(size=words)]
    return over_words(Head(*(jnp.asarray(x, jnp.float32) for x in draw), **kind), WORDS)


STUDENT = head(5, WORDS + 2, scale=0.7)
TEACHERS = head(6, WORDS, cap=3.0), head(7, WORDS + 3, tied=True), head(4, WORDS + 1, scale=2.0)


def by_hand(features: np.ndarray, name: str, combine: str) -> float:
    """The sum over the counted tokens, from probabilities written out in float64."""

    def of_head(one: Head, features: Any) -> np.ndarray:
        kernel = np.asarray(one.kernel, np.float64)
        values = np.asarray(features, np.float64) @ (kernel.T if one.tied else kernel) + np.asarray(one.bias)
        values *= one.scale
        return one.cap * np.tanh(values / one.cap) if one.cap else values

    def softmax(x: np.ndarray) -> np.ndarray:
        return np.exp(x / T) / np.exp(x / T).sum()

    total = 0.0
    s, ts = of_head(STUDENT, features), [of_head(one, one.features) for one in TEACHERS]
    for at in np.argwhere(COUNTED):
        row = tuple(at)
        q, ps = softmax(s[row]), [softmax(t[row]) for t in ts]
        if name == "logit_mse":
            total += sum(w * ((s[row] - t[row]) ** 2).sum() for w, t in zip(SHARES, ts, strict=True))
        elif combine == "probabilities":
            total += BY_HAND[name](sum(w * p for w, p in zip(SHARES, ps, strict=True)), q)
        else:
            total += sum(w * BY_HAND[name](p, q) for w, p in zip(SHARES, ps, strict=True))
    return total


def loss_of(name: str) -> LogitLoss:
    return LOGIT_MSE if name == "logit_mse" else DIVERGENCES[name]


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def fused(student: Head, target: Several, name: str, chunk: int, mesh: Any = None) -> Any:
    def total(student: Head) -> Any:
        losses = {"one": HeadLoss(loss_of(name), jnp.asarray(COUNTED), 1.0)}
        labels = jnp.zeros(TOKENS, jnp.int32)
        return fused_head(student, target, labels, losses, temperature=T, beta=0.3, chunk=chunk, mesh=mesh)[0]

    return jax.value_and_grad(total)(student)


@functools.partial(jax.jit, static_argnums=2)
def dense(student: Head, target: Several, name: str) -> Any:
    def total(student: Head) -> Any:
        of_teachers = Several(tuple(logits(one) for one in target.targets), target.mix)
        loss, against = resolved(loss_of(name), of_teachers, words=WORDS, temperature=T)
        return jnp.where(COUNTED, loss.value(logits(student), against, T, 0.3), 0.0).sum()

    return jax.value_and_grad(total)(student)


CASES = [("reverse_kl", "probabilities"), ("jsd", "losses"), ("logit_mse", "losses")]
OTHERS = [(name, "probabilities") for name in BY_HAND if name != "reverse_kl"]


@pytest.mark.parametrize(
    ("name", "combine"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)]
)
def test_value_and_gradient_of_both_heads(name: str, combine: Any) -> None:
    """The gradient in features by differences of what is written out by hand."""
    target = Several(TEACHERS, Mix(SHARES, combine))
    features = np.asarray(STUDENT.features, np.float64)
    wanted = by_hand(features, name, combine)
    value, gradient = fused(STUDENT, target, name, 5)
    other, gradient_of_dense = dense(STUDENT, target, name)
    np.testing.assert_allclose([value, other], wanted, rtol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradient, gradient_of_dense)
    for _ in range(3):
        step = RNG.normal(size=features.shape)
        slope = (by_hand(features + 1e-5 * step, name, combine) - by_hand(features - 1e-5 * step, name, combine)) / 2e-5
        np.testing.assert_allclose((gradient.features * step).sum(), slope, rtol=1e-4, atol=1e-4)


def test_of_the_forward_kl_both_ways_have_one_gradient_and_of_the_reverse_they_have_not() -> None:
    both = [Several(TEACHERS, Mix(SHARES, combine)) for combine in ("losses", "probabilities")]
    (mean, of_mean), (mixed, of_mixed) = (fused(STUDENT, one, "forward_kl", 24) for one in both)
    np.testing.assert_allclose(of_mean.features, of_mixed.features, atol=1e-5)
    assert mean > mixed + 0.1  # by what the teachers differ among themselves
    (_, of_mean), (_, of_mixed) = (fused(STUDENT, one, "reverse_kl", 24) for one in both)
    assert np.abs(of_mean.features - of_mixed.features).max() > 0.01


def test_a_mesh_changes_nothing() -> None:
    target = Several(TEACHERS, Mix(SHARES, "probabilities"))
    mesh = sharding.make_mesh(data=4, fsdp=2)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(ROWS))
    whole = sharding.replicated(mesh)

    def placed(one: Head) -> Head:
        put = jax.device_put(one._replace(features=None), whole)
        return put._replace(features=jax.device_put(one.features, rows))

    there = Several(tuple(placed(one) for one in TEACHERS), target.mix)
    found, wanted = fused(placed(STUDENT), there, "jsd", 2, mesh), fused(STUDENT, target, "jsd", 24)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, wanted)


@pytest.mark.parametrize("combine", ["losses", "probabilities"])
def test_a_teacher_that_stands_twice_counts_once(combine: Any) -> None:
    twice = Several((TEACHERS[0],) * 2, Mix((0.25, 0.75), combine))
    found, wanted = fused(STUDENT, twice, "skewed_kl", 24), fused(STUDENT, TEACHERS[0], "skewed_kl", 24)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, wanted)


def test_a_mixture_is_a_distribution_and_rules_out_what_all_rule_out() -> None:
    """Of words that one teacher alone rules out, the others' share stays."""
    both = jnp.asarray(RNG.normal(size=(2, 4, WORDS)), jnp.float32).at[:, :, 0].set(-jnp.inf).at[0, :, 1].set(-jnp.inf)
    mixed = mixture(list(both), (0.25, 0.75), temperature=T)
    p = 0.25 * jax.nn.softmax(both[0] / T) + 0.75 * jax.nn.softmax(both[1] / T)
    np.testing.assert_allclose(jax.nn.softmax(mixed / T), p, atol=1e-7)
    np.testing.assert_allclose(jax.nn.logsumexp(mixed / T, axis=-1), 0, atol=1e-6)
    student = jnp.asarray(RNG.normal(size=(4, WORDS)), jnp.float32)
    against = lambda s: [(x.value(s, mixed, T, 0.3), x.slope(s, mixed, T, 0.3)) for x in DIVERGENCES.values()]  # noqa: E731
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.jit(against)(student)))


def test_the_objective_weighs_the_losses_that_see_all_teachers() -> None:
    masks = dict.fromkeys(("tokens", "head", "labels"), jnp.asarray(COUNTED))
    objective = Objective({"ce": 2.0}, T, "all", (), "reverse_kl", mix=Mix(SHARES, "losses"))
    target: Any = Several(tuple(logits(one) for one in TEACHERS), objective.mix or Mix(()))
    outputs = [Outputs(x, (), ()) for x in (logits(STUDENT), target)]
    loss, means = terms.weighted_sum(
        objective, Signals(*outputs, jnp.zeros(TOKENS, jnp.int32), masks, {}), terms.token_counts(masks)
    )
    wanted = by_hand(np.asarray(STUDENT.features), "reverse_kl", "losses") / COUNTED.sum()
    np.testing.assert_allclose([loss, means["ce"]], [2 * wanted, wanted], rtol=2e-6)


def test_shares_add_up_to_1() -> None:
    of = lambda **values: mix_of(TeacherConfig(name="a", **values))  # noqa: E731
    assert of() is None and of(weights=(3.0,)) is None
    assert of(also=("b", "c")) == Mix((1 / 3,) * 3)
    assert of(also=("a",), weights=(3.0, 1.0), combine="probabilities") == Mix((0.75, 0.25), "probabilities")
    assert mix_of(TeacherConfig(cache=("a", "b"))) == Mix((0.5, 0.5)) and mix_of(TeacherConfig(cache=("a",))) is None
