"""The weighted sum of loss terms: which there are, which tokens each is a mean over, and the layer map.

A term's mean is `sum / count`. The counts depend on the masks alone, so they are known before the forward pass;
micro-batches divide by the count of the *whole* batch, and their gradients simply add up.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.losses import functions as losses
from jaxdistill.losses import fused_head
from jaxdistill.losses import policy as policies
from jaxdistill.losses.functions import Scalar
from jaxdistill.losses.fused_head import Head
from jaxdistill.models.intercept import Outputs


class Objective(NamedTuple):
    weights: Mapping[str, Scalar]  # term -> weight, only those that are on
    temperature: Scalar
    tokens: str  # the head's terms on: all | masked (gathered before the head) | labels
    layer_map: tuple[tuple[int, int], ...]  # (student, teacher) indexes into hidden_states
    divergence: str = "forward_kl"  # what `ce` is, one of losses.DIVERGENCES
    beta: float = 0.0  # of the divergences that have one
    head: str = "fused"  # fused: the head's terms from features and kernels, in chunks | dense: from logits
    policy: policies.PolicyConfig | None = None  # of the terms ON_SAMPLES


class Ramp(NamedTuple):
    """Where some of an objective's numbers go, and on which way, from step 0 to the last."""

    ends: Mapping[str, float]  # "temperature" or the name of a term -> what it, or its weight, is at the last step
    shape: str  # linear | cosine
    steps: int


class Signals(NamedTuple):
    """What a term may look at. The head's arrays are [batch length], or [groups k] where `tokens` is masked."""

    student: Outputs
    teacher: Any  # Outputs, or None where there is no teacher and no term that looks at it
    labels: Int[Array, "*head"]
    masks: Mapping[str, Bool[Array, "..."]]  # of masks_of; head and labels: as the logits
    projections: Mapping[str, Mapping[str, Array]]  # student width -> teacher width, by `student>teacher` layer
    heads: tuple[Head, Head | None] | None = None  # student's and teacher's; None = the head's terms take the logits
    sampled: Mapping[str, Array] | None = None  # what rollout.make_scorer adds to a batch, where there are samples
    embedding: Float[Array, "vocab width"] | None = None  # the student's, of its input words; for `diversity`


class Term(NamedTuple):
    value: Callable[[Objective, Signals], Float[Array, "..."]]
    tokens: str
    needs_teacher: bool = True
    sees: str = "logits"


def _ce(o: Objective, x: Signals) -> Float[Array, "*head"]:
    divergence = losses.DIVERGENCES[o.divergence]
    return divergence(x.student.logits, x.teacher.logits, temperature=o.temperature, beta=o.beta)


def _label(o: Objective, x: Signals) -> Float[Array, "*head"]:
    return losses.cross_entropy(x.student.logits, x.labels)


def _mse(o: Objective, x: Signals) -> Float[Array, "*head"]:
    return losses.logit_mse(x.student.logits, x.teacher.logits)


def _cos(o: Objective, x: Signals) -> Float[Array, "batch length"]:
    last = len(x.student.hidden_states) - 1, len(x.teacher.hidden_states) - 1
    return _by_layer(losses.cosine_distance, (last,), x)


def _hidden_mse(o: Objective, x: Signals) -> Float[Array, "batch length"]:
    return _by_layer(losses.hidden_mse, o.layer_map, x)


def _hidden_cos(o: Objective, x: Signals) -> Float[Array, "batch length"]:
    return _by_layer(losses.cosine_distance, o.layer_map, x)


def _attention(o: Objective, x: Signals) -> Float[Array, "batch length"]:
    # attentions[i] belongs to the layer whose output is hidden_states[i + 1].
    pairs = [
        losses.attention_kl(x.student.attentions[s - 1], x.teacher.attentions[t - 1], x.masks["tokens"])
        for s, t in o.layer_map
        if s > 0 and t > 0
    ]
    return jnp.stack(pairs).mean(axis=0)


def _policy(o: Objective, x: Signals) -> Float[Array, "batch length"]:
    assert o.policy is not None and x.sampled is not None
    return policies.policy_loss(
        x.student.logits,
        x.teacher.logits,
        x.labels,
        x.masks["sampled"],
        advantages=x.sampled["advantages"],
        old_log_q=x.sampled["old_log_q"],
        weights=x.sampled["weights"],
        clip=o.policy.clip,
        single_step=o.policy.single_step,
        semantics=o.policy.semantics,
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


def _by_layer(loss: Callable, layer_map: tuple[tuple[int, int], ...], x: Signals) -> Float[Array, "batch length"]:
    values = []
    for s, t in layer_map:
        student = x.student.hidden_states[s]
        if (projection := x.projections.get(projection_name(s, t))) is not None:
            student = student.astype(jnp.float32) @ projection["kernel"]
        values.append(loss(student, x.teacher.hidden_states[t]))
    return jnp.stack(values).mean(axis=0)


# name -> (per-token loss, which mask it is a mean over). A new loss is a function, a row and a test.
TERMS: dict[str, Term] = {
    "ce": Term(_ce, "head"),
    "mlm": Term(_label, "labels", needs_teacher=False),
    "clm": Term(_label, "labels", needs_teacher=False),
    "mse": Term(_mse, "head"),
    "cos": Term(_cos, "tokens"),
    "hidden_mse": Term(_hidden_mse, "tokens"),
    "hidden_cos": Term(_hidden_cos, "tokens"),
    "attention": Term(_attention, "tokens"),
    "policy": Term(_policy, "sampled", sees="samples"),
    "repetition": Term(_repetition, "sampled", needs_teacher=False, sees="samples"),
    "diversity": Term(_diversity, "sampled", needs_teacher=False, sees="samples"),
    "entropy": Term(_entropy, "sampled", needs_teacher=False, sees="samples"),
}
ON_HEAD = ("ce", "mlm", "clm", "mse")
ON_HIDDEN = ("cos", "hidden_mse", "hidden_cos")
ON_SAMPLES = ("policy", "repetition", "diversity", "entropy")
BY_LAYER = ("hidden_mse", "hidden_cos", "attention")


def needs_hidden_states(objective: Objective) -> bool:
    return any(name in objective.weights for name in ON_HIDDEN)


def needs_attentions(objective: Objective) -> bool:
    return "attention" in objective.weights


def at_step(objective: Objective, ramp: Ramp, step: Int[Array, ""]) -> Objective:
    """The objective of one step: x_0 + f (x_1 - x_0), with f = step / (steps - 1), or (1 - cos(pi f)) / 2 of that."""
    done = jnp.clip(step / max(ramp.steps - 1, 1), 0.0, 1.0)
    if ramp.shape == "cosine":
        done = (1 - jnp.cos(jnp.pi * done)) / 2
    values = {"temperature": objective.temperature, **objective.weights}
    moved = {name: values[name] + done * (end - values[name]) for name, end in ramp.ends.items()}
    temperature = moved.pop("temperature", objective.temperature)
    return objective._replace(temperature=temperature, weights={**objective.weights, **moved})


def on_samples(objective: Objective) -> bool:
    return any(name in objective.weights for name in ON_SAMPLES)


def sample_statistics(objective: Objective, signals: Signals) -> dict[str, Float[Array, ""]]:
    """Sums for policy.figures of the student as it is now."""
    assert objective.policy is not None and signals.sampled is not None
    logits, mask = jax.lax.stop_gradient(signals.student.logits), signals.masks["sampled"]
    sampled = {name: signals.sampled[name] for name in ("log_p", "old_log_q", "weights")}
    labels = jnp.where(mask, signals.labels, 0)
    log_q = policies.token_log_probs(logits, labels)
    return policies.statistics(labels, mask, log_q=log_q, clip=objective.policy.clip, **sampled)


def masks_of(objective: Objective, batch: Mapping[str, Array]) -> dict[str, Bool[Array, "batch length"]]:
    """Which tokens the terms are means over, by the names in TERMS.

    Rows that a model wrote (`rollout.py`) bring masks of their own: where the divergence is taken in `head_mask`, where
    the policy gradient is in `sampled_mask`, and beside them `text_mask` has the tokens of the rows that none wrote.
    """
    head = batch["attention_mask"] if objective.tokens == "all" else batch["label_mask"]
    masks = {
        "tokens": batch.get("text_mask", batch["attention_mask"]),
        "labels": batch["label_mask"],
        "head": batch.get("head_mask", head),
    }
    return {**masks, "sampled": batch["sampled_mask"]} if "sampled_mask" in batch else masks


def token_counts(masks: Mapping[str, Bool[Array, "batch length"]]) -> dict[str, Float[Array, ""]]:
    """Tokens behind each mask, at least 1, so that an empty mask gives a loss of 0 and not NaN."""
    return {name: jnp.maximum(mask.sum(dtype=jnp.float32), 1.0) for name, mask in masks.items()}


def weighted_sum(
    objective: Objective,
    signals: Signals,
    counts: Mapping[str, Float[Array, ""]],
    *,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns sum_i w_i mean_i, and each mean_i unweighted.

    The means are those of the batch that `counts` was taken from; a micro-batch gives its share of them. Where
    `signals` has heads, the terms on the head come from them, and `mesh` is the one their tokens are split over.
    """
    parts, means = [], {}
    fused = [name for name in objective.weights if name in ON_HEAD and signals.heads is not None]
    if fused:
        total, sums = _fused(objective, signals, counts, fused, mesh=mesh)
        parts.append(total)
        means |= {name: sums[name] / counts[TERMS[name].tokens] for name in fused}
    for name in objective.weights:
        if name not in fused:
            term, mask = TERMS[name].value, TERMS[name].tokens
            means[name] = losses.masked_sum(term(objective, signals), signals.masks[mask]) / counts[mask]
            parts.append(objective.weights[name] * means[name])
    return jnp.stack(parts).sum(), {name: means[name] for name in objective.weights}


def _fused(
    objective: Objective,
    signals: Signals,
    counts: Mapping[str, Float[Array, ""]],
    names: Sequence[str],
    *,
    mesh: Mesh | None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """(sum_i w_i mean_i, {i: sum_i}) of terms on the head, from features and kernels."""
    assert signals.heads is not None
    assert not {"mlm", "clm"} <= set(names)  # one sum by the name of the loss
    loss_of = {"ce": objective.divergence, "mlm": "cross_entropy", "clm": "cross_entropy", "mse": "logit_mse"}
    total, sums = fused_head.fused_head(
        *signals.heads,
        signals.labels,
        {loss_of[name]: signals.masks[TERMS[name].tokens] for name in names},
        {loss_of[name]: objective.weights[name] / counts[TERMS[name].tokens] for name in names},
        temperature=objective.temperature,
        beta=objective.beta,
        mesh=mesh,
    )
    return total, {name: sums[loss_of[name]] for name in names}


def projection_name(student_layer: int, teacher_layer: int) -> str:
    return f"{student_layer}>{teacher_layer}"


def init_projections(
    objective: Objective, *, student_width: int, teacher_width: int, num_layers: tuple[int, int], key: Array
) -> dict[str, dict[str, Float[Array, "student_width teacher_width"]]]:
    """One learned linear map a layer pair where the widths differ (TinyBERT, Jiao et al. 2020, eq. 8); else none.

    Args:
      num_layers: of student and teacher, for the pair of last hidden states that `cos` compares.
    """
    if student_width == teacher_width:
        return {}
    pairs = set(objective.layer_map) if {"hidden_mse", "hidden_cos"} & set(objective.weights) else set()
    if "cos" in objective.weights:
        pairs.add(num_layers)
    scale = student_width**-0.5
    return {
        projection_name(*pair): {
            "kernel": scale * jax.random.normal(jax.random.fold_in(key, i), (student_width, teacher_width))
        }
        for i, pair in enumerate(sorted(pairs))
    }
