"""The train step: teacher forward, losses, gradient, clipping and update, as one program over one mesh.

Or as two programs, where the teacher has devices of its own; see two_meshes.py.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from jaxdistill.losses import policy, terms
from jaxdistill.losses.objective import Ramp, at_step
from jaxdistill.losses.term import Objective
from jaxdistill.models import layer_drop
from jaxdistill.models.head import Head
from jaxdistill.models.intercept import Outputs
from jaxdistill.models.model import without_attention_dropout
from jaxdistill.models.scan import layer_interceptors
from jaxdistill.step import optimizer as optimizers
from jaxdistill.step import sharding
from jaxdistill.step.batch import Batch, micro_batches
from jaxdistill.step.forward import Distillation, StudentPass, TeacherOutputs, loss_fn, student_head, student_loss
from jaxdistill.step.state import Metrics, Placement, TrainState, TrainStep, Update
from jaxdistill.step.two_meshes import on_two_meshes

LAYER_DROP = 2**31 - 1  # folded into a step's key for its layers; micro-batches fold in 0, 1, 2, ... for dropout


class UpdateSettings(NamedTuple):
    """How an update is computed."""

    accumulation: int = 1  # micro-batches
    freeze: Sequence[str] = ()  # regular expressions of paths of parameters that are not trained
    dropout: bool = True  # of the student
    drop_rates: layer_drop.DropRates | None = None  # LayerDrop; None = off
    remat: str = ""  # a policy of models.remat, for the student's backward pass; "" = nothing is computed again
    ramp: Ramp | None = None  # moves temperature and weights over the run


def make_train_step(
    distillation: Distillation,
    optimizer: optax.GradientTransformation,
    placement: Placement,
    settings: UpdateSettings = UpdateSettings(),  # noqa: B008 - immutable
) -> TrainStep:
    """Returns the jitted step(state, teacher_params, batch, key) -> (state, metrics).

    Where the teacher has a mesh of its own, the step is two jitted programs, called in the same way. The state is
    donated; the teacher's parameters are an argument and are never donated. Each batch width compiles once. With
    `drop_rates`, the student's layers are drawn anew in every step, the same for all rows and devices.

    metrics: `loss`, one mean for each loss (unweighted), `grad_norm` before clipping and without frozen parameters;
    with `drop_rates` also the number of `layers` that ran, with `ramp` the values at this step (`ramp/temperature`).
    """
    if terms.needs_attentions(distillation.objective):
        distillation = distillation._replace(student=without_attention_dropout(distillation.student))
    update = _make_update(distillation, optimizer, settings, placement)
    meshes = placement.meshes
    if distillation.teacher is not None and meshes.separate:
        return on_two_meshes(update, distillation, placement, accumulation=settings.accumulation)

    def step(
        state: TrainState, teacher_params: PyTree, batch: Batch, key: Key[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        return update(state, teacher_params, batch, key, None)

    everywhere = sharding.replicated(meshes.student)
    return jax.jit(
        step,
        in_shardings=(placement.state, placement.teacher, sharding.by_batch(meshes.student), everywhere),
        out_shardings=(placement.state, everywhere),
        donate_argnums=0,
    )


def _make_update(
    distillation: Distillation,
    optimizer: optax.GradientTransformation,
    settings: UpdateSettings,
    placement: Placement,
) -> Update:
    mesh = placement.meshes.student

    def update(
        state: TrainState,
        teacher_params: PyTree,
        batch: Batch,
        key: Key[Array, ""],
        from_teacher: TeacherOutputs | None,
    ) -> tuple[TrainState, Metrics]:
        """from_teacher: [accumulation ...] where there are several micro-batches; None runs the teacher here."""
        objective = distillation.objective
        if settings.ramp is not None:
            objective = at_step(objective, settings.ramp, state.step)
        now = distillation._replace(objective=objective)
        counts = terms.counts_of(objective, batch, group=now.group)
        key = jax.random.fold_in(key, state.step)
        kept = None
        if settings.drop_rates is not None:
            kept = layer_drop.draw_kept(jax.random.fold_in(key, LAYER_DROP), settings.drop_rates(state.step))

        def gradient(index: Array, micro: Batch, outputs: Outputs | None) -> tuple[tuple[Array, Metrics], PyTree]:
            how = StudentPass(
                jax.random.fold_in(key, index) if settings.dropout else None,
                interceptors=layer_interceptors(now.student, kept=kept, remat=settings.remat),
                mesh=mesh,
                teacher_mesh=placement.meshes.teacher,
            )

            def loss_of(params: PyTree, head: Head | None) -> tuple[Array, Metrics]:
                own = how._replace(head=head)
                if from_teacher is None:
                    return loss_fn(params, teacher_params, micro, counts, now, own)
                return student_loss(params, from_teacher._replace(outputs=outputs), micro, counts, now, own)

            value, (grads, of_head) = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)(state.params, head)
            return value, (grads, jax.lax.with_sharding_constraint(of_head, sharding.of_head(of_head, mesh)))

        # A tied kernel has two gradients, the embedding's and the head's. Added up after the micro-batches, each is
        # reduced over the devices once; where they meet in every micro-batch, the compiler reduces both there.
        head, to_params = jax.vjp(lambda params: student_head(now, params["student"]), state.params)
        outputs = None if from_teacher is None else from_teacher.outputs
        (loss, means), (grads, of_head) = _over_micro_batches(
            gradient, batch, outputs, accumulation=settings.accumulation, group=now.group
        )
        grads = jax.tree.map(jnp.add, grads, to_params(of_head)[0])
        # Zeros here, and the compiler leaves the work out.
        frozen = optimizers.matching(grads, settings.freeze)
        grads = jax.tree.map(lambda g, is_frozen: jnp.zeros_like(g) if is_frozen else g, grads, frozen)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, **_sample_figures(means), "grad_norm": optax.tree.norm(grads)}
        metrics |= _values_of_ramp(objective, settings.ramp)
        if kept is not None:
            metrics["layers"] = kept.sum(dtype=jnp.float32)
        return TrainState(state.step + 1, params, opt_state), metrics

    return update


def _over_micro_batches(
    gradient: Callable[[Array, Batch, Outputs | None], PyTree],
    batch: Batch,
    outputs: Outputs | None,
    *,
    accumulation: int,
    group: int,
) -> PyTree:
    """The sum of gradient(index, micro-batch, the teacher's outputs for it) over the micro-batches."""
    if accumulation == 1:
        return gradient(jnp.int32(0), batch, outputs)
    pieces = micro_batches(batch, accumulation=accumulation, group=group), outputs
    first = jax.tree.map(lambda x: x[0], pieces)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, jnp.int32(0), *first))

    def add(total: PyTree, piece: tuple) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, gradient(*piece)), None

    return jax.lax.scan(add, zeros, (jnp.arange(accumulation), *pieces))[0]


def _sample_figures(means: Mapping[str, Float[Array, ""]]) -> Metrics:
    """The means, with the sums over samples among them (sample/...) replaced by the figures that are logged."""
    sums = {name.removeprefix("sample/"): x for name, x in means.items() if name.startswith("sample/")}
    rest = {name: x for name, x in means.items() if not name.startswith("sample/")}
    return rest if not sums else {**rest, **{f"sample/{name}": x for name, x in policy.figures(sums).items()}}


def _values_of_ramp(objective: Objective, ramp: Ramp | None) -> Metrics:
    if ramp is None:
        return {}
    values = {"temperature": objective.temperature, **objective.weights}
    return {f"ramp/{name}": jnp.float32(values[name]) for name in ramp.ends}
