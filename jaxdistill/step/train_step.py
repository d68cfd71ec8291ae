"""The step: teacher forward, losses, gradient, clipping and update; one program over one mesh.

Or two, where the teacher has devices of its own: it runs there, and what the losses look at is put before the student.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxdistill.losses import policy
from jaxdistill.losses import terms as objectives
from jaxdistill.losses.fused_head import Head
from jaxdistill.losses.terms import Objective, Signals
from jaxdistill.models import intercept, layer_drop
from jaxdistill.models.intercept import HeadWeights, Interceptor, Outputs
from jaxdistill.models.model import Model, embedding_of, without_attention_dropout
from jaxdistill.models.remat import rematerialise
from jaxdistill.step import optimizer as optim
from jaxdistill.step import sharding

Batch = Mapping[str, Array]

LAYER_DROP = 2**31 - 1  # folded into a step's key for its layers; micro-batches fold in 0, 1, 2, ... for dropout


class TrainState(NamedTuple):
    step: Int[Array, ""]
    params: PyTree  # {"student": ..., "projections": ...}
    opt_state: PyTree


class Taught(NamedTuple):
    """All that the losses look at of a teacher."""

    outputs: Outputs  # with None for what no term looks at
    head: HeadWeights | None  # where the fused head makes the logits from outputs.features


def _fused(objective: Objective) -> bool:
    # Terms on samples need the logits: with them there, the fused head would only make them once more.
    return objective.head == "fused" and not objectives.on_samples(objective)


def _fused_from_teacher(objective: Objective) -> bool:
    return _fused(objective) and bool({"ce", "mse"} & objective.weights.keys())


def _inputs(
    objective: Objective, batch: Batch, *, group: int, capacity: Callable[[int], int]
) -> tuple[dict[str, Any], Bool[Array, "groups k"] | None]:
    """(what both models are run on, which of its head's positions count; None where all tokens go through the head)."""
    positions = valid = None
    # With nothing but masked positions to look at, the head is fed those alone: 15 % of its work.
    if objective.tokens == "masked":
        label_mask = batch["label_mask"]
        positions, valid = intercept.head_positions(label_mask, group=group, capacity=capacity(label_mask.shape[1]))
    inputs = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "segment_ids": batch.get("segment_ids"),
        "hidden_states": objectives.needs_hidden_states(objective),
        "attentions": objectives.needs_attentions(objective),
        "positions": positions,
    }
    return inputs, valid


def teach(teacher: Model, params: PyTree, inputs: Mapping[str, Any], *, objective: Objective) -> Taught:
    """Runs the teacher, for the losses alone: under `stop_gradient`, and without what they do not look at."""
    outputs = _looked_at(objective, intercept.apply(teacher, params, **inputs))
    head = intercept.head_weights(teacher, params) if _fused_from_teacher(objective) else None
    return jax.lax.stop_gradient(Taught(outputs, head))


def _looked_at(objective: Objective, outputs: Outputs) -> Outputs:
    on = objective.weights.keys()
    hidden = {t for _, t in objective.layer_map if {"hidden_mse", "hidden_cos"} & on}
    attentions = {t - 1 for s, t in objective.layer_map if "attention" in on and s > 0 and t > 0}
    if "cos" in on:
        hidden.add(len(outputs.hidden_states) - 1)

    def keep(arrays: Sequence[Array], at: set[int]) -> Any:
        return tuple(x if i in at else None for i, x in enumerate(arrays))

    logits: Any = outputs.logits if {"ce", "mse", "policy"} & on and not _fused(objective) else None
    return Outputs(
        logits,
        keep(outputs.hidden_states, hidden),
        keep(outputs.attentions, attentions),
        outputs.features if _fused_from_teacher(objective) else None,
    )


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
    head: HeadWeights | None = None,
    interceptors: Sequence[Interceptor] = (),
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Both forward passes and the weighted sum of terms, as (loss, mean of each term): `teach`, then `student_loss`.

    Args:
      batch: input_ids and labels int32, attention_mask and label_mask bool, all [batch length]; for causal models
        labels are the next tokens, and there may be segment_ids, of documents packed in a row.
      counts: tokens behind each mask, of the whole batch where this is a micro-batch of it.
      dropout_key: None switches the student's dropout off; the teacher never has any.
      head: of the student, for a gradient of its own where it is fused; None = that in `params`.
      interceptors: that the student's forward pass runs under, the outermost first: LayerDrop, rematerialisation.
      group: rows whose masked positions were drawn together.
      capacity: length -> the most masked positions a group can have.
      mesh: that the rows are split over, for the fused head; None = one device.
    """
    inputs, valid = _inputs(objective, batch, group=group, capacity=capacity)
    taught = None if teacher is None else teach(teacher, teacher_params, inputs, objective=objective)
    return student_loss(
        params,
        taught,
        batch,
        counts,
        dropout_key,
        inputs=inputs,
        valid=valid,
        student=student,
        objective=objective,
        head=head,
        interceptors=interceptors,
        mesh=mesh,
    )


def student_loss(
    params: PyTree,
    taught: Taught | None,
    batch: Batch,
    counts: Mapping[str, Float[Array, ""]],
    dropout_key: Array | None,
    *,
    inputs: Mapping[str, Any],
    valid: Bool[Array, "groups k"] | None,
    student: Model,
    objective: Objective,
    head: HeadWeights | None = None,
    interceptors: Sequence[Interceptor] = (),
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """As `loss_fn`, with the teacher's part done. `inputs` and `valid` are those of the batch."""
    labels, masks = batch["labels"], objectives.masks_of(objective, batch)
    if valid is not None:
        labels = intercept.gather_tokens(labels, inputs["positions"])
        masks |= {"labels": valid, "head": valid}
    learnt = intercept.apply(student, params["student"], **inputs, dropout_key=dropout_key, interceptors=interceptors)
    heads, sampling = None, objectives.on_samples(objective)
    if _fused(objective):
        taught_head = None
        if taught is not None and taught.head is not None:
            assert taught.outputs.features is not None
            taught_head = Head(taught.outputs.features, *taught.head)
        assert learnt.features is not None
        heads = (Head(learnt.features, *(head or intercept.head_weights(student, params["student"]))), taught_head)
    signals = Signals(learnt, taught and taught.outputs, labels, masks, params["projections"], heads, sampled=batch)
    if "diversity" in objective.weights:
        signals = signals._replace(embedding=embedding_of(student, params["student"]))
    loss, means = objectives.weighted_sum(objective, signals, counts, mesh=mesh)
    if sampling:
        means |= {f"sample/{name}": x for name, x in objectives.sample_statistics(objective, signals).items()}
    return loss, means


def _with_figures(means: Mapping[str, Float[Array, ""]]) -> dict[str, Float[Array, ""]]:
    """The sums over samples, added up by now, as what is logged of them."""
    sums = {name.removeprefix("sample/"): x for name, x in means.items() if name.startswith("sample/")}
    rest = {name: x for name, x in means.items() if not name.startswith("sample/")}
    return rest if not sums else {**rest, **{f"sample/{name}": x for name, x in policy.figures(sums).items()}}


def micro_batches(batch: Batch, *, accumulation: int, group: int) -> Batch:
    """[batch ...] -> [accumulation, batch / accumulation ...], whole groups of rows taken in turn.

    Taken in turn, and not in blocks, each device cuts its own rows and none move between devices.
    """

    def cut(x: Array) -> Array:
        parts = x.reshape(-1, accumulation, group, *x.shape[1:])
        return jnp.moveaxis(parts, 1, 0).reshape(accumulation, -1, *x.shape[1:])

    return {name: cut(x) for name, x in batch.items()}


def undo_micro_batches(pieces: Batch, *, group: int) -> Batch:
    """[accumulation, batch / accumulation ...] -> [batch ...]: rows where `micro_batches` took them from."""

    def whole(x: Array) -> Array:
        parts = x.reshape(len(x), -1, group, *x.shape[2:])
        return jnp.moveaxis(parts, 0, 1).reshape(-1, *x.shape[2:])

    return {name: whole(x) for name, x in pieces.items()}


def make_train_step(
    *,
    student: Model,
    teacher: Model | None,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    state_shardings: TrainState,
    teacher_shardings: Any,
    teacher_mesh: Mesh | None = None,
    accumulation: int,
    group: int,
    capacity: Callable[[int], int],
    freeze: Sequence[str] = (),
    dropout: bool = True,
    drop_rates: layer_drop.DropRates | None = None,
    remat: str = "",
    ramp: objectives.Ramp | None = None,
) -> Callable[[TrainState, PyTree, Batch, Array], tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """Returns the jitted step(state, teacher_params, batch, key) -> (state, metrics).

    With a `teacher_mesh` other than `mesh` it is two jitted programs (`_on_two_meshes`), called in the same way.
    The state is donated; the teacher's parameters are an argument and never are. Each batch width compiles once.
    With `drop_rates`, the student's layers are drawn anew in every step, the same for all rows and devices. `remat` is
    what its backward pass computes again, one of remat.POLICIES; "" = nothing.
    metrics: `loss`, one mean a term (unweighted), `grad_norm` before clipping, of what is not frozen; with `drop_rates`
    also the number of `layers` that ran, with `ramp` what stands where in this step (`ramp/temperature`).
    """
    if objectives.needs_attentions(objective):
        student = without_attention_dropout(student)

    def update(state: TrainState, teacher_params: PyTree, batch: Batch, key: Array, taught: Taught | None = None):
        """taught: by a teacher that ran elsewhere, [accumulation ...] where that is more than 1; else it runs here."""
        aim = objective if ramp is None else objectives.at_step(objective, ramp, state.step)
        counts = objectives.token_counts(objectives.masks_of(aim, batch))
        key = jax.random.fold_in(key, state.step)
        kept = None
        if drop_rates is not None:
            kept = layer_drop.draw_kept(jax.random.fold_in(key, LAYER_DROP), drop_rates(state.step))

        def gradient(index: Array, micro: Batch, outputs: Outputs | None):
            rest: Any = micro, counts, jax.random.fold_in(key, index) if dropout else None
            around = [] if kept is None else [layer_drop.keep_layers(student.family, kept)]
            around += [rematerialise(student.family, remat)] if remat else []
            common: Any = {"student": student, "objective": aim, "interceptors": around, "mesh": mesh}

            def loss_of(params: PyTree, head: HeadWeights | None):
                if taught is None:
                    own = {"teacher": teacher, "group": group, "capacity": capacity}
                    return loss_fn(params, teacher_params, *rest, head=head, **own, **common)
                inputs, valid = _inputs(aim, micro, group=group, capacity=capacity)
                part = taught._replace(outputs=outputs)
                return student_loss(params, part, *rest, head=head, inputs=inputs, valid=valid, **common)

            value, (grads, of_head) = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)(state.params, head)
            return value, (grads, jax.lax.with_sharding_constraint(of_head, sharding.by_rule(of_head, mesh)))

        # A tied kernel has two gradients, the embedding's and the head's. Added up after the micro-batches, each is
        # reduced over the devices once; where they meet in every micro-batch, the compiler reduces both there.
        fused = _fused(objective)
        head, to_params = jax.vjp(
            lambda params: intercept.head_weights(student, params["student"]) if fused else None, state.params
        )

        outputs = None if taught is None else taught.outputs
        if accumulation == 1:
            (loss, means), (grads, of_head) = gradient(jnp.int32(0), batch, outputs)
        else:
            pieces = micro_batches(batch, accumulation=accumulation, group=group), outputs
            first = jax.tree.map(lambda x: x[0], pieces)
            zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, jnp.int32(0), *first))
            add = lambda total, x: (jax.tree.map(jnp.add, total, gradient(*x)), None)  # noqa: E731
            ((loss, means), (grads, of_head)), _ = jax.lax.scan(add, zeros, (jnp.arange(accumulation), *pieces))

        grads = jax.tree.map(jnp.add, grads, to_params(of_head)[0])
        # Zeros here, and the compiler leaves the work out.
        grads = jax.tree.map(lambda g, frozen: jnp.zeros_like(g) if frozen else g, grads, optim.matching(grads, freeze))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, **_with_figures(means), "grad_norm": optax.tree.norm(grads)}
        if ramp is not None:
            now = {"temperature": aim.temperature, **aim.weights}
            metrics |= {f"ramp/{name}": jnp.float32(now[name]) for name in ramp.ends}
        if kept is not None:
            metrics["layers"] = kept.sum(dtype=jnp.float32)
        return TrainState(state.step + 1, params, opt_state), metrics

    rows, everywhere = sharding.by_batch(mesh), sharding.replicated(mesh)
    if teacher is not None and teacher_mesh is not None and teacher_mesh != mesh:
        return _on_two_meshes(
            update,
            teacher=teacher,
            objective=objective,
            meshes=(mesh, teacher_mesh),
            state_shardings=state_shardings,
            teacher_shardings=teacher_shardings,
            accumulation=accumulation,
            group=group,
            capacity=capacity,
        )

    def step(state: TrainState, teacher_params: PyTree, batch: Batch, key: Array):
        return update(state, teacher_params, batch, key)

    return jax.jit(
        step,
        in_shardings=(state_shardings, teacher_shardings, rows, everywhere),
        out_shardings=(state_shardings, everywhere),
        donate_argnums=0,
    )


def _on_two_meshes(
    update: Callable[..., tuple[TrainState, dict[str, Float[Array, ""]]]],
    *,
    teacher: Model,
    objective: Objective,
    meshes: tuple[Mesh, Mesh],
    state_shardings: TrainState,
    teacher_shardings: Any,
    accumulation: int,
    group: int,
    capacity: Callable[[int], int],
) -> Callable[[TrainState, PyTree, Batch, Array], tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """The step as two programs, the teacher's on the second mesh and the student's on the first.

    Each is only dispatched, so that the teacher is at the next batch while the student is at this one. What is moved
    goes from device to device.
    """
    mesh, there = meshes
    # The teacher, too, takes one micro-batch at a time, which bounds its memory as it does the student's.
    axis = int(accumulation > 1)
    leaving, arriving = sharding.facing(there, mesh, axis=axis)

    def run(params: PyTree, batch: Batch) -> Outputs:
        def one(micro: Batch) -> Outputs:
            inputs, _ = _inputs(objective, micro, group=group, capacity=capacity)
            return teach(teacher, params, inputs, objective=objective).outputs

        if accumulation == 1:
            return one(batch)
        return jax.lax.map(one, micro_batches(batch, accumulation=accumulation, group=group))

    def learn(state: TrainState, outputs: Outputs, head: HeadWeights | None, batch: Batch, key: Array):
        outputs = jax.lax.with_sharding_constraint(outputs, sharding.by_batch(mesh, axis=axis))
        return update(state, None, batch, key, taught=Taught(outputs, head))

    run_there = jax.jit(run, in_shardings=(teacher_shardings, sharding.by_batch(there)), out_shardings=leaving)
    head_there = jax.jit(
        lambda params: intercept.head_weights(teacher, params),
        in_shardings=(teacher_shardings,),
        out_shardings=sharding.replicated(there),
    )
    everywhere = sharding.replicated(mesh)
    learn_here = jax.jit(
        learn,
        in_shardings=(state_shardings, arriving, everywhere, sharding.by_batch(mesh), everywhere),
        out_shardings=(state_shardings, everywhere),
        donate_argnums=0,
    )
    looked_at = ["input_ids", "attention_mask", "segment_ids"] + ["label_mask"] * (objective.tokens == "masked")
    held: tuple[PyTree, HeadWeights | None] | None = None  # the teacher's head on the student's devices, and whose
    under_way: list[Array] = []  # losses of the last two updates

    def step(state: TrainState, teacher_params: PyTree, batch: Batch, key: Array):
        nonlocal held
        if held is None or held[0] is not teacher_params:
            needed = _fused_from_teacher(objective)
            held = teacher_params, jax.device_put(head_there(teacher_params), everywhere) if needed else None
        # Two batches under way keep both sides busy; more would only pile up what a fast teacher has put here.
        if len(under_way) == 2:
            jax.block_until_ready(under_way.pop(0))
        text = {name: batch[name] for name in looked_at if name in batch}
        outputs = run_there(teacher_params, jax.device_put(text, sharding.by_batch(there)))
        state, metrics = learn_here(state, jax.device_put(outputs, arriving), held[1], dict(batch), key)
        under_way.append(metrics["loss"])
        return state, metrics

    return step
