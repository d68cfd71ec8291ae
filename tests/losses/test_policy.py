"""The policy gradient against loops in float64 (values by NumPy, gradients by torch), and against the exact gradient.

The proof is in the second half: over every text of a small vocabulary the expected gradient of `policy_loss` is the
gradient of KL(q || p). The names of tests say which defect of the reference implementation each would catch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxdistill.losses import divergences as losses
from jaxdistill.losses import policy

ROWS, LENGTH, VOCAB, WIDTH = 4, 6, 7, 5
# From the start, in the middle, one token, none at all.
MASK = np.array([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], bool)
SPANS = [(0, 4), (2, 6), (1, 2), (0, 0)]
LABELS = np.array([[2, 5, 2, 2, 6, 6], [1, 1, 3, 4, 3, 0], [6, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])


def normal(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    """float32 numbers, held in float64: what is compared differs by arithmetic alone."""
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32).astype(np.float64)


STUDENT, TEACHER = normal(0, ROWS, LENGTH, VOCAB, scale=1.5), normal(1, ROWS, LENGTH, VOCAB, scale=1.5)
ADVANTAGES, WEIGHTS = normal(2, ROWS, LENGTH, scale=2.0), np.abs(normal(3, ROWS, LENGTH)) / 2 + 0.5
EMBEDDING = normal(4, VOCAB, WIDTH)


def settings_of(semantics: Any, **changes: Any) -> policy.PolicyConfig:
    return policy.PolicyConfig(semantics=semantics, **changes)


def np_log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def np_at(logits: np.ndarray, labels: np.ndarray = LABELS) -> np.ndarray:
    return np.take_along_axis(np_log_softmax(logits), labels[..., None], -1)[..., 0]


OLD_LOG_Q = (np_at(STUDENT) + normal(5, ROWS, LENGTH, scale=0.3)).astype(np.float32).astype(np.float64)


def f32(*arrays: np.ndarray) -> Any:
    out = tuple(jnp.asarray(x, jnp.float32) for x in arrays)
    return out[0] if len(out) == 1 else out


def masked_mean(values: jax.Array, mask: np.ndarray = MASK) -> jax.Array:
    return losses.masked_sum(values, jnp.asarray(mask)) / mask.sum()


def by_torch(f: Callable[[torch.Tensor], torch.Tensor], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(f(x), d sum(f(x)) / dx) in float64."""
    tensor = torch.tensor(x, requires_grad=True)
    value = f(tensor)
    value.sum().backward()
    assert tensor.grad is not None
    return value.detach().numpy(), tensor.grad.numpy()


def agree(ours: Callable[[jax.Array], jax.Array], theirs: Callable[[torch.Tensor], torch.Tensor], x: np.ndarray):
    wanted, wanted_gradient = by_torch(theirs, x)
    value = jax.jit(ours)(f32(x))
    assert value.dtype == jnp.float32 and value.shape == (ROWS, LENGTH)
    np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=2e-6)
    gradient = jax.jit(jax.grad(lambda x: ours(x).sum()))(f32(x))
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-5, atol=1e-5 * np.abs(wanted_gradient).max())
    assert np.abs(wanted_gradient).max() > 1e-3  # the comparison is not of nothing with nothing


# Each function against its formula, written as a loop


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_token_log_probs(scale: float) -> None:
    labels = torch.tensor(LABELS)[..., None]
    agree(
        lambda x: policy.token_log_probs(x, jnp.asarray(LABELS)),
        lambda x: torch.log_softmax(x, -1).gather(-1, labels)[..., 0].clamp(min=losses.LOG_TINY),
        (STUDENT * scale).astype(np.float32).astype(np.float64),
    )


def test_a_word_ruled_out_has_a_finite_log_probability() -> None:
    logits = jnp.where(jnp.arange(VOCAB) == 3, -jnp.inf, jnp.zeros((1, 2, VOCAB)))
    labels = jnp.array([[3, 2]])
    np.testing.assert_allclose(policy.token_log_probs(logits, labels), [[losses.LOG_TINY, -np.log(6)]], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: policy.token_log_probs(x, labels).sum())(logits)).all()


def test_rewards_are_numbers_without_a_gradient() -> None:
    """The reference lets the gradient of the student flow through r."""
    log_p, log_q = f32(np_at(TEACHER), np_at(STUDENT))
    np.testing.assert_allclose(policy.rewards(log_p, log_q), np_at(TEACHER) - np_at(STUDENT), rtol=1e-5, atol=2e-6)
    for i in range(2):
        gradient = jax.grad(lambda p, q: policy.rewards(p, q).sum(), argnums=i)(log_p, log_q)
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("alpha", [0.0, 1e-3, 0.2, 0.9, 1.0])
def test_importance_weights(alpha: float) -> None:
    """Of size 1: the reference adds 1e10 to the denominator, whose weights are of size 1e-10."""
    p, q = np.exp(np_at(TEACHER)), np.exp(np_at(STUDENT))
    weights = policy.importance_weights(*f32(np.log(p), np.log(q)), alpha=alpha)
    np.testing.assert_allclose(weights, q / (alpha * p + (1 - alpha) * q), rtol=1e-5)
    if alpha == 0:
        np.testing.assert_array_equal(weights, 1)
    for i in range(2):
        gradient = jax.grad(lambda a, b: policy.importance_weights(a, b, alpha=alpha).sum(), argnums=i)
        np.testing.assert_array_equal(gradient(*f32(np.log(p), np.log(q))), 0)


@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_importance_weights_far_apart(alpha: float) -> None:
    far, near = f32(np.full((1, 2), losses.LOG_TINY), np.zeros((1, 2)))
    np.testing.assert_allclose(policy.importance_weights(far, near, alpha=alpha), 1 / (1 - alpha), rtol=1e-6)
    np.testing.assert_allclose(policy.importance_weights(near, far, alpha=alpha), float(alpha == 0), atol=1e-30)


def np_advantages(r: np.ndarray, mask: np.ndarray, *, semantics: str, length_norm: bool = True) -> np.ndarray:
    out = np.zeros_like(r)
    for b in range(r.shape[0]):
        steps = np.flatnonzero(mask[b])
        for k, t in enumerate(steps):
            if semantics == "paper":
                after = r[b, steps[k + 1 :]]
                out[b, t] = after.sum() / (max(len(after), 1) if length_norm else 1)
            else:
                scaled = np.clip(r[b, steps[k:]] / 0.5, -3, 3)
                out[b, t] = (scaled * 0.95 ** np.arange(len(scaled))).sum() / len(scaled)
    if semantics == "lmops":
        chosen = out[mask]
        out[mask] = (chosen - chosen.mean()) / np.sqrt(chosen.var() + 1e-8)
    return out


@pytest.mark.parametrize("semantics, length_norm", [("paper", True), ("paper", False), ("lmops", True)])
def test_advantages(semantics: Any, length_norm: bool) -> None:
    r = normal(6, ROWS, LENGTH, scale=2.0)
    settings = settings_of(semantics, length_norm=length_norm, reward_clip=3.0)
    ours = jax.jit(lambda r: policy.advantages(r, jnp.asarray(MASK), settings))
    wanted = np_advantages(r, MASK, semantics=semantics, length_norm=length_norm)
    np.testing.assert_allclose(ours(f32(r)), wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(ours(f32(r)))[~MASK], 0)
    np.testing.assert_array_equal(jax.grad(lambda r: ours(r).sum())(f32(r)), 0)  # a number, as the reward is
    # Padding is not the row's future: the reference's texts run on into it.
    np.testing.assert_array_equal(ours(f32(np.where(MASK, r, np.nan))), ours(f32(r)))


def test_the_papers_advantage_by_hand() -> None:
    r, mask = jnp.array([[1.0, 2.0, 4.0, 100.0]]), jnp.array([[True, True, True, False]])
    plain = policy.advantages(r, mask, settings_of("paper", length_norm=False))
    np.testing.assert_array_equal(plain, [[6, 4, 0, 0]])  # without the token's own reward; nothing after the last
    np.testing.assert_array_equal(policy.advantages(r, mask, settings_of("paper")), [[3, 4, 0, 0]])


def test_whitening_does_not_depend_on_padding() -> None:
    r, wide = normal(7, 2, 4), ((0, 0), (0, 9))
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)
    narrow = policy.advantages(f32(r), jnp.asarray(mask), settings_of("lmops"))
    padded = policy.advantages(f32(np.pad(r, wide)), jnp.asarray(np.pad(mask, wide)), settings_of("lmops"))
    np.testing.assert_allclose(padded[:, :4], narrow, rtol=1e-6)
    chosen = np.asarray(narrow, np.float64)[mask]
    assert chosen.mean() == pytest.approx(0, abs=1e-6) and chosen.std() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("mask", [np.zeros((2, 3), bool), np.eye(2, 3, dtype=bool)[:1].repeat(2, 0)])
@pytest.mark.parametrize("semantics", ["paper", "lmops"])
def test_advantages_of_hardly_anything_are_zero(semantics: Any, mask: np.ndarray) -> None:
    np.testing.assert_array_equal(policy.advantages(jnp.ones((2, 3)), jnp.asarray(mask), settings_of(semantics)), 0)


def loss_of(
    logits: jax.Array,
    *,
    clip: float,
    semantics: Any,
    single_step: bool = True,
    teacher: np.ndarray = TEACHER,
    labels: np.ndarray = LABELS,
    advantages: np.ndarray = ADVANTAGES,
    old_log_q: np.ndarray = OLD_LOG_Q,
    weights: np.ndarray = WEIGHTS,
) -> jax.Array:
    return policy.policy_loss(
        logits,
        f32(teacher),
        jnp.asarray(labels),
        jnp.asarray(MASK),
        advantages=f32(advantages),
        old_log_q=f32(old_log_q),
        weights=f32(weights),
        settings=settings_of(semantics, clip=clip, single_step=single_step),
    )


@pytest.mark.parametrize("single_step", [True, False])
@pytest.mark.parametrize("clip", [0.0, 0.2])
@pytest.mark.parametrize("semantics", ["paper", "lmops"])
def test_policy_loss(semantics: Any, clip: float, single_step: bool) -> None:
    """KL(q || p) of one softmax each, over the vocabulary: the reference's has two, and a mean over the batch alone."""
    a, w, old, log_p = (torch.tensor(x) for x in (ADVANTAGES, WEIGHTS, OLD_LOG_Q, np_log_softmax(TEACHER)))

    def theirs(x: torch.Tensor) -> torch.Tensor:
        log_q, rows = torch.log_softmax(x, -1), []
        for b in range(ROWS):
            row = []
            for t in range(LENGTH):
                value = torch.zeros((), dtype=torch.float64)
                if MASK[b, t]:
                    rho = w[b, t] * torch.exp(log_q[b, t, LABELS[b, t]] - old[b, t])
                    value = -rho * a[b, t]
                    if clip:
                        value = -torch.min(rho * a[b, t], rho.clamp(1 - clip, 1 + clip) * a[b, t])
                    if single_step:
                        kl = (log_q[b, t].exp() * (log_q[b, t] - log_p[b, t])).sum()
                        value = value + (w[b, t] if semantics == "paper" else 1.0) * kl
                row.append(value)
            rows.append(torch.stack(row))
        return torch.stack(rows)

    ours = lambda x: loss_of(x, clip=clip, semantics=semantics, single_step=single_step)  # noqa: E731
    agree(ours, theirs, STUDENT)
    np.testing.assert_array_equal(np.asarray(ours(f32(STUDENT)))[~MASK], 0)


def test_the_gradient_at_the_sampling_policy_is_the_score_times_weight_and_advantage() -> None:
    """-w A grad log q(y), of the size of A: the reference's 1e10 in the denominator leaves 1e-10 of it."""
    gradient = jax.grad(
        lambda x: loss_of(x, clip=0.0, semantics="paper", single_step=False, old_log_q=np_at(STUDENT)).sum()
    )(f32(STUDENT))
    score = np.eye(VOCAB)[LABELS] - np.exp(np_log_softmax(STUDENT))
    wanted = np.where(MASK, -WEIGHTS * ADVANTAGES, 0)[..., None] * score
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-5)
    assert np.abs(gradient).max() > 0.1


def test_clip_removes_the_gradient_on_one_side() -> None:
    """As documented: at the sampling policy already, where w is outside the range and A pulls further outside."""
    gradient = jax.grad(
        lambda x: loss_of(x, clip=0.2, semantics="paper", single_step=False, old_log_q=np_at(STUDENT)).sum()
    )(f32(STUDENT))
    size = np.abs(gradient).max(-1)
    cut = MASK & (((WEIGHTS > 1.2) & (ADVANTAGES > 0)) | ((WEIGHTS < 0.8) & (ADVANTAGES < 0)))
    assert cut.any() and (MASK & ~cut).any()
    np.testing.assert_array_equal(size[cut | ~MASK], 0)
    assert size[MASK & ~cut].min() > 1e-3


def test_nothing_but_the_students_logits_has_a_gradient() -> None:
    def loss(teacher, a, old, w):
        return policy.policy_loss(
            f32(STUDENT), teacher, jnp.asarray(LABELS), jnp.asarray(MASK),
            advantages=a, old_log_q=old, weights=w, settings=settings_of("paper"),
        ).sum()  # fmt: skip

    for gradient in jax.grad(loss, argnums=(0, 1, 2, 3))(*f32(TEACHER, ADVANTAGES, OLD_LOG_Q, WEIGHTS)):
        np.testing.assert_array_equal(gradient, 0)


def test_repetition_penalty() -> None:
    """Differentiable counts: the reference counts argmax ids, which have no gradient."""

    def theirs(x: torch.Tensor) -> torch.Tensor:
        q, rows = torch.softmax(x, -1), []
        for b, (start, end) in enumerate(SPANS):
            row = [torch.zeros((), dtype=torch.float64)] * LENGTH
            counts = torch.zeros(VOCAB, dtype=torch.float64)
            for t in range(start, end):
                row[t] = (q[b, t] * counts).sum() / max(t - start, 1)
                counts = counts + torch.eye(VOCAB, dtype=torch.float64)[LABELS[b, t]]
            rows.append(torch.stack(row))
        return torch.stack(rows)

    agree(lambda x: policy.repetition_penalty(x, jnp.asarray(LABELS), jnp.asarray(MASK)), theirs, STUDENT)


def test_repetition_penalty_is_one_for_one_word_again_and_again() -> None:
    logits, mask = 100.0 * jax.nn.one_hot(jnp.full((1, 4), 3), VOCAB), jnp.ones((1, 4), bool)
    value = policy.repetition_penalty(logits, jnp.full((1, 4), 3), mask)
    np.testing.assert_allclose(value, [[0, 1, 1, 1]], atol=1e-6)


@pytest.mark.parametrize("target", [0.8, 5.0])
def test_diversity_penalty(target: float) -> None:
    """No saturation: the reference clamps distances of log probabilities to 1, where the gradient is 0."""
    table = torch.tensor(EMBEDDING)

    def theirs(x: torch.Tensor) -> torch.Tensor:
        e, rows = torch.softmax(x, -1) @ table, []
        for b, (start, end) in enumerate(SPANS):
            row = [torch.zeros((), dtype=torch.float64)] * LENGTH
            for t in range(start, end) if end - start > 1 else ():
                others = [1 - torch.cosine_similarity(e[b, t], e[b, j], 0) for j in range(start, end) if j != t]
                row[t] = torch.relu(target - torch.stack(others).mean())
            rows.append(torch.stack(row))
        return torch.stack(rows)

    def ours(x: jax.Array) -> jax.Array:
        return policy.diversity_penalty(x, jnp.asarray(MASK), embedding=f32(EMBEDDING), target=target)

    agree(ours, theirs, STUDENT)
    # Every sampled position below the target has a gradient, however large the logits' distance.
    value = np.asarray(ours(f32(STUDENT)))
    size = np.abs(jax.grad(lambda x: ours(x).sum())(f32(STUDENT))).max(-1)
    assert size[MASK & (value > 0)].min() > 1e-4
    assert (value[:2][MASK[:2]] > 0).all() == (target == 5.0)


def test_diversity_penalty_is_finite_where_a_vector_is_zero_and_leaves_the_embedding_alone() -> None:
    mask = jnp.asarray(MASK)
    loss = lambda x, e: policy.diversity_penalty(x, mask, embedding=e, target=1.0).sum()  # noqa: E731
    for table in (np.zeros((VOCAB, WIDTH)), np.ones((VOCAB, WIDTH))):
        value, gradient = jax.value_and_grad(loss)(f32(STUDENT), f32(table))
        assert np.isfinite(value) and np.isfinite(gradient).all()
    np.testing.assert_array_equal(jax.grad(loss, argnums=1)(*f32(STUDENT, EMBEDDING)), 0)


@pytest.mark.parametrize("target", [1.4, 5.0])
def test_entropy_penalty(target: float) -> None:
    """H and not |log of a negative|: the reference's is NaN."""
    mask = torch.tensor(MASK)

    def theirs(x: torch.Tensor) -> torch.Tensor:
        log_q = torch.log_softmax(x, -1)
        return torch.where(mask, torch.relu(target + (log_q.exp() * log_q).sum(-1)), 0.0)

    agree(lambda x: policy.entropy_penalty(x, jnp.asarray(MASK), target=target), theirs, STUDENT)


def test_entropy_penalty_of_certainty_and_of_a_word_ruled_out_is_finite() -> None:
    logits = np.zeros((1, 3, VOCAB), np.float32)
    logits[0, 0, 2], logits[0, 1, 3] = 1e4, -np.inf
    penalty = lambda x: policy.entropy_penalty(x, jnp.ones((1, 3), bool), target=2.0)  # noqa: E731
    np.testing.assert_allclose(penalty(f32(logits)), [[2, 2 - np.log(6), 2 - np.log(7)]], rtol=1e-5)
    assert np.isfinite(jax.grad(lambda x: penalty(x).sum())(f32(logits))).all()


@pytest.mark.slow
def test_statistics_and_figures() -> None:
    log_p, log_q = np_at(TEACHER), np_at(STUDENT)
    arrays = {"log_p": log_p, "log_q": log_q, "old_log_q": OLD_LOG_Q, "weights": WEIGHTS}

    def sums(rows: slice, junk: float = 0.0) -> dict[str, jax.Array]:
        given = {name: f32(np.where(MASK, x, junk)[rows]) for name, x in arrays.items()}
        labels = np.where(MASK, LABELS, -100 if junk else 0)[rows]
        return policy.statistics(jnp.asarray(labels), jnp.asarray(MASK[rows]), clip=0.2, **given)

    rho = (WEIGHTS * np.exp(log_q - OLD_LOG_Q))[MASK]
    w, n = WEIGHTS[MASK], MASK.sum()
    wanted = {
        "effective_sample_size": w.sum() ** 2 / (n * (w**2).sum()),
        "clip_fraction": ((rho < 0.8) | (rho > 1.2)).mean(),
        "repetition_rate": 3 / 9,  # 2 5 2 2 | 3 4 3 0 | 1
        "reward": (log_p - OLD_LOG_Q)[MASK].mean(),
        "length": 9 / 3,  # the row without a sample is none
    }
    assert 0 < wanted["clip_fraction"] < 1
    whole = sums(slice(None))
    parts = [sums(slice(0, 1)), sums(slice(1, 4))]
    added = {name: parts[0][name] + parts[1][name] for name in whole}
    for each in (whole, added, sums(slice(None), junk=np.nan)):
        got = policy.figures(each)
        assert list(got) == list(wanted)
        np.testing.assert_allclose([got[k] for k in wanted], list(wanted.values()), rtol=1e-5)


def test_figures_of_equal_weights_and_of_nothing() -> None:
    zeros, labels = jnp.zeros((2, 3)), jnp.zeros((2, 3), int)

    def of(mask: jax.Array) -> dict[str, jax.Array]:
        given = {"log_p": zeros, "log_q": zeros, "old_log_q": zeros, "weights": zeros + 0.5}
        return policy.figures(policy.statistics(labels, mask, clip=0.0, **given))

    some = of(jnp.ones((2, 3), bool))
    assert some["effective_sample_size"] == 1 and some["clip_fraction"] == 0  # clip = 0: nothing is clipped
    assert all(float(x) == 0 for x in of(jnp.zeros((2, 3), bool)).values())


# The mask


def everything(student: jax.Array, teacher: jax.Array, labels: jax.Array, semantics: Any) -> jax.Array:
    """From logits to the masked mean, with all terms."""
    mask = jnp.asarray(MASK)
    log_p, log_q = (policy.token_log_probs(x, labels) for x in (teacher, student))
    weights = policy.importance_weights(log_p, log_q, alpha=0.2)
    r = policy.rewards(log_p, log_q)
    loss = policy.policy_loss(
        student, teacher, labels, mask,
        advantages=policy.advantages(r, mask, settings_of(semantics)),
        old_log_q=jax.lax.stop_gradient(log_q), weights=weights, settings=settings_of(semantics),
    )  # fmt: skip
    penalties = (
        policy.repetition_penalty(student, labels, mask),
        policy.diversity_penalty(student, mask, embedding=f32(EMBEDDING), target=1.0),
        policy.entropy_penalty(student, mask, target=2.0),
    )
    return masked_mean(sum(penalties, loss))


@pytest.mark.parametrize("semantics", ["paper", "lmops"])
def test_what_is_masked_out_changes_neither_value_nor_gradient(semantics: Any) -> None:
    """The reference trains on its padding. Here it may be anything: other numbers, NaN, labels out of range."""
    f = jax.jit(jax.value_and_grad(lambda s, t, labels: everything(s, t, labels, semantics)))
    value, gradient = f(*f32(STUDENT, TEACHER), jnp.asarray(LABELS))
    assert np.isfinite(value) and np.isfinite(gradient).all()
    np.testing.assert_array_equal(np.asarray(gradient)[~MASK], 0)
    assert np.abs(np.asarray(gradient)[MASK]).max(-1).min() > 1e-4
    for junk, label in ((1e4, 6), (np.nan, -100), (-np.inf, VOCAB + 9)):
        s, t = (np.where(MASK[..., None], x, junk) for x in (STUDENT, TEACHER))
        other, other_gradient = f(*f32(s, t), jnp.asarray(np.where(MASK, LABELS, label)))
        np.testing.assert_array_equal(other, value)
        np.testing.assert_array_equal(other_gradient, gradient)


def test_float32_whatever_comes_in() -> None:
    student, teacher = (jnp.asarray(x, jnp.bfloat16) for x in (STUDENT, TEACHER))
    labels = jnp.asarray(LABELS)
    exact = everything(student.astype(jnp.float32), teacher.astype(jnp.float32), labels, "paper")
    np.testing.assert_allclose(everything(student, teacher, labels, "paper"), exact, rtol=1e-6)


# The proof: a policy whose logits are a table over all prefixes, and every text there is

WORDS, STEPS = 5, 3
PREFIXES = sum(WORDS**i for i in range(STEPS))  # 1 + 5 + 25
TEXTS = np.stack(np.meshgrid(*[np.arange(WORDS)] * STEPS, indexing="ij"), -1).reshape(-1, STEPS)
Q_TABLE, P_TABLE = normal(8, PREFIXES, WORDS), normal(9, PREFIXES, WORDS)


def prefix_of(texts: np.ndarray) -> np.ndarray:
    """The table's row for the prefix before each token."""
    rows = np.zeros_like(texts)
    for t in range(1, texts.shape[1]):
        code = np.zeros(len(texts), texts.dtype)
        for i in range(t):
            code = code * WORDS + texts[:, i]
        rows[:, t] = sum(WORDS**i for i in range(t)) + code
    return rows


def until_end(texts: np.ndarray, *, end: bool) -> np.ndarray:
    """True up to the first 0, the end token, and that included; everywhere where there is no end token."""
    ended = np.cumsum(texts == 0, axis=1) - (texts == 0)
    return ended == 0 if end else np.ones_like(texts, bool)


def exact_gradient(texts: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """d KL(q || p) / d table, from the sum over all texts of q log(q / p); tokens after an end sum to 1."""
    rows = torch.tensor(prefix_of(texts))
    words, kept = torch.tensor(texts)[..., None], torch.tensor(mask)

    def at(table: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(table, -1)[rows].gather(-1, words)[..., 0]

    def kl(table: torch.Tensor) -> torch.Tensor:
        log_q, log_p = at(table), at(torch.tensor(P_TABLE))
        return (log_q.sum(1).exp() * ((log_q - log_p) * kept).sum(1)).sum()

    return by_torch(kl, Q_TABLE)[1]


def estimate(table: jax.Array, texts: jax.Array, rows: jax.Array, mask: jax.Array, alpha: float) -> jax.Array:
    """`policy_loss` of each text, summed over its tokens: no clip, no length norm."""
    student, teacher = table[rows], f32(P_TABLE)[rows]
    log_p, log_q = (jax.lax.stop_gradient(policy.token_log_probs(x, texts)) for x in (teacher, student))
    a = policy.advantages(policy.rewards(log_p, log_q), mask, settings_of("paper", length_norm=False))
    weights = policy.importance_weights(log_p, log_q, alpha=alpha)
    loss = policy.policy_loss(
        student,
        teacher,
        texts,
        mask,
        advantages=a,
        old_log_q=log_q,
        weights=weights,
        settings=settings_of("paper", clip=0.0),
    )
    return loss.sum(1)


def gradient_of_estimate(texts: np.ndarray, mask: np.ndarray, share: np.ndarray, alpha: float = 0.0) -> np.ndarray:
    arrays = jnp.asarray(texts), jnp.asarray(prefix_of(texts)), jnp.asarray(mask)
    return jax.jit(jax.grad(lambda x: jnp.sum(f32(share) * estimate(x, *arrays, alpha))))(f32(Q_TABLE))


def token_shares(texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(p, q) of each token given its prefix."""
    p, q = (np_at(table[prefix_of(texts)], texts) for table in (P_TABLE, Q_TABLE))
    return np.exp(p), np.exp(q)


@pytest.mark.parametrize("end", [False, True])
def test_the_expected_gradient_is_that_of_the_reverse_kl_of_texts(end: bool) -> None:
    """Also where a text has an end; r_t counted twice, or a future that is the padding's, would break it."""
    mask = until_end(TEXTS, end=end)
    q = token_shares(TEXTS)[1].prod(1)
    assert q.sum() == pytest.approx(1)
    wanted = exact_gradient(TEXTS, mask)
    assert np.abs(wanted).max() > 0.05
    np.testing.assert_allclose(gradient_of_estimate(TEXTS, mask, q), wanted, rtol=0, atol=1e-6)


def test_one_tokens_expected_gradient_is_exact_for_the_mixture_too() -> None:
    texts, mask = TEXTS[:: WORDS**2, :1], np.ones((WORDS, 1), bool)
    p, q = token_shares(texts)
    share = (0.2 * p + 0.8 * q).prod(1)
    gradient = gradient_of_estimate(texts, mask, share, alpha=0.2)
    np.testing.assert_allclose(gradient, exact_gradient(texts, mask), rtol=0, atol=1e-6)


def test_the_weight_turns_the_mixtures_token_into_the_students_and_no_other() -> None:
    """What is exact for texts: each step is weighed by q for its own token, by the mixture for all the others."""
    mask = np.ones_like(TEXTS, bool)
    p, q = token_shares(TEXTS)
    mixture = 0.2 * p + 0.8 * q
    log_p, log_q, rows = np_log_softmax(P_TABLE), np_log_softmax(Q_TABLE), prefix_of(TEXTS)
    wanted = np.zeros_like(Q_TABLE)
    for text, row, m, own in zip(TEXTS, rows, mixture, q, strict=True):
        r = (log_p - log_q)[row, text]
        for t in range(STEPS):
            share = np.delete(m, t).prod() * own[t]
            at_t, q_t = row[t], np.exp(log_q[row[t]])
            difference = log_q[at_t] - log_p[at_t]
            wanted[at_t] += share * q_t * (difference - (q_t * difference).sum())
            wanted[at_t] -= share * r[t + 1 :].sum() * (np.eye(WORDS)[text[t]] - q_t)
    gradient = gradient_of_estimate(TEXTS, mask, mixture.prod(1), alpha=0.2)
    np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps, alpha", [(3, 0.0), (1, 0.2)])
def test_the_mean_over_sampled_texts_is_near_the_exact_gradient(steps: int, alpha: float) -> None:
    """Within 4 standard errors, of each entry of the table's gradient."""
    number, key = 20_000, jax.random.key(0)
    texts = np.zeros((number, steps), np.int64)
    mixture = np.log(alpha * np.exp(np_log_softmax(P_TABLE)) + (1 - alpha) * np.exp(np_log_softmax(Q_TABLE)))
    for t in range(steps):
        rows = prefix_of(texts)[:, t]
        texts[:, t] = jax.random.categorical(jax.random.fold_in(key, t), f32(mixture[rows]))
    mask = np.ones_like(texts, bool)
    one = jax.grad(lambda x, text, rows, mask: estimate(x, text[None], rows[None], mask[None], alpha)[0])
    each = jax.jit(jax.vmap(one, in_axes=(None, 0, 0, 0)))(
        f32(Q_TABLE), jnp.asarray(texts), jnp.asarray(prefix_of(texts)), jnp.asarray(mask)
    )
    each = np.asarray(each, np.float64)
    error = each.std(0) / np.sqrt(number)
    everything_possible = TEXTS[:: WORDS ** (STEPS - steps), :steps]
    wanted = exact_gradient(everything_possible, np.ones_like(everything_possible, bool))
    assert error.max() < 0.05 * np.abs(wanted).max()  # else 4 of them would prove little
    assert (np.abs(each.mean(0) - wanted) <= 4 * error + 1e-7).all()
