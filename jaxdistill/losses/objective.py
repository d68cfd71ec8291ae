"""From the settings of the losses to the objective of a pair of models, and of every step."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdistill.errors import UserError
from jaxdistill.losses.layers import projection_name
from jaxdistill.losses.policy import PolicyConfig
from jaxdistill.losses.settings import LossConfig
from jaxdistill.losses.term import Objective, Relation, Term
from jaxdistill.losses.terms import TERMS, enabled
from jaxdistill.models.config_fields import head_size
from jaxdistill.models.model import Model
from jaxdistill.models.pair import Pair


class OwnLoss(NamedTuple):
    """A loss that a Python program adds to those of the settings."""

    row: Term
    weight: float


NO_LOSSES: Mapping[str, OwnLoss] = MappingProxyType({})


class Ramp(NamedTuple):
    """How some numbers of an objective move from step 0 to the last step."""

    ends: Mapping[str, float]  # value at the last step, by "temperature" or the name of a loss (for its weight)
    shape: str  # linear | cosine
    steps: int


def make_objective(
    loss: LossConfig, policy: PolicyConfig, pair: Pair, own: Mapping[str, OwnLoss] = NO_LOSSES
) -> Objective:
    """The losses that are enabled, for these two models.

    Args:
      own: losses of the program by names that are not in the table; the fused head computes none of them.

    Raises:
      UserError: no loss is left, or the layer map names a layer that is not there.
    """
    kind = "causal" if pair.student.family.causal else "masked"
    weights = loss.enabled(teacher=pair.imitated is not None)
    weights = {name: weight for name, weight in weights.items() if TERMS[name].kind in ("", kind)}
    weights |= {name: loss.weight for name, loss in own.items()}
    if not weights:
        first = next(name for name, term in TERMS.items() if term.kind == kind)
        raise UserError(f"no loss is enabled: set config.loss.alpha_{first}, or another")
    rows = [own[name].row if name in own else TERMS[name] for name in weights]
    for role, model in (("student", pair.student), ("teacher", pair.imitated)):
        narrow = model and getattr(model.config, "word_embed_proj_dim", model.width) != model.width
        if narrow and any(row.sees == "hidden_states" for row in rows):
            raise UserError(f"the {role}'s last hidden states are projected (OPT-350m): set the losses on them to 0")
    if pair.mix and (whole := [name for name in own if own[name].row.sees == "logits" and own[name].row.needs_teacher]):
        raise UserError(
            f"the program's own loss {whole[0]} is given one teacher's logits, and there are several teachers"
        )
    layer_map: tuple[tuple[int, int], ...] = ()
    if any(row.by_layer for row in rows):
        layer_map = _layer_map(loss.layer_map, pair)
        if any(row.sees == "attentions" for row in rows) and not any(s > 0 and t > 0 for s, t in layer_map):
            raise UserError("config.loss.layer_map holds only embeddings (-1), which have no attention to transfer")
    return Objective(
        weights=weights,
        temperature=loss.temperature,
        tokens=loss.tokens,
        layer_map=layer_map,
        divergence=loss.divergence,
        beta=loss.beta,
        head=loss.head,
        policy=policy if any(row.sees == "samples" for row in rows) else None,
        relation=_relation(loss, pair) if any(row.sees == "relations" for row in rows) else None,
        share=loss.share,
        student_side=loss.student_side,
        own={name: loss.row for name, loss in own.items()},
        mix=pair.mix,
    )


def make_ramp(loss: LossConfig, objective: Objective, *, steps: int) -> Ramp | None:
    """How temperature and weights move over `steps` steps; None where they stay.

    Weights of losses that are off are ignored.
    """
    ends = {name: value for name, value in loss.ends.items() if name == "temperature" or name in objective.weights}
    return Ramp(ends, loss.ramp, steps) if ends else None


def at_step(objective: Objective, ramp: Ramp, step: Int[Array, ""]) -> Objective:
    """The objective of one step: x_0 + f (x_1 - x_0), with f = step / (steps - 1), or (1 - cos(pi f)) / 2 of that."""
    done = jnp.clip(step / max(ramp.steps - 1, 1), 0.0, 1.0)
    if ramp.shape == "cosine":
        done = (1 - jnp.cos(jnp.pi * done)) / 2
    values = {"temperature": objective.temperature, **objective.weights}
    moved = {name: values[name] + done * (end - values[name]) for name, end in ramp.ends.items()}
    temperature = moved.pop("temperature", objective.temperature)
    return objective._replace(temperature=temperature, weights={**objective.weights, **moved})


def init_projections(
    objective: Objective, *, student_width: int, teacher_width: int, num_layers: tuple[int, int], key: Array
) -> dict[str, dict[str, Float[Array, "student_width teacher_width"]]]:
    """A learned linear map for each compared pair of layers where the widths differ, otherwise none.

    Jiao et al. 2020 (TinyBERT), eq. 8.

    Args:
      num_layers: of student and teacher, which is the index of their last hidden states.
    """
    if student_width == teacher_width:
        return {}
    pairs: set[tuple[int, int]] = set()
    for term in enabled(objective):
        if term.sees == "hidden_states" and not term.every_layer:
            pairs |= set(objective.layer_map) if term.by_layer else {num_layers}
    scale = student_width**-0.5
    return {
        projection_name(*pair): {
            "kernel": scale * jax.random.normal(jax.random.fold_in(key, i), (student_width, teacher_width))
        }
        for i, pair in enumerate(sorted(pairs))
    }


def _relation(loss: LossConfig, models: Pair) -> Relation:
    """What the loss of relations compares, checked against the sizes of both models."""
    assert models.teacher is not None
    layers, heads = models.teacher.num_layers, loss.relation_heads
    layer = layers - 1 if loss.relation_layer is None else loss.relation_layer
    if layer >= layers:
        raise UserError(f"config.loss.relation_layer={layer}: the teacher has layers 0 to {layers - 1}; lower it")
    widths = _width_of_queries(models.student), _width_of_queries(models.teacher)
    if any(width % heads for width in widths):
        fits = [n for n in range(1, min(widths) + 1) if not any(width % n for width in widths)]
        raise UserError(
            f"config.loss.relation_heads={heads} must divide the width of the queries of student and teacher, "
            f"{widths[0]} and {widths[1]}; choose one of {', '.join(map(str, fits))}"
        )
    return Relation(layer, heads, loss.relation_weights)


def _width_of_queries(model: Model) -> int:
    return model.config.num_attention_heads * head_size(model.config)


def _layer_map(pairs: Sequence[Sequence[int]] | None, models: Pair) -> tuple[tuple[int, int], ...]:
    """((student, teacher), ...) counted from 0, -1 = embeddings, to indexes into hidden_states."""
    teacher = models.imitated
    assert teacher is not None
    sizes = models.student.num_layers, teacher.num_layers
    if pairs is None:
        # The layers that were cut out, or evenly spread ones that end with the last (TinyBERT's uniform map).
        copied = models.layers or [(i + 1) * sizes[1] // sizes[0] - 1 for i in range(sizes[0])]
        pairs = list(enumerate(copied))
    result = []
    for pair in pairs:
        fits = isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(i, int) for i in pair)
        if not fits or not all(-1 <= i < n for i, n in zip(pair, sizes, strict=True)):
            raise UserError(
                f"config.loss.layer_map holds {pair!r}; it must be (student layer, teacher layer), with layers "
                f"-1 to {sizes[0] - 1} and -1 to {sizes[1] - 1}"
            )
        result.append((pair[0] + 1, pair[1] + 1))
    return tuple(result)
