"""The forward passes of a step: teacher, student, and the weighted sum of losses between them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxdistill.data.teacher_cache import of_teacher
from jaxdistill.losses import selection, terms
from jaxdistill.losses.partial import Partial
from jaxdistill.losses.several import Several, Target
from jaxdistill.losses.term import Objective, Signals
from jaxdistill.losses.terms import needs_teacher_head, teacher_layers, uses_fused_head
from jaxdistill.models import intercept
from jaxdistill.models.head import Head, first_words, over_words
from jaxdistill.models.inputs import LOGITS_ALONE, Asked, Inputs
from jaxdistill.models.intercept import Outputs
from jaxdistill.models.interceptors import Interceptor
from jaxdistill.models.model import Model, common_words, embedding_of
from jaxdistill.models.pair import CachedTeacher, Mix
from jaxdistill.models.positions import gather_tokens, head_positions
from jaxdistill.models.scan import layer_interceptors
from jaxdistill.step.batch import Batch

Loss = tuple[Float[Array, ""], dict[str, Float[Array, ""]]]  # (weighted sum, mean of each loss)


class Distillation(NamedTuple):
    """The models of a step, and the losses between them."""

    student: Model
    teacher: Model | None
    objective: Objective
    group: int  # rows whose masked positions were drawn together
    capacity: Callable[[int], int]  # row length -> largest number of masked positions in a group
    cached: CachedTeacher | None = None  # in place of a teacher: its answers stand in the batch
    others: Sequence[Model] = ()  # teachers beside the first one, for the losses on logits

    @property
    def words(self) -> int:
        """The words that the losses compare and predict, which are those that all models have."""
        return common_words(self.student, self.teacher, *self.others) if self.cached is None else self.cached.words


class TeacherOutputs(NamedTuple):
    """The outputs of a teacher that the enabled losses use."""

    outputs: Outputs  # with None in place of arrays that no loss uses
    head: Head | None  # weights alone, where the fused head makes the logits from outputs.features
    others: "tuple[TeacherOutputs, ...]" = ()  # of further teachers, what the losses on logits use


class StudentPass(NamedTuple):
    """How the student's forward pass is run."""

    dropout_key: Key[Array, ""] | None = None  # None switches dropout off
    head: Head | None = None  # the student's head weights, for a gradient of their own; None = those in its parameters
    interceptors: Sequence[Interceptor] = ()  # LayerDrop and rematerialisation, the outermost first
    mesh: Mesh | None = None  # splits the rows, for the fused head and for attention; None = one device
    teacher_mesh: Mesh | None = None  # the same devices and rows, as they split the teacher's parameters


def loss_fn(
    params: PyTree,
    teacher_params: PyTree,
    batch: Batch,
    counts: Mapping[str, Float[Array, ""]],
    distillation: Distillation,
    how: StudentPass = StudentPass(),  # noqa: B008 - immutable
) -> Loss:
    """Both forward passes and the weighted sum of losses.

    Args:
      params: {"student": ..., "projections": ...}, the latter of objective.init_projections.
      batch: input_ids and labels int32, attention_mask and label_mask bool, all [batch length]; for causal models
        labels are the next tokens, and there may be segment_ids, of documents packed in a row.
      counts: tokens behind each mask, of the whole batch where this is a micro-batch.
    """
    from_teacher = None
    if distillation.teacher is not None:
        from_teacher = teacher_outputs(distillation, teacher_params, batch, mesh=how.teacher_mesh)
    elif distillation.cached is not None:
        from_teacher = cached_outputs(distillation, batch)
    return student_loss(params, from_teacher, batch, counts, distillation, how)


def teacher_outputs(
    distillation: Distillation, params: PyTree, batch: Batch, *, mesh: Mesh | None = None
) -> TeacherOutputs:
    """Runs the teacher, under `stop_gradient`, and keeps the outputs that the enabled losses use.

    Several teachers run one after another, so that the activations of one alone are there at a time.

    Args:
      params: of the teacher; of several, a tuple.
    """
    teacher, objective = distillation.teacher, distillation.objective
    assert teacher is not None
    layer = None if objective.relation is None else objective.relation.layer
    asked = _asked(objective, projected=layer)
    if not distillation.others:
        return _outputs_of(teacher, params, batch, asked, distillation, mesh)
    first, *rest = params
    outputs = [_outputs_of(teacher, first, batch, asked, distillation, mesh)]
    for model, its in zip(distillation.others, rest, strict=True):
        batch = _waiting(batch, outputs[-1].outputs)
        outputs.append(_outputs_of(model, its, batch, LOGITS_ALONE, distillation, mesh))
    return outputs[0]._replace(others=tuple(outputs[1:]))


def _waiting(batch: Batch, outputs: Outputs) -> Batch:
    """The batch, whose ids are not known before these outputs are.

    The 0 that is added to them (1 where an output is NaN, and so is the loss) is an order that every compiler keeps. A
    CPU's drops `optimization_barrier`, and then the activations of three teachers took 1.8 times those of one, and not
    1.2 times.
    """
    last = outputs.logits if outputs.features is None else outputs.features
    if last is None:  # no loss compares logits, so no further teacher is computed
        return batch
    wait = jnp.isnan(last[:, 0, 0]).astype(jnp.int32)
    of_rows = jnp.repeat(wait, len(batch["input_ids"]) // len(wait))  # `masked`: there is one for a group of rows
    return {**batch, "input_ids": batch["input_ids"] + of_rows[:, None]}


def _outputs_of(
    teacher: Model, params: PyTree, batch: Batch, asked: Asked, distillation: Distillation, mesh: Mesh | None
) -> TeacherOutputs:
    outputs = intercept.apply(
        teacher,
        params,
        _rows(batch),
        asked=asked,
        positions=_masked_positions(distillation, batch)[0],
        interceptors=layer_interceptors(teacher),
        mesh=mesh,
    )
    outputs = _used_outputs(distillation.objective, _over_words(outputs, distillation.words))
    return jax.lax.stop_gradient(TeacherOutputs(outputs, _head_of(teacher, params, distillation)))


def cached_outputs(distillation: Distillation, batch: Batch) -> TeacherOutputs:
    """The answers of teachers that stand in a batch (data/teacher_cache.py), in the place of their outputs."""
    assert distillation.cached is not None
    mix, layers = distillation.objective.mix, distillation.cached.model.num_layers
    first, *others = [_answers(batch, of_teacher(i)) for i in range(len(mix.shares) if mix else 1)]
    hidden: Any = tuple(batch.get(f"{of_teacher(0)}hidden_{i}") for i in range(layers + 1))
    outputs = [TeacherOutputs(Outputs(one, (), ()), None) for one in others]
    return TeacherOutputs(Outputs(first, hidden, ()), None, tuple(outputs))


def _answers(batch: Batch, of: str) -> Any:
    whole_numbers = ("words", "samples")
    answers = {name: batch.get(f"{of}{name}") for name in Partial._fields}
    return Partial(
        **{name: x if x is None or name not in whole_numbers else x.astype(jnp.int32) for name, x in answers.items()}
    )


def teacher_head(distillation: Distillation, params: PyTree) -> Head | None:
    """The weights of the teacher's head, where the fused head makes logits from them."""
    return None if distillation.teacher is None else _head_of(distillation.teacher, params, distillation)


def _head_of(teacher: Model, params: PyTree, distillation: Distillation) -> Head | None:
    objective = distillation.objective
    if not (uses_fused_head(objective) and needs_teacher_head(objective)):
        return None
    return over_words(intercept.head_of(teacher, params), distillation.words)


def student_head(distillation: Distillation, params: PyTree) -> Head | None:
    """The weights of the student's head, where the fused head makes logits from them.

    Args:
      params: of the student alone.
    """
    if not uses_fused_head(distillation.objective):
        return None
    return over_words(intercept.head_of(distillation.student, params), distillation.words)


def student_loss(
    params: PyTree,
    from_teacher: TeacherOutputs | None,
    batch: Batch,
    counts: Mapping[str, Float[Array, ""]],
    distillation: Distillation,
    how: StudentPass,
) -> Loss:
    """As `loss_fn`, with the teacher's outputs given."""
    objective, student = distillation.objective, distillation.student
    positions, valid = _masked_positions(distillation, batch)
    labels, masks = batch["labels"], terms.masks_of(objective, batch)
    if positions is not None and valid is not None:
        labels = gather_tokens(labels, positions)
        masks |= {"labels": valid, "head": valid}
    outputs = intercept.apply(
        student,
        params["student"],
        _rows(batch)._replace(dropout_key=how.dropout_key),
        asked=_asked(objective, projected=None if objective.relation is None else student.num_layers - 1),
        positions=positions,
        interceptors=how.interceptors,
        mesh=how.mesh,
    )
    outputs = _over_words(outputs, distillation.words)
    heads = None
    if head := how.head or student_head(distillation, params["student"]):
        heads = (head._replace(features=outputs.features), _target_of(from_teacher, objective.mix))
    seen = from_teacher and _seen(from_teacher, objective.mix)
    signals = Signals(outputs, seen, labels, masks, params["projections"], heads, sampled=batch)
    if objective.relation is not None:
        signals = signals._replace(documents=_documents(batch, causal=student.family.causal))
    if terms.needs_samples(objective):
        signals = signals._replace(embedding=embedding_of(student, params["student"])[: distillation.words])
    if objective.tokens == "uncertain":
        loss, means = _with_uncertain(signals, counts, distillation, how.mesh)
    else:
        loss, means = terms.weighted_sum(objective, signals, counts, mesh=how.mesh)
    if terms.needs_samples(objective):
        means |= {f"sample/{name}": x for name, x in terms.sample_statistics(objective, signals).items()}
    return loss, means


def _with_uncertain(
    signals: Signals, counts: Mapping[str, Float[Array, ""]], distillation: Distillation, mesh: Mesh | None
) -> Loss:
    """As terms.weighted_sum, where the losses that compare logits see only the tokens of the highest entropy."""
    objective = distillation.objective
    on_chosen, on_all = terms.split_by_tokens(objective, "head")
    chosen = _at_uncertain(jax.lax.stop_gradient(_uncertain(signals, distillation, mesh)), signals)
    parts = [(on_chosen, chosen), (on_all, signals)]
    losses = [terms.weighted_sum(part, given, counts, mesh=mesh) for part, given in parts if part.weights]
    means = {name: mean for _, of_part in losses for name, mean in of_part.items()}
    return jnp.stack([loss for loss, _ in losses]).sum(), {name: means[name] for name in objective.weights}


def _uncertain(
    signals: Signals, distillation: Distillation, mesh: Mesh | None
) -> tuple[Int[Array, "groups k"], Bool[Array, "groups k"]]:
    """The positions that are chosen, and which of them are valid."""
    if signals.heads is None:
        entropies = selection.entropy(signals.student.logits)
    else:
        entropies = selection.entropies_of(jax.lax.stop_gradient(signals.heads[0]), mesh=mesh)
    share, group = distillation.objective.share, distillation.group
    return selection.most_uncertain(entropies, signals.masks["head"], share=share, group=group)


def _at_uncertain(chosen: tuple[Int[Array, "groups k"], Bool[Array, "groups k"]], signals: Signals) -> Signals:
    """The signals of the losses that compare logits, at the chosen positions alone."""
    positions, valid = chosen
    masks = {"head": valid}
    if "own" in signals.masks:
        masks["own"] = selection.at(signals.masks["own"], positions)
    signals = signals._replace(labels=selection.at(signals.labels, positions), masks=masks)
    if signals.heads is not None:
        student, teacher = signals.heads
        return signals._replace(heads=(selection.at(student, positions), selection.at(teacher, positions)))
    student, teacher = (
        outputs and outputs._replace(logits=selection.at(outputs.logits, positions))
        for outputs in (signals.student, signals.teacher)
    )
    assert student is not None
    return signals._replace(student=student, teacher=teacher)


def _rows(batch: Batch) -> Inputs:
    return Inputs(batch["input_ids"], batch["attention_mask"], batch.get("segment_ids"))


def _asked(objective: Objective, *, projected: int | None) -> Asked:
    return Asked(terms.needs_hidden_states(objective), terms.needs_attentions(objective), projected)


def _masked_positions(
    distillation: Distillation, batch: Batch
) -> tuple[Int[Array, "groups k"] | None, Bool[Array, "groups k"] | None]:
    """(the positions of the masked tokens, which of these are valid); None where all tokens go through the head.

    Where no loss needs other logits, the head gets the masked positions alone: 15 % of its work.
    """
    if distillation.objective.tokens != "masked":
        return None, None
    label_mask = batch["label_mask"]
    capacity = distillation.capacity(label_mask.shape[1])
    return head_positions(label_mask, group=distillation.group, capacity=capacity)


def _documents(batch: Batch, *, causal: bool) -> Int[Array, "batch length"]:
    """The number of each token's document in its row, 0 for padding; rows of a masked LM are one document each."""
    document = batch["attention_mask"].astype(jnp.int32)
    return document * (batch["segment_ids"] + 1) if causal and "segment_ids" in batch else document


def _over_words(outputs: Outputs, words: int) -> Outputs:
    return outputs._replace(logits=first_words(outputs.logits, words))


def _used_outputs(objective: Objective, outputs: Outputs) -> Outputs:
    """The outputs with None in place of arrays that no enabled loss uses, so that these are neither kept nor moved."""
    hidden, attentions = teacher_layers(objective, last=len(outputs.hidden_states) - 1)

    def keep(arrays: Sequence[Array], at: set[int]) -> Any:
        return tuple(x if i in at else None for i, x in enumerate(arrays))

    uses_head, fused = needs_teacher_head(objective), uses_fused_head(objective)
    logits: Any = outputs.logits if uses_head and not fused else None
    return Outputs(
        logits,
        keep(outputs.hidden_states, hidden),
        keep(outputs.attentions, attentions),
        outputs.features if uses_head and fused else None,
        outputs.projected,
    )


def _target_of(from_teacher: TeacherOutputs | None, mix: Mix | None) -> Target:
    """What the fused head compares with; None where no loss compares logits."""
    if from_teacher is None:
        return None
    first, *others = [
        one.outputs.logits if isinstance(one.outputs.logits, Partial) else _with_features(one)
        for one in _each_of(from_teacher)
    ]
    return first if mix is None or first is None else Several((first, *others), mix)


def _with_features(from_teacher: TeacherOutputs) -> Head | None:
    return from_teacher.head and from_teacher.head._replace(features=from_teacher.outputs.features)


def _seen(from_teacher: TeacherOutputs, mix: Mix | None) -> Outputs:
    """The outputs of the first teacher, with the logits of all, where losses compare with these."""
    outputs = from_teacher.outputs
    if mix is None or outputs.logits is None:
        return outputs
    logits: Any = Several(tuple(one.outputs.logits for one in _each_of(from_teacher)), mix)
    return outputs._replace(logits=logits)


def _each_of(from_teacher: TeacherOutputs) -> Sequence[TeacherOutputs]:
    return from_teacher, *from_teacher.others
