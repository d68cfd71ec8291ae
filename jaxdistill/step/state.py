"""The arrays that a train step changes, where its arguments lie, and the types of the step itself."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Float, Int, Key, PyTree

from jaxdistill.step.batch import Batch
from jaxdistill.step.forward import TeacherOutputs
from jaxdistill.step.sharding import Meshes


class TrainState(NamedTuple):
    """The arrays of a run that training changes."""

    step: Int[Array, ""]
    params: PyTree  # {"student": ..., "projections": ...}
    opt_state: PyTree


class Placement(NamedTuple):
    """The devices of a step's arguments."""

    meshes: Meshes
    state: PyTree  # a TrainState of shardings
    teacher: PyTree  # shardings


Metrics = dict[str, Float[Array, ""]]
# (state, teacher_params, batch, key) -> (state, metrics)
TrainStep = Callable[[TrainState, PyTree, Batch, Key[Array, ""]], tuple[TrainState, Metrics]]
# (state, teacher_params, batch, key, outputs of a teacher that ran elsewhere) -> (state, metrics)
Update = Callable[[TrainState, PyTree, Batch, Key[Array, ""], TeacherOutputs | None], tuple[TrainState, Metrics]]
