"""Policy-gradient distillation on sampled text (MiniLLM, Gu et al. 2024): pure, per token, float32 inside.

`p` is the teacher's distribution, `q` the student's, both at T = 1, and y is sampled from q or from a mixture of both.
The objective is KL(q || p) over whole texts. With r_t = log p(y_t) - log q(y_t) its gradient is, exactly,

    E_y~q sum_t [ grad KL(q_t || p_t) - (sum_{i>t} r_i) grad log q_t(y_t) ]      q_t = q(. | y_<t)

a sum over the vocabulary for the step itself (single-step) and a policy gradient for what follows it (long-term).
`policy_loss` has this gradient; the tests enumerate every text of a small vocabulary to prove it.

Arrays are [batch length]. logits[t] predict labels[t], the token sampled at t: the labels are shifted already. mask[t]
is True where labels[t] was sampled, the first end token included; prompts and padding are False. Values outside the
mask, NaN and labels of -100 included, enter neither value nor gradient. The sampled tokens of a row are contiguous.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.knobs import Section, knob
from jaxdistill.losses import divergences as losses


class PolicyConfig(Section):
    """Policy-gradient distillation (alpha_policy): rows of its own beside those of the text, a completion a prompt."""

    semantics: Literal["paper", "lmops"] = knob(
        "paper", "`paper`: the equations of MiniLLM; `lmops`: what the code of its authors computes."
    )
    mixture: float = knob(0.2, "Share of the teacher in the distribution that tokens are sampled from.", ge=0, lt=1)
    single_step: bool = knob(True, "Take the part of the next token exactly, as a sum over the vocabulary.")
    length_norm: bool = knob(True, "`paper`: rewards after a token enter as their mean instead of their sum.")
    clip: float = knob(0.2, "Clip of the probability ratio to the sampling distribution; 0 = no clipping.", ge=0, lt=1)
    reuse: int = knob(1, "Number of updates that each sample is used for.", ge=1)
    gamma: float = knob(0.95, "`lmops`: discount of later rewards.", ge=0, le=1)
    reward_scale: float = knob(0.5, "`lmops`: rewards are divided by this number.", gt=0)
    reward_clip: float = knob(100.0, "`lmops`: bound of the absolute value of a scaled reward.", gt=0)
    diversity_target: float = knob(
        0.5, "alpha_diversity: smallest mean cosine distance of expected embeddings without a penalty.", ge=0, le=2
    )
    entropy_target: float = knob(2.0, "alpha_entropy: smallest entropy, in nats, without a penalty.", ge=0)


def token_log_probs(
    logits: Float[Array, "batch length vocab"], labels: Int[Array, "batch length"]
) -> Float[Array, "batch length"]:
    """log softmax(logits) at the label, at least losses.LOG_TINY: a word ruled out has a high price, a finite one."""
    return jnp.maximum(-losses.cross_entropy(logits, labels), losses.LOG_TINY)


def rewards(log_p: Float[Array, "batch length"], log_q: Float[Array, "batch length"]) -> Float[Array, "batch length"]:
    """r_t = log p(y_t) - log q(y_t), without a gradient: in the policy gradient it is a number."""
    return jax.lax.stop_gradient(log_p - log_q)


def importance_weights(
    log_p: Float[Array, "batch length"], log_q: Float[Array, "batch length"], *, alpha: float
) -> Float[Array, "batch length"]:
    """w_t = q(y_t) / (alpha p(y_t) + (1 - alpha) q(y_t)), without a gradient: between 0 and 1 / (1 - alpha).

    For y_t sampled from the mixture (Gu et al. 2024, teacher-mixed sampling, alpha = 0.2). It is the weight of the one
    token: exact for its choice, while the tokens before and after it remain those of the mixture. The paper takes
    this in place of the product over tokens, whose variance grows with the length. 1 at alpha = 0.
    """
    # 1 / (alpha p / q + 1 - alpha); p / q itself may overflow.
    over = jnp.logaddexp(jnp.log(alpha) + log_p - log_q, jnp.log1p(-alpha))
    return jax.lax.stop_gradient(jnp.exp(-over))


def advantages(
    rewards: Float[Array, "batch length"], mask: Bool[Array, "batch length"], settings: PolicyConfig
) -> Float[Array, "batch length"]:
    """The advantage of the token at t: the rewards that follow, without a gradient; 0 outside the mask.

    paper: (1 / n) sum_{i>t} r_i over the n sampled tokens after t, 0 at the last; the plain sum without `length_norm`.
    r_t is not included: the single-step term contains r_t, exactly.

    lmops: r' = clip(r / reward_scale, -reward_clip, reward_clip); sum_{i>=t} gamma^(i-t) r'_i over the number of
    sampled tokens from t on, t included; then whitened: less its mean, over sqrt(variance + 1e-8). So r_t counts twice
    where the single-step term is on. One deviation: LMOps takes mean and variance over all entries, the padding's
    zeros among them, so that they depend on how long the batch is padded; here only sampled tokens enter.

    Args:
      rewards: of a whole batch, because whitening is over all of them.
      mask: see the docstring of this module.
      settings: length_norm is used by paper alone; gamma, reward_scale and reward_clip by lmops alone.
    """
    left = jax.lax.cumsum(mask.astype(jnp.float32), axis=1, reverse=True)  # sampled tokens from t on
    if settings.semantics == "paper":
        r = jnp.where(mask, rewards, 0.0)
        after = jax.lax.cumsum(r, axis=1, reverse=True)[:, 1:]
        value = jnp.pad(after, ((0, 0), (0, 1)))
        if settings.length_norm:
            value = value / jnp.maximum(left - 1, 1.0)
    else:
        bound = settings.reward_clip
        r = jnp.where(mask, jnp.clip(rewards / settings.reward_scale, -bound, bound), 0.0)

        def step(
            later: Float[Array, "batch"], now: Float[Array, "batch"]
        ) -> tuple[Float[Array, "batch"], Float[Array, "batch"]]:
            value = now + settings.gamma * later
            return value, value

        value = jax.lax.scan(step, jnp.zeros_like(r[:, 0]), r.T, reverse=True)[1].T / jnp.maximum(left, 1.0)
        count = jnp.maximum(jnp.sum(mask), 1)
        centred = value - losses.masked_sum(value, mask) / count
        value = centred * jax.lax.rsqrt(losses.masked_sum(jnp.square(centred), mask) / count + 1e-8)
    return jax.lax.stop_gradient(jnp.where(mask, value, 0.0))


def policy_loss(
    student_logits: Float[Array, "batch length vocab"],
    teacher_logits: Float[Array, "batch length vocab"],
    labels: Int[Array, "batch length"],
    mask: Bool[Array, "batch length"],
    *,
    advantages: Float[Array, "batch length"],
    old_log_q: Float[Array, "batch length"],
    weights: Float[Array, "batch length"],
    settings: PolicyConfig,
) -> Float[Array, "batch length"]:
    """Long-term surrogate plus single-step KL, per token; 0 outside the mask.

    long-term: -min(rho A, clip(rho, 1 - clip, 1 + clip) A), rho_t = w_t exp(log q(y_t) - old_log_q_t)
    single-step: w_t KL(q_t || p_t), the sum over the vocabulary; in `lmops` without w_t

    rho is the student's probability now over that with which y_t was sampled. Where it is not clipped, at the sampling
    policy the long-term gradient is -w_t A_t grad log q(y_t). w_t multiplies the ratio before it is clipped, so clip
    acts on the first step already: it removes the long-term gradient, of about w_t A_t, wherever
      w_t > 1 + clip and A_t > 0: at alpha = 0.2 and clip = 0.2, p < q / 6; the teacher finds y_t far less likely, or
      w_t < 1 - clip and A_t < 0: p > 2.25 q; the token is the teacher's, what followed it was bad.
    A bias of teacher-mixed sampling alone: without it w_t = 1. `statistics` counts these tokens among the clipped.

    Args:
      student_logits: of the policy now; they alone have a gradient.
      teacher_logits: of the same tokens.
      labels: the sampled tokens.
      mask: see the docstring of this module.
      advantages: A_t, of `advantages`.
      old_log_q: log q(y_t) when y_t was sampled.
      weights: w_t, of `importance_weights`, when y_t was sampled.
      settings: clip, single_step and semantics are used; the semantics must be those of `advantages`.
    """
    student, teacher, labels = _sampled(student_logits, mask), _sampled(teacher_logits, mask), _labels(labels, mask)
    a, old, w = (jax.lax.stop_gradient(jnp.where(mask, x, 0.0)) for x in (advantages, old_log_q, weights))
    rho = _ratio(token_log_probs(student, labels), old, w)
    value = -rho * a
    if clip := settings.clip:
        value = jnp.maximum(value, -jnp.clip(rho, 1 - clip, 1 + clip) * a)
    if settings.single_step:
        kl = losses.reverse_kl(student, jax.lax.stop_gradient(teacher), temperature=1.0)
        value = value + (w * kl if settings.semantics == "paper" else kl)
    return value  # 0 outside the mask: there A is 0, and both distributions are uniform


def repetition_penalty(
    logits: Float[Array, "batch length vocab"], labels: Int[Array, "batch length"], mask: Bool[Array, "batch length"]
) -> Float[Array, "batch length"]:
    """Expected repetition (1 / n) sum_v q_t(v) count_{<t}(v), between 0 and 1; 0 at a row's first sampled token.

    count_{<t}(v): how often v stands among the row's n sampled tokens before t. As (1 / n) sum_{i<t} q_t(y_i), which
    needs no count for every word. Its gradient is that of q_t; the counts are of the sample, and have none.
    """
    logits, labels = _sampled(logits, mask).astype(jnp.float32), _labels(labels, mask)
    batch, length = labels.shape
    words = jnp.broadcast_to(labels[:, None, :], (batch, length, length))
    log_q = jnp.take_along_axis(logits, words, axis=-1) - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    earlier = _earlier(mask)
    repeated = jnp.sum(jnp.where(earlier, jnp.exp(log_q), 0.0), axis=-1)
    return repeated / jnp.maximum(jnp.sum(earlier, axis=-1), 1)


def diversity_penalty(
    logits: Float[Array, "batch length vocab"],
    mask: Bool[Array, "batch length"],
    *,
    embedding: Float[Array, "vocab width"],
    target: float,
) -> Float[Array, "batch length"]:
    """relu(target - mean_j (1 - cos(e_t, e_j))) over the row's other sampled positions j, with e_t = q_t @ embedding.

    A hinge: there is a gradient below `target` and none above. A cosine distance is between 0 and 2. 0 in rows with
    fewer than two sampled positions. `embedding` gets no gradient: moving the words apart would change the measure and
    not the text.
    """
    q = jnp.exp(losses.log_softmax(_sampled(logits, mask), 1.0))
    expected = q @ jax.lax.stop_gradient(embedding).astype(jnp.float32)
    # eps as in layers.cosine_distance: a vector of 0 has no direction, and a finite gradient.
    unit = expected * jax.lax.rsqrt(jnp.sum(jnp.square(expected), axis=-1, keepdims=True) + 1e-12)
    unit = jnp.where(mask[..., None], unit, 0.0)
    # sum_j cos(e_t, e_j) is the product with the sum of the others: no [length length] array.
    others = jnp.sum(unit, axis=1, keepdims=True) - unit
    count = jnp.sum(mask, axis=1, keepdims=True)
    distance = 1.0 - jnp.sum(unit * others, axis=-1) / jnp.maximum(count - 1, 1)
    return jnp.where(mask & (count > 1), jax.nn.relu(target - distance), 0.0)


def entropy_penalty(
    logits: Float[Array, "batch length vocab"], mask: Bool[Array, "batch length"], *, target: float
) -> Float[Array, "batch length"]:
    """relu(target - H(q_t)), H(q) = -sum_v q_v log q_v in nats; a gradient below `target`, none above."""
    log_q = losses.log_probs(_sampled(logits, mask), 1.0)
    entropy = -jnp.sum(jnp.exp(log_q) * log_q, axis=-1)
    return jnp.where(mask, jax.nn.relu(target - entropy), 0.0)


def statistics(
    labels: Int[Array, "batch length"],
    mask: Bool[Array, "batch length"],
    *,
    log_p: Float[Array, "batch length"],
    log_q: Float[Array, "batch length"],
    old_log_q: Float[Array, "batch length"],
    weights: Float[Array, "batch length"],
    clip: float,
) -> dict[str, Float[Array, ""]]:
    """Sums over the sampled tokens, for `figures`; the sums of micro-batches and devices add up.

    `log_q` is that of the policy now, all other arguments are of the time of sampling, as those of `policy_loss`.
    """
    log_p, log_q, old, w = (jax.lax.stop_gradient(jnp.where(mask, x, 0.0)) for x in (log_p, log_q, old_log_q, weights))
    outside = jnp.abs(_ratio(log_q, old, w) - 1) > clip if clip else jnp.zeros_like(mask)
    repeated = jnp.any(_earlier(mask) & (labels[:, :, None] == labels[:, None, :]), axis=-1)
    sums = {
        "tokens": mask,
        "rows": jnp.any(mask, axis=1),
        "weights": w,
        "squared_weights": jnp.square(w),
        "clipped": mask & outside,
        "repeated": repeated,
        "rewards": rewards(log_p, old),
    }
    return {name: jnp.sum(x, dtype=jnp.float32) for name, x in sums.items()}


def figures(sums: dict[str, Float[Array, ""]]) -> dict[str, Float[Array, ""]]:
    """The numbers to log, from the added sums of `statistics`; 0 where nothing was sampled.

    effective_sample_size: (sum w)^2 / (n sum w^2), 1 where all weights are equal and 1 / n where one has all.
    clip_fraction: share of the tokens whose rho is outside [1 - clip, 1 + clip]; some of them keep their gradient.
    repetition_rate: share of the tokens that stand earlier in their row's sample.
    reward: mean log p - log q per token, an estimate of -KL(q || p) per token where y is sampled from q.
    length: sampled tokens per row that has any.
    """
    tokens = jnp.maximum(sums["tokens"], 1.0)
    spread = jnp.maximum(tokens * sums["squared_weights"], jnp.finfo(jnp.float32).tiny)
    return {
        "effective_sample_size": jnp.square(sums["weights"]) / spread,
        "clip_fraction": sums["clipped"] / tokens,
        "repetition_rate": sums["repeated"] / tokens,
        "reward": sums["rewards"] / tokens,
        "length": sums["tokens"] / jnp.maximum(sums["rows"], 1.0),
    }


def _ratio(
    log_q: Float[Array, "batch length"], old_log_q: Float[Array, "batch length"], weights: Float[Array, "batch length"]
) -> Float[Array, "batch length"]:
    return weights * jnp.exp(log_q - old_log_q)


def _earlier(mask: Bool[Array, "batch length"]) -> Bool[Array, "batch length length"]:
    """[b, t, i]: t and i are sampled, i before t."""
    before = jnp.tri(mask.shape[1], k=-1, dtype=bool)[None]
    return before & mask[:, :, None] & mask[:, None, :]


# Masked before the losses and not after: the gradient of a masked NaN would be 0 times NaN.
def _sampled(
    logits: Float[Array, "batch length vocab"], mask: Bool[Array, "batch length"]
) -> Float[Array, "batch length vocab"]:
    return jnp.where(mask[..., None], logits, 0.0)


def _labels(labels: Int[Array, "batch length"], mask: Bool[Array, "batch length"]) -> Int[Array, "batch length"]:
    return jnp.where(mask, labels, 0)
