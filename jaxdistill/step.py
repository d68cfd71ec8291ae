"""The one jitted step: teacher forward, losses, gradient, clipping and update, over the mesh."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxdistill import objective as objectives
from jaxdistill import optim, sharding
from jaxdistill.models import intercept, layer_drop
from jaxdistill.models.load import Model, without_attention_dropout
from jaxdistill.objective import Objective, Signals

Batch = Mapping[str, Array]

LAYER_DROP = 2**31 - 1  # folded into a step's key for its layers; micro-batches fold in 0, 1, 2, ... for dropout


class TrainState(NamedTuple):
    step: Int[Array, ""]
    params: PyTree  # {"student": ..., "projections": ...}
    opt_state: PyTree


def loss_fn(
    params: PyTree,
    teacher_params: PyTree,
    batch: Batch,
    counts: Mapping[str, Float[Array, ""]],
    dropout_key: Array | None,
    *,
    student: Model,
    teacher: Model | None,
    objective: Objective,
    group: int,
    capacity: Callable[[int], int],
    kept: Bool[Array, "layers"] | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Both forward passes and the weighted sum of terms, as (loss, mean of each term).

    Args:
      batch: input_ids and labels int32, attention_mask and label_mask bool, all [batch length].
      counts: tokens behind each mask, of the whole batch where this is a micro-batch of it.
      dropout_key: None switches the student's dropout off; the teacher never has any.
      kept: the student's layers that run (LayerDrop); None = all, and the plain model.
      group: rows whose masked positions were drawn together.
      capacity: length -> the most masked positions a group can have.
      mesh: that the rows are split over, for the fused head; None = one device.
    """
    positions, labels = None, batch["labels"]
    masks = {
        "tokens": batch["attention_mask"],
        "labels": batch["label_mask"],
        "head": batch["attention_mask"],
    }
    # With nothing but masked positions to look at, the head is fed those alone: 15 % of its work.
    if objective.tokens == "masked":
        positions, valid = intercept.head_positions(
            batch["label_mask"], group=group, capacity=capacity(labels.shape[1])
        )
        labels = intercept.gather_tokens(labels, positions)
        masks |= {"labels": valid, "head": valid}
    inputs = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "hidden_states": objectives.needs_hidden_states(objective),
        "attentions": objectives.needs_attentions(objective),
        "positions": positions,
    }
    taught = None
    if teacher is not None:
        taught = jax.lax.stop_gradient(intercept.apply(teacher, teacher_params, **inputs))
    dropped = () if kept is None else (layer_drop.keep_layers(student.family, kept),)
    learnt = intercept.apply(student, params["student"], **inputs, dropout_key=dropout_key, interceptors=dropped)
    heads = None
    if objective.head == "fused":
        taught_head = None if taught is None or teacher is None else intercept.head_of(teacher, teacher_params, taught)
        heads = (intercept.head_of(student, params["student"], learnt), taught_head)
    signals = Signals(learnt, taught, labels, masks, params["projections"], heads)
    return objectives.weighted_sum(objective, signals, counts, mesh=mesh)


def micro_batches(batch: Batch, *, accumulation: int, group: int) -> Batch:
    """[batch ...] -> [accumulation, batch / accumulation ...], whole groups of rows taken in turn.

    Taken in turn, and not in blocks, each device cuts its own rows and none move between devices.
    """

    def cut(x: Array) -> Array:
        parts = x.reshape(-1, accumulation, group, *x.shape[1:])
        return jnp.moveaxis(parts, 1, 0).reshape(accumulation, -1, *x.shape[1:])

    return {name: cut(x) for name, x in batch.items()}


def make_train_step(
    *,
    student: Model,
    teacher: Model | None,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    state_shardings: TrainState,
    teacher_shardings: Any,
    accumulation: int,
    group: int,
    capacity: Callable[[int], int],
    freeze: Sequence[str] = (),
    dropout: bool = True,
    drop_rates: layer_drop.DropRates | None = None,
) -> Callable[[TrainState, PyTree, Batch, Array], tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """Returns the jitted step(state, teacher_params, batch, key) -> (state, metrics).

    The state is donated; the teacher's parameters are an argument and never are. Each batch width compiles once.
    With `drop_rates`, the student's layers are drawn anew in every step, the same for all rows and devices.
    metrics: `loss`, one mean a term (unweighted), `grad_norm` before clipping, of what is not frozen; with `drop_rates`
    also the number of `layers` that ran.
    """
    if objectives.needs_attentions(objective):
        student = without_attention_dropout(student)

    def step(state: TrainState, teacher_params: PyTree, batch: Batch, key: Array):
        counts = objectives.token_counts(
            objective, attention_mask=batch["attention_mask"], label_mask=batch["label_mask"]
        )
        key = jax.random.fold_in(key, state.step)
        kept = None
        if drop_rates is not None:
            kept = layer_drop.draw_kept(jax.random.fold_in(key, LAYER_DROP), drop_rates(state.step))

        def gradient(index: Array, micro: Batch):
            return jax.value_and_grad(loss_fn, has_aux=True)(
                state.params,
                teacher_params,
                micro,
                counts,
                jax.random.fold_in(key, index) if dropout else None,
                student=student,
                teacher=teacher,
                objective=objective,
                group=group,
                capacity=capacity,
                kept=kept,
                mesh=mesh,
            )

        if accumulation == 1:
            (loss, means), grads = gradient(jnp.int32(0), batch)
        else:
            micro = micro_batches(batch, accumulation=accumulation, group=group)
            first = jax.tree.map(lambda x: x[0], micro)
            zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, jnp.int32(0), first))
            add = lambda total, x: (jax.tree.map(jnp.add, total, gradient(*x)), None)  # noqa: E731
            ((loss, means), grads), _ = jax.lax.scan(add, zeros, (jnp.arange(accumulation), micro))

        # Zeros here, and the compiler leaves the work out.
        grads = jax.tree.map(lambda g, frozen: jnp.zeros_like(g) if frozen else g, grads, optim.matching(grads, freeze))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, **means, "grad_norm": optax.tree.norm(grads)}
        if kept is not None:
            metrics["layers"] = kept.sum(dtype=jnp.float32)
        return TrainState(state.step + 1, params, opt_state), metrics

    rows, everywhere = sharding.by_batch(mesh), sharding.replicated(mesh)
    return jax.jit(
        step,
        in_shardings=(state_shardings, teacher_shardings, rows, everywhere),
        out_shardings=(state_shardings, everywhere),
        donate_argnums=0,
    )
