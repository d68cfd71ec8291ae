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

from jaxdistill import fused_head, losses
from jaxdistill.fused_head import Head
from jaxdistill.models.intercept import Outputs


class Objective(NamedTuple):
    weights: Mapping[str, float]  # term -> weight, only those that are on
    temperature: float
    tokens: str  # the head's terms on: all | masked
    layer_map: tuple[tuple[int, int], ...]  # (student, teacher) indexes into hidden_states
    divergence: str = "forward_kl"  # what `ce` is, one of losses.DIVERGENCES
    beta: float = 0.0  # of the divergences that have one
    head: str = "fused"  # fused: the head's terms from features and kernels, in chunks | dense: from logits


class Signals(NamedTuple):
    """What a term may look at. The head's arrays are [batch length], or [groups k] where `tokens` is masked."""

    student: Outputs
    teacher: Any  # Outputs, or None where there is no teacher and no term that looks at it
    labels: Int[Array, "*head"]
    masks: Mapping[str, Bool[Array, "..."]]  # tokens: [batch length]; head and labels: as the logits
    projections: Mapping[str, Mapping[str, Array]]  # student width -> teacher width, by `student>teacher` layer
    heads: tuple[Head, Head | None] | None = None  # student's and teacher's; None = the head's terms take the logits


Term = Callable[[Objective, Signals], Float[Array, "..."]]


def _ce(o: Objective, x: Signals) -> Float[Array, "*head"]:
    divergence = losses.DIVERGENCES[o.divergence]
    return divergence(x.student.logits, x.teacher.logits, temperature=o.temperature, beta=o.beta)


def _mlm(o: Objective, x: Signals) -> Float[Array, "*head"]:
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


def _by_layer(loss: Callable, layer_map: tuple[tuple[int, int], ...], x: Signals) -> Float[Array, "batch length"]:
    values = []
    for s, t in layer_map:
        student = x.student.hidden_states[s]
        if (projection := x.projections.get(projection_name(s, t))) is not None:
            student = student.astype(jnp.float32) @ projection["kernel"]
        values.append(loss(student, x.teacher.hidden_states[t]))
    return jnp.stack(values).mean(axis=0)


# name -> (per-token loss, which mask it is a mean over). A new loss is a function, a row and a test.
TERMS: dict[str, tuple[Term, str]] = {
    "ce": (_ce, "head"),
    "mlm": (_mlm, "labels"),
    "mse": (_mse, "head"),
    "cos": (_cos, "tokens"),
    "hidden_mse": (_hidden_mse, "tokens"),
    "hidden_cos": (_hidden_cos, "tokens"),
    "attention": (_attention, "tokens"),
}
ON_HEAD = ("ce", "mlm", "mse")
ON_HIDDEN = ("cos", "hidden_mse", "hidden_cos")
BY_LAYER = ("hidden_mse", "hidden_cos", "attention")


def needs_hidden_states(objective: Objective) -> bool:
    return any(name in objective.weights for name in ON_HIDDEN)


def needs_attentions(objective: Objective) -> bool:
    return "attention" in objective.weights


def token_counts(
    objective: Objective,
    *,
    attention_mask: Bool[Array, "batch length"],
    label_mask: Bool[Array, "batch length"],
) -> dict[str, Float[Array, ""]]:
    """Tokens behind each mask, at least 1, so that an empty mask gives a loss of 0 and not NaN."""
    masks = {
        "tokens": attention_mask,
        "labels": label_mask,
        "head": label_mask if objective.tokens == "masked" else attention_mask,
    }
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
        means |= {name: sums[name] / counts[TERMS[name][1]] for name in fused}
    for name in objective.weights:
        if name not in fused:
            term, mask = TERMS[name]
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
    loss_of = {"ce": objective.divergence, "mlm": "cross_entropy", "mse": "logit_mse"}
    total, sums = fused_head.fused_head(
        *signals.heads,
        signals.labels,
        {loss_of[name]: signals.masks[TERMS[name][1]] for name in names},
        {loss_of[name]: objective.weights[name] / counts[TERMS[name][1]] for name in names},
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
