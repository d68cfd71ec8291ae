"""Losses on text that models sample for them: MiniLLM's policy gradient, and penalties."""

from jaxtyping import Array, Float

from jaxdistill.losses import policy as policies
from jaxdistill.losses.term import Objective, Signals, Term


def _policy(o: Objective, x: Signals) -> Float[Array, "batch length"]:
    assert o.policy is not None and x.sampled is not None and x.teacher is not None
    return policies.policy_loss(
        x.student.logits,
        x.teacher.logits,
        x.labels,
        x.masks["sampled"],
        advantages=x.sampled["advantages"],
        old_log_q=x.sampled["old_log_q"],
        weights=x.sampled["weights"],
        settings=o.policy,
    )


def _repetition(o: Objective, x: Signals) -> Float[Array, "batch length"]:
    return policies.repetition_penalty(x.student.logits, x.labels, x.masks["sampled"])


def _diversity(o: Objective, x: Signals) -> Float[Array, "batch length"]:
    assert o.policy is not None and x.embedding is not None
    return policies.diversity_penalty(
        x.student.logits, x.masks["sampled"], embedding=x.embedding, target=o.policy.diversity_target
    )


def _entropy(o: Objective, x: Signals) -> Float[Array, "batch length"]:
    assert o.policy is not None
    return policies.entropy_penalty(x.student.logits, x.masks["sampled"], target=o.policy.entropy_target)


TERMS = {
    "policy": Term(
        "Weight of MiniLLM's policy gradient of the reverse KL, on sampled text; see section `policy`.",
        tokens="sampled",
        sees="samples",
        per_token=_policy,
    ),
    "repetition": Term(
        "Weight of the expected repetition of words in sampled text.",
        tokens="sampled",
        sees="samples",
        per_token=_repetition,
        needs_teacher=False,
    ),
    "diversity": Term(
        "Weight of the penalty on sampled text whose expected embeddings are closer than policy.diversity_target.",
        tokens="sampled",
        sees="samples",
        per_token=_diversity,
        needs_teacher=False,
    ),
    "entropy": Term(
        "Weight of the penalty on sampled text where the entropy is below policy.entropy_target.",
        tokens="sampled",
        sees="samples",
        per_token=_entropy,
        needs_teacher=False,
    ),
}
