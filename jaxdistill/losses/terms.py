"""The table of all losses, what follows from its rows, and their weighted sum.

A loss's mean is `sum / count`. The counts depend on the masks alone, so they are known before the forward pass;
micro-batches divide by the count of the *whole* batch, and their gradients simply add up.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from jaxdistill.losses import layers, outputs, relations, samples
from jaxdistill.losses import policy as policies
from jaxdistill.losses.divergences import ByWriter, LogitLoss, masked_sum
from jaxdistill.losses.fused_head import HeadLoss, fused_head
from jaxdistill.losses.selection import chosen
from jaxdistill.losses.several import resolved
from jaxdistill.losses.term import Objective, Signals, Term

TERMS: dict[str, Term] = {**outputs.TERMS, **layers.TERMS, **relations.TERMS, **samples.TERMS}


def enabled(objective: Objective) -> list[Term]:
    """The rows of the losses that are enabled."""
    return [row_of(objective, name) for name in objective.weights]


def row_of(objective: Objective, name: str) -> Term:
    """The row of a loss: of the program's own, or of the table."""
    return objective.own[name] if name in objective.own else TERMS[name]


def needs_hidden_states(objective: Objective) -> bool:
    return any(term.sees == "hidden_states" for term in enabled(objective))


def needs_attentions(objective: Objective) -> bool:
    return any(term.sees == "attentions" for term in enabled(objective))


def needs_samples(objective: Objective) -> bool:
    return any(term.sees == "samples" for term in enabled(objective))


def uses_fused_head(objective: Objective) -> bool:
    """Whether losses on logits come from features and kernels, so that no array of all logits is made."""
    # Losses on samples, and those that are no LogitLoss, need the logits: with them there, the fused head would only
    # make them once more.
    needs_logits = any(term.sees == "logits" and term.on_logits is None for term in enabled(objective))
    return objective.head == "fused" and not needs_samples(objective) and not needs_logits


def needs_teacher_head(objective: Objective) -> bool:
    """Whether an enabled loss uses the teacher's logits, dense or from the fused head."""
    return any(term.needs_teacher and term.sees in ("logits", "samples") for term in enabled(objective))


def teacher_layers(objective: Objective, *, last: int) -> tuple[set[int], set[int]]:
    """The indexes of the teacher's hidden states, and of its attention maps, that the enabled losses use.

    Args:
      last: index of the teacher's last hidden states.
    """
    hidden: set[int] = set()
    attentions: set[int] = set()
    for term in enabled(objective):
        pairs = objective.layer_map if term.by_layer else ((0, last),)
        if term.every_layer:
            pairs = tuple((t, t) for t in range(last + 1))
        if term.sees == "hidden_states":
            hidden |= {t for _, t in pairs}
        if term.sees == "attentions":
            attentions |= {t - 1 for s, t in pairs if s > 0 and t > 0}
    return hidden, attentions


def masks_of(objective: Objective, batch: Mapping[str, Array]) -> dict[str, Bool[Array, "batch length"]]:
    """The tokens that losses are means over, by the names in term.Tokens.

    Rows that a model wrote (sampling/on_policy.py) bring masks of their own: `head_mask` for the divergence,
    `sampled_mask` for the policy gradient, and `text_mask` for the tokens of all rows that no model wrote. `own` are
    the tokens that the student wrote. With objective.tokens uncertain, `head` are those that may be chosen.
    """
    head = batch["attention_mask"] if objective.tokens == "all" else batch["label_mask"]
    masks = {
        "tokens": batch.get("text_mask", batch["attention_mask"]),
        "labels": batch["label_mask"],
        "head": batch.get("head_mask", head),
    }
    also = {"sampled": "sampled_mask", "own": "own_mask"}
    return masks | {name: batch[array] for name, array in also.items() if array in batch}


def token_counts(masks: Mapping[str, Bool[Array, "batch length"]]) -> dict[str, Float[Array, ""]]:
    """Tokens behind each mask, at least 1, so that an empty mask gives a loss of 0 and not NaN."""
    return {name: jnp.maximum(mask.sum(dtype=jnp.float32), 1.0) for name, mask in masks.items()}


def split_by_tokens(objective: Objective, tokens: str) -> tuple[Objective, Objective]:
    """The objective with the losses that are means over `tokens` alone, and with the others alone."""
    on = {name for name in objective.weights if row_of(objective, name).tokens == tokens}
    sides = ({name: w for name, w in objective.weights.items() if (name in on) == side} for side in (True, False))
    first, others = (objective._replace(weights=weights) for weights in sides)
    return first, others


def counts_of(objective: Objective, batch: Mapping[str, Array], *, group: int) -> dict[str, Float[Array, ""]]:
    """The tokens that each loss is a mean over, of a whole batch, as `token_counts`.

    Args:
      group: rows whose tokens are chosen together.
    """
    masks = masks_of(objective, batch)
    counts = token_counts(masks)
    if objective.tokens == "uncertain":
        of_groups = chosen(masks["head"], share=objective.share, group=group)
        counts["head"] = jnp.maximum(of_groups.sum(dtype=jnp.float32), 1.0)
    return counts


def weighted_sum(
    objective: Objective,
    signals: Signals,
    counts: Mapping[str, Float[Array, ""]],
    *,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns sum_i w_i mean_i, and each mean_i unweighted.

    The means are those of the batch that `counts` was taken from; a micro-batch gives its share of them. Where
    `signals` has heads, the losses on logits come from them, and `mesh` splits their tokens.
    """
    parts, means = [], {}
    fused: dict[str, list[_Part]] = {}
    if signals.heads is not None:
        on_logits = [name for name in objective.weights if row_of(objective, name).on_logits]
        fused = {name: _parts(row_of(objective, name), objective, signals) for name in on_logits}
    if fused:
        total, sums = _sums_by_fused_head(objective, signals, counts, fused, mesh=mesh)
        parts.append(total)
        means |= {name: sums[name] / counts[row_of(objective, name).tokens] for name in fused}
    for name in objective.weights:
        if name not in fused:
            row = row_of(objective, name)
            means[name] = _sum_of(row, objective, signals) / counts[row.tokens]
            parts.append(objective.weights[name] * means[name])
    return jnp.stack(parts).sum(), {name: means[name] for name in objective.weights}


class _Part(NamedTuple):
    """A loss on logits, its tokens, and its weight in the loss that it is a part of."""

    loss: LogitLoss
    mask: Bool[Array, "..."]
    weight: float = 1.0


def _parts(term: Term, objective: Objective, signals: Signals) -> list[_Part]:
    """A loss on logits by who wrote the tokens, where that makes a difference; else one part."""
    assert term.on_logits is not None
    loss, mask = term.on_logits(objective), signals.masks[term.tokens]
    if not isinstance(loss, ByWriter):
        return [_Part(loss, mask)]
    own = signals.masks.get("own", jnp.zeros_like(mask))
    return [
        _Part(loss.of_others, mask & ~own, 2 - objective.student_side),
        _Part(loss.of_student, mask & own, objective.student_side),
    ]


def _sum_of(term: Term, objective: Objective, signals: Signals) -> Float[Array, ""]:
    """The sum of a loss over its tokens, from whole logits where it is a loss on them."""
    if term.on_logits is None:
        assert term.per_token is not None
        return masked_sum(term.per_token(objective, signals), signals.masks[term.tokens])
    first, *others = [
        part.weight * masked_sum(_values(part.loss, objective, signals), part.mask)
        for part in _parts(term, objective, signals)
    ]
    return sum(others, first)


def _values(loss: LogitLoss, objective: Objective, signals: Signals) -> Float[Array, "..."]:
    target = signals.labels
    if loss.target == "teacher":
        assert signals.teacher is not None
        target = signals.teacher.logits
    words = signals.student.logits.shape[-1]
    loss, target = resolved(loss, target, words=words, temperature=objective.temperature)
    return loss.value(signals.student.logits, target, objective.temperature, objective.beta)


def _sums_by_fused_head(
    objective: Objective,
    signals: Signals,
    counts: Mapping[str, Float[Array, ""]],
    enabled: Mapping[str, list[_Part]],
    *,
    mesh: Mesh | None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """(sum_i w_i mean_i, {i: sum_i}) of losses on logits, from features and kernels."""
    assert signals.heads is not None
    losses = {}
    for name, parts in enabled.items():
        weight = objective.weights[name] / counts[row_of(objective, name).tokens]
        losses |= {f"{name}/{i}": HeadLoss(part.loss, part.mask, part.weight * weight) for i, part in enumerate(parts)}
    total, sums = fused_head(
        *signals.heads,
        signals.labels,
        losses,
        temperature=objective.temperature,
        beta=objective.beta,
        mesh=mesh,
    )
    of_parts = {
        name: [part.weight * sums[f"{name}/{i}"] for i, part in enumerate(parts)] for name, parts in enabled.items()
    }
    return total, {name: sum(rest, first) for name, (first, *rest) in of_parts.items()}


def sample_statistics(objective: Objective, signals: Signals) -> dict[str, Float[Array, ""]]:
    """Sums for policy.figures of the student as it is now."""
    assert objective.policy is not None and signals.sampled is not None
    logits, mask = jax.lax.stop_gradient(signals.student.logits), signals.masks["sampled"]
    sampled = {name: signals.sampled[name] for name in ("log_p", "old_log_q", "weights")}
    labels = jnp.where(mask, signals.labels, 0)
    log_q = policies.token_log_probs(logits, labels)
    return policies.statistics(labels, mask, log_q=log_q, clip=objective.policy.clip, **sampled)
