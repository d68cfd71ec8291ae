"""The programs of an update compiled without weights, for devices here or elsewhere, and what is counted in them.

Most updates are one program. Teacher and student on separate devices are two, and an update that learns from text that
models write has programs that write and score the text as well. All counts are of one device, and of the program as it
would run.
"""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxdistill.config import Config
from jaxdistill.cost import hlo
from jaxdistill.cost.roofline import Work
from jaxdistill.errors import UserError
from jaxdistill.losses.objective import make_objective
from jaxdistill.models.axes import row_devices
from jaxdistill.models.model import Model
from jaxdistill.models.pair import Pair
from jaxdistill.run.teacher_cache import answer_shapes
from jaxdistill.run.training import Training, check_patterns, make_training
from jaxdistill.sampling.on_policy import BatchLayout, as_training_batch, interleaved, make_scorer, sampler_of
from jaxdistill.step import sharding
from jaxdistill.step.sharding import Meshes

UPDATE, TEACHER = "update", "teacher"  # the second where the teacher has devices of its own
WRITE, SCORE = "writing", "scoring"  # of text that models write


class Target(NamedTuple):
    """What is compiled: the update of a config, for a pair of models whose parameters are shapes, on devices."""

    config: Config
    pair: Pair
    meshes: Meshes

    @property
    def devices(self) -> Sequence[Any]:
        """All devices, of one kind; those of the student first."""
        meshes = self.meshes if self.meshes.separate else self.meshes[:1]
        return [device for mesh in meshes for device in mesh.devices.flat]

    @property
    def smallest_piece(self) -> int:
        """The rows of the smallest micro-batch: one group on each device that has rows of its own."""
        return self.config.mask.group * max(row_devices(mesh) for mesh in self.meshes)

    def with_rows(self, rows: int, accumulation: int) -> "Target":
        return self._replace(config=self.config.changed(train={"batch_size": rows, "accumulation": accumulation}))


class Memory(NamedTuple):
    """Bytes on each device. The state is donated, so results take the place of arguments."""

    arguments: int
    temporaries: int
    peak: int


class Measured(NamedTuple):
    """What a program takes on each of its devices, each time that it runs."""

    side: str  # whose devices: "student", which are all where there is one mesh, or "teacher"
    times: float  # that it runs in an update, on average
    memory: Memory  # where the compiler refuses the program, the peak alone
    work: Work | None  # None where the compiler refuses the program
    collectives: dict[str, int]  # bytes of their results


Programs = Mapping[str, Measured]


class Part(NamedTuple):
    """A program of an update, before it is compiled."""

    lower: Callable[[], Any]
    side: str  # as in Measured
    times: float


def measure(target: Target) -> Programs:
    """Compiles every program of an update, and counts what is in it."""
    found: dict[str, Measured] = {}
    countable: dict[str, Part] = {}
    if kernels := target != (written := without_kernels(target)):
        countable = parts(written)
    for name, part in parts(target).items():
        compiled, needed = compile_or_need(part.lower)
        if compiled is None:
            assert needed is not None
            found[name] = Measured(part.side, part.times, Memory(0, 0, needed), None, {})
            continue
        text = compiled.as_text()
        arithmetic = hlo.flops(countable[name].lower().compile().as_text() if kernels else text)
        work = Work(arithmetic, hlo.bytes_moved(text))
        found[name] = Measured(part.side, part.times, memory_of(compiled), work, hlo.collectives(text))
    return found


def peak(programs: Programs) -> int:
    """The most bytes on any device. While models write text, the arguments of the update stay where they are."""
    kept = programs[UPDATE].memory.arguments
    beside = [one.memory.peak - one.memory.arguments for name, one in programs.items() if name not in (UPDATE, TEACHER)]
    return max([*(one.memory.peak for one in programs.values()), *(kept + more for more in beside)])


def work_of(programs: Programs) -> dict[str, Work]:
    """The work of an update on each device, by whose devices they are."""
    total: dict[str, Work] = {}
    for one in programs.values():
        assert one.work is not None, "only what the compiler accepts has its work counted"
        before = total.get(one.side, Work(0.0, 0.0))
        total[one.side] = Work(*(a + one.times * b for a, b in zip(before, one.work, strict=True)))
    return total


def collectives_of(programs: Programs) -> dict[str, float]:
    """Bytes of each kind of collective of an update, on the busiest device."""
    kinds = sorted({kind for one in programs.values() for kind in one.collectives})
    sides = {one.side for one in programs.values()}

    def on(side: str, kind: str) -> float:
        return sum(one.times * one.collectives.get(kind, 0) for one in programs.values() if one.side == side)

    return {kind: max(on(side, kind) for side in sides) for kind in kinds}


def meshes_on(config: Config, devices: Sequence[Any]) -> Meshes:
    """The meshes of a run over these devices, which may be elsewhere.

    Raises:
      UserError: there are too few devices, or the axes do not multiply to them.
    """
    axes = config.mesh
    make = partial(sharding.make_mesh, data=axes.data, fsdp=axes.fsdp, tensor=axes.tensor)
    student, teacher = config.student.devices, config.teacher.devices
    if not student and not teacher:
        mesh = make(devices=devices)
        return Meshes(mesh, sharding.teacher_view(mesh, axes.teacher_fsdp))
    if student + teacher > len(devices):
        raise UserError(
            f"config.student.devices={student} and config.teacher.devices={teacher} are more than the {len(devices)} "
            "devices of the slice; lower one of them"
        )
    of_teacher = sharding.teacher_view(make(devices=devices[student : student + teacher]), axes.teacher_fsdp)
    return Meshes(make(devices=devices[:student]), of_teacher)


def kept_bytes(target: Target) -> int:
    """Bytes of state and teacher on a device: parameters and what the optimizer keeps of them; nothing is compiled."""
    _, state = _training(target)
    on_student, on_teacher = _bytes_on_a_device(state), bytes_of_teachers(target)
    return max(on_student, on_teacher) if target.meshes.separate else on_student + on_teacher


def bytes_of_teachers(target: Target) -> int:
    """Bytes of the parameters of all teachers on a device."""
    shardings = sharding.of_teacher(target.pair, target.meshes.teacher)
    return _bytes_on_a_device(_placed(target.pair.params_of_teachers, shardings))


def _bytes_on_a_device(placed: PyTree) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(placed))


def _training(target: Target) -> tuple[Training, Any]:
    """(the training of a target, the shapes of its state with their places)."""
    config, pair, meshes = target
    steps = config.train.steps or 1000  # the length of the schedule, which does not change the cost
    objective = make_objective(config.loss, config.policy, pair)
    check_patterns(config, pair, objective)
    training = make_training(config, pair, objective, meshes, steps=steps)
    return training, jax.eval_shape(training.init, pair.student_params)


def parts(target: Target) -> dict[str, Part]:
    """The programs of an update."""
    config, pair, meshes = target
    training, state = _training(target)
    key = jax.eval_shape(lambda: jax.random.key(0))
    text = batch_shapes(config, causal=pair.student.family.causal)
    if pair.cached is not None:
        text |= answer_shapes(config, pair, make_objective(config.loss, config.policy, pair), text)
    step: Any = training.step
    if meshes.separate:
        lower = partial(step.lower, state, pair.params_of_teachers, text, key)
        return {
            TEACHER: Part(partial(lower, "teacher"), "teacher", 1.0),
            UPDATE: Part(partial(lower, "student"), "student", 1.0),
        }
    writers, batch = _writers(target, training, state, text)
    return {UPDATE: Part(partial(step.lower, state, pair.params_of_teachers, batch, key), "student", 1.0), **writers}


def _writers(
    target: Target, training: Training, state: Any, text: dict[str, Any]
) -> tuple[dict[str, Part], dict[str, Any]]:
    """(the programs that write and score text, the batch that an update learns from)."""
    config, pair, mesh = target.config, target.pair, target.meshes.student
    if not config.samples:
        return {}, text
    layout = BatchLayout(config.data.max_length, config.train.accumulation, config.mask.group, mesh)
    student = state.params["student"]
    teacher = _placed(pair.teacher_params, pair.of_first(training.teacher_shardings))
    rows, length = config.train.batch_size, config.data.max_length - config.sample.max_new_tokens
    by_rows = sharding.by_batch(mesh)
    prompts = {
        "input_ids": jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=by_rows),
        "attention_mask": jax.ShapeDtypeStruct((rows, length), jnp.bool_, sharding=by_rows),
        "live": jax.ShapeDtypeStruct((rows,), jnp.bool_, sharding=by_rows),
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    draw = partial(sampler_of, config.sample, pair, layout, end_ids=(0,), pad=0)

    def writing(mixture: float, times: float) -> Part:
        sampler: Any = draw(mixture=mixture)
        return Part(partial(sampler.lower, student, teacher, prompts, key), "student", times)

    policy = make_objective(config.loss, config.policy, pair).policy
    if policy is None:
        shares = {"student": (config.sample.student, 0.0), "teacher": (config.sample.teacher, 1.0)}
        found = {f"{WRITE} by the {who}": writing(mixture, share) for who, (share, mixture) in shares.items() if share}
        sampled = jax.eval_shape(draw(mixture=0.0), student, teacher, prompts, key)
        return found, jax.eval_shape(partial(as_training_batch, by="student"), sampled)
    share = 1 / config.policy.reuse
    sampled = jax.eval_shape(draw(mixture=config.policy.mixture), student, teacher, prompts, key)
    score: Any = make_scorer(pair.student, pair.teacher, policy, accumulation=layout.accumulation, group=layout.group)
    scored = jax.eval_shape(score, student, teacher, sampled)
    placed = _placed(sampled, jax.tree.map(lambda _: by_rows, sampled))
    found = {
        WRITE: writing(config.policy.mixture, share),
        SCORE: Part(partial(score.lower, student, teacher, placed), "student", share),
    }
    return found, jax.eval_shape(partial(interleaved, group=layout.group), text, scored)


def _placed(shapes: PyTree, shardings: PyTree) -> PyTree:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def batch_shapes(config: Config, *, causal: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a training batch of the widest rows."""
    shape = config.train.batch_size, config.data.max_length
    kinds = {"input_ids": jnp.int32, "labels": jnp.int32, "attention_mask": jnp.bool_, "label_mask": jnp.bool_}
    if causal and config.data.batching == "packed":
        kinds["segment_ids"] = jnp.int32
    return {name: jax.ShapeDtypeStruct(shape, kind) for name, kind in kinds.items()}


def without_kernels(target: Target) -> Target:
    """The target with attention in products that can be counted, in place of kernels that are calls of a library."""

    def with_products(model: Model | None) -> Any:
        if model is None or model.attention not in ("splash", "cudnn"):
            return model
        return replace(model, attention="" if model.core is None else "tiles")

    pair = target.pair
    pair = pair._replace(
        student=with_products(pair.student),
        teacher=with_products(pair.teacher),
        others=tuple(map(with_products, pair.others)),
    )
    return target._replace(pair=pair)


def compile_or_need(lower: Callable[[], Any]) -> tuple[Any, int | None]:
    """(compiled program, None), or (None, the bytes needed) where the compiler itself finds that it does not fit."""
    try:
        return lower().compile(), None
    except jax.errors.JaxRuntimeError as e:
        needed = needed_bytes(e)
        if needed is None:
            raise
        return None, needed


def needed_bytes(error: Exception) -> int | None:
    """The bytes that a program would need, as a TPU compiler says where it does not fit; None for any other error."""
    match = re.search(r"Used ([\d.]+)([KMG]) of", str(error))
    return int(float(match[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[match[2]]) if match else None


def memory_of(compiled: Any) -> Memory:
    """The memory of a compiled program, as the compiler counts it."""
    counts = compiled.memory_analysis()
    kept = counts.argument_size_in_bytes + counts.output_size_in_bytes - counts.alias_size_in_bytes
    return Memory(counts.argument_size_in_bytes, counts.temp_size_in_bytes, kept + counts.temp_size_in_bytes)


def devices_of(topology: str) -> Sequence[Any]:
    """The devices of a TPU slice such as v5e:2x4, to compile for; needs libtpu (extra `tpu`), and no TPU.

    Raises:
      UserError: libtpu is not installed, or knows no such slice.
    """
    # Without these two, libtpu asks the metadata server of a machine in Google's cloud.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Without this, libtpu admits one process at a time, a rule that is meant for processes that use the chips.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **_of_chips(topology)).devices
    except Exception as e:  # any error of libtpu: it is absent, or refuses the name
        raise UserError(
            f"--topology {topology} cannot be compiled for ({str(e).splitlines()[0]}); slices are named by "
            "their chips, as v5e:2x4 or v5p:2x2x1, and need pip install 'jaxdistill[tpu]'"
        ) from e


def _of_chips(topology: str) -> dict[str, Any]:
    """What libtpu has to be told so that a device of a slice is a chip, as on the machines that are rented."""
    kind, _, sizes = topology.partition(":")
    options: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}  # else a device is half a chip
    if set(sizes.split("x")) == {"1"}:  # by default a host has four chips
        options["chips_per_host_bounds"] = (1, 1, 1)
    return options
