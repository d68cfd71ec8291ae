"""The compiled parts of a run's training, and where their arguments lie."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from jaxdistill.config import Config
from jaxdistill.data.masking import masked_capacity
from jaxdistill.errors import UserError
from jaxdistill.losses.objective import init_projections, make_ramp
from jaxdistill.losses.term import Objective
from jaxdistill.losses.terms import needs_samples
from jaxdistill.models import layer_drop
from jaxdistill.models.axes import row_devices
from jaxdistill.models.pair import Pair
from jaxdistill.step import optimizer as optim
from jaxdistill.step import sharding
from jaxdistill.step.forward import Distillation
from jaxdistill.step.sharding import Meshes
from jaxdistill.step.state import Placement, TrainState, TrainStep
from jaxdistill.step.train_step import UpdateSettings, make_train_step


class Training(NamedTuple):
    """The functions that train a student."""

    init: Callable[[PyTree], TrainState]  # the first state, from a copy of the student's parameters
    step: TrainStep
    teacher_shardings: PyTree
    schedule: optax.Schedule  # the learning rate of a step, counted from 0


def make_training(config: Config, pair: Pair, objective: Objective, meshes: Meshes, *, steps: int) -> Training:
    """Training for `steps` steps; computes nothing, so the parameters of `pair` may be shapes alone."""
    projections = _projections(config, pair, objective)
    shapes = {"student": pair.student_params, "projections": projections}
    optimizer = optim.make_optimizer(shapes, config.optim, steps=steps, freeze=config.train.freeze)

    def init(student_params: PyTree) -> TrainState:
        # A copy, as the step donates the state and its caller keeps these parameters.
        params = {"student": student_params, "projections": projections}
        params = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
        return TrainState(jnp.int32(0), params, optimizer.init(params))

    state_shardings = sharding.by_rule(
        jax.eval_shape(init, pair.student_params), meshes.student, family=pair.student.family
    )
    teacher_shardings = sharding.of_teacher(pair, meshes.teacher)
    distillation = distillation_of(config, pair, objective)
    settings = UpdateSettings(
        accumulation=config.train.accumulation,
        freeze=config.train.freeze,
        # A sample is scored without dropout, and its probability under the student now is compared with that score.
        dropout=not needs_samples(objective),
        drop_rates=layer_drop.drop_rates(config.student, layers=pair.student.num_layers, steps=steps),
        remat=config.student.remat,
        ramp=make_ramp(config.loss, objective, steps=steps),
    )
    placement = Placement(meshes, state_shardings, teacher_shardings)
    step = make_train_step(distillation, optimizer, placement, settings)
    schedule = optim.make_schedule(config.optim, steps=steps)
    return Training(jax.jit(init, out_shardings=state_shardings), step, teacher_shardings, schedule)


def distillation_of(config: Config, pair: Pair, objective: Objective) -> Distillation:
    """The models and losses of a step."""
    group = config.mask.group
    return Distillation(
        pair.student,
        pair.teacher,
        objective,
        group,
        capacity=lambda width: masked_capacity(fraction=config.mask.fraction, group=group, width=width),
        cached=pair.cached,
        others=pair.others,
    )


def _projections(config: Config, pair: Pair, objective: Objective) -> PyTree:
    """The first values of the projections from the student's width to the teacher's, where a loss needs them."""
    if pair.imitated is None:
        return {}
    return init_projections(
        objective,
        student_width=pair.student.width,
        teacher_width=pair.imitated.width,
        num_layers=(pair.student.num_layers, pair.imitated.num_layers),
        key=jax.random.fold_in(jax.random.key(config.seed), 1),
    )


def check_patterns(config: Config, pair: Pair, objective: Objective) -> None:
    """Checks the patterns of parameters in the config against the paths of the parameters that are trained.

    Raises:
      UserError: a pattern matches nothing, or nothing is left to train.
    """
    projections = jax.eval_shape(lambda: _projections(config, pair, objective))
    params = {"student": pair.student_params, "projections": projections}
    optim.check_patterns(params, config.optim, freeze=config.train.freeze)


def check_devices(config: Config, meshes: Meshes) -> None:
    """Checks that rows divide over the devices, and that the devices have the attention kernels that are asked for.

    Raises:
      UserError: the first setting that does not fit.
    """
    own = jax.local_device_count()
    if jax.process_count() > 1 and own % config.mesh.tensor:  # each process has the rows of its own devices
        raise UserError(
            f"config.mesh.tensor={config.mesh.tensor} must divide the {own} devices of each process; lower it, and "
            "raise config.mesh.fsdp"
        )
    pieces = max(config.train.accumulation, 1) * config.mask.group
    for mesh, whose in ((meshes.student, "devices"), (meshes.teacher, "devices of the teacher")):
        size = row_devices(mesh)
        if config.train.batch_size % (pieces * size):
            larger = math.ceil(config.train.batch_size / (pieces * size)) * pieces * size
            raise UserError(
                f"config.train.batch_size={config.train.batch_size} must be a multiple of train.accumulation x "
                f"mask.group={pieces} x {size} {whose}{_that_split_rows(mesh)} = {pieces * size}; "
                f"{_remedy(config, mesh)}set config.train.batch_size to {larger}"
            )
    check_evaluation(config, meshes.student)


def _remedy(config: Config, mesh: jax.sharding.Mesh) -> str:
    """What lets all devices take part in an update of these rows."""
    groups, size = config.train.batch_size // config.mask.group, row_devices(mesh)
    if config.train.accumulation > 1 and groups % size == 0:
        return "set config.train.accumulation to 0, which takes the fewest that fit, or "
    shared = next((n for n in range(2, 9) if size % n == 0 and groups % (size // n) == 0), 0)
    return f"let devices share rows (config.mesh.tensor={shared}), or " * bool(shared)


def _that_split_rows(mesh: jax.sharding.Mesh) -> str:
    return f" that split rows (config.mesh.tensor={mesh.size // row_devices(mesh)})" * (row_devices(mesh) < mesh.size)


# Kernel of attention -> the platform that has it, and the name of that.
_KERNELS_OF = {"cudnn": ("gpu", "NVIDIA's GPUs"), "splash": ("tpu", "TPUs")}


def check_evaluation(config: Config, mesh: jax.sharding.Mesh) -> None:
    """As `check_devices`, for the evaluation alone, whose batches are filled up with empty rows."""
    device = mesh.devices.flat[0]
    for role, side in (("teacher", config.teacher), ("student", config.student)):
        platform, whose = _KERNELS_OF.get(side.attention, (device.platform, ""))
        if device.platform != platform:
            raise UserError(
                f"config.{role}.attention={side.attention} is a kernel of {whose}, not of {device.device_kind}; set xla"
            )
