"""The train step as two programs: the teacher's on its own devices, the student's on the others."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Key, PyTree

from jaxdistill.models.head import Head
from jaxdistill.models.intercept import Outputs
from jaxdistill.step import sharding
from jaxdistill.step.batch import Batch, micro_batches
from jaxdistill.step.forward import Distillation, TeacherOutputs, teacher_head, teacher_outputs
from jaxdistill.step.state import Metrics, Placement, TrainState, TrainStep, Update

UNDER_WAY = 2  # updates: two keep both sides busy; more would only pile up outputs of a fast teacher


class OnTwoMeshes(NamedTuple):
    """A train step on two meshes, which is called as the step on one."""

    run: TrainStep
    # (the arguments of `run`, which of its programs) -> that program, lowered; arguments may be shapes
    lower: Callable[[PyTree, PyTree, PyTree, PyTree, Literal["teacher", "student"]], Any]

    def __call__(self, state: TrainState, teacher_params: PyTree, batch: Batch, key: Key[Array, ""]) -> Any:
        return self.run(state, teacher_params, batch, key)


def on_two_meshes(
    update: Update, distillation: Distillation, placement: Placement, *, accumulation: int
) -> OnTwoMeshes:
    """A train step whose programs are only dispatched, so that the teacher runs ahead by a batch.

    The teacher's outputs go from device to device.
    """
    here, there = placement.meshes
    everywhere = sharding.replicated(here)
    # The teacher, too, takes one micro-batch at a time, which bounds its memory as it does the student's.
    axis = int(accumulation > 1)
    leaving, arriving = sharding.matching_rows(there, here, axis=axis)

    def run_teacher(params: PyTree, batch: Batch) -> Outputs:
        def one(micro: Batch) -> Outputs:
            return teacher_outputs(distillation, params, micro, mesh=there).outputs

        if accumulation == 1:
            return one(batch)
        return jax.lax.map(one, micro_batches(batch, accumulation=accumulation, group=distillation.group))

    def run_student(
        state: TrainState, outputs: Outputs, head: Head | None, batch: Batch, key: Key[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        outputs = jax.lax.with_sharding_constraint(outputs, sharding.by_batch(here, axis=axis))
        return update(state, None, batch, key, TeacherOutputs(outputs, head))

    teacher_program = jax.jit(
        run_teacher, in_shardings=(placement.teacher, sharding.by_batch(there)), out_shardings=leaving
    )
    student_program = jax.jit(
        run_student,
        in_shardings=(placement.state, arriving, everywhere, sharding.by_batch(here), everywhere),
        out_shardings=(placement.state, everywhere),
        donate_argnums=0,
    )
    head_here = _teacher_head_on(here, there, distillation, placement.teacher)
    objective = distillation.objective
    names = ["input_ids", "attention_mask", "segment_ids"] + ["label_mask"] * (objective.tokens == "masked")
    under_way: list[Array] = []  # losses of the last updates

    def text_of(batch: Mapping[str, Any]) -> dict[str, Any]:
        return {name: batch[name] for name in names if name in batch}

    def step(
        state: TrainState, teacher_params: PyTree, batch: Batch, key: Key[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        head = head_here(teacher_params)
        if len(under_way) == UNDER_WAY:
            jax.block_until_ready(under_way.pop(0))
        text = text_of(batch)
        outputs = teacher_program(teacher_params, jax.device_put(text, sharding.by_batch(there)))
        state, metrics = student_program(state, jax.device_put(outputs, arriving), head, dict(batch), key)
        under_way.append(metrics["loss"])
        return state, metrics

    def lower(
        state: PyTree, teacher_params: PyTree, batch: PyTree, key: PyTree, side: Literal["teacher", "student"]
    ) -> Any:
        if side == "teacher":
            return teacher_program.lower(teacher_params, text_of(batch))
        outputs = jax.eval_shape(run_teacher, teacher_params, text_of(batch))
        head = jax.eval_shape(lambda params: teacher_head(distillation, params), teacher_params)
        return student_program.lower(state, outputs, head, dict(batch), key)

    return OnTwoMeshes(step, lower)


def _teacher_head_on(
    here: Mesh, there: Mesh, distillation: Distillation, teacher_shardings: PyTree
) -> Callable[[PyTree], Head | None]:
    """The teacher's head on the student's devices, copied once for the same parameters; None where no loss uses it."""
    head_there = jax.jit(
        lambda params: teacher_head(distillation, params),
        in_shardings=(teacher_shardings,),
        out_shardings=sharding.replicated(there),
    )
    held: tuple[PyTree, Head | None] | None = None  # the parameters, and their head

    def head_of(teacher_params: PyTree) -> Head | None:
        nonlocal held
        if held is None or held[0] is not teacher_params:
            held = teacher_params, jax.device_put(head_there(teacher_params), sharding.replicated(here))
        return held[1]

    return head_of
