"""The step of a recipe compiled without weights, for devices here or elsewhere, and what XLA counts in the program.

Memory is read from the step as it would run. XLA's count of arithmetic takes the body of a loop once, so the arithmetic
is counted on a program without loops: one micro-batch, with the head in one piece, layers one by one, and attention
written out.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxdistill.config import Config
from jaxdistill.errors import UserError
from jaxdistill.losses.objective import make_objective
from jaxdistill.models.model import Model
from jaxdistill.models.pair import Pair
from jaxdistill.run.training import check_patterns, make_training
from jaxdistill.step.sharding import Meshes


class Target(NamedTuple):
    """What is compiled: the step of a config, for a pair of models whose parameters are shapes, on a mesh."""

    config: Config
    pair: Pair
    mesh: Mesh


class Memory(NamedTuple):
    """Bytes on each device. The state is donated, so results take the place of arguments."""

    arguments: int
    temporaries: int
    peak: int


def compile_step(target: Target, *, rows: int, accumulation: int) -> tuple[Any, Memory]:
    """(the compiled step, its memory); (None, the memory that it would need) where the compiler refuses it."""
    lower = partial(_lower, target, rows=rows, accumulation=accumulation, head=target.config.loss.head)
    compiled, needed = compile_or_need(lower)
    return compiled, Memory(0, 0, needed) if needed is not None else memory_of(compiled)


def _lower(target: Target, *, rows: int, accumulation: int, head: str) -> Any:
    config = target.config.changed(train={"batch_size": rows, "accumulation": accumulation}, loss={"head": head})
    pair, meshes = target.pair, Meshes(target.mesh, target.mesh)
    steps = config.train.steps or 1000  # the length of the schedule, which does not change the cost
    objective = make_objective(config.loss, config.policy, pair)
    check_patterns(config, pair, objective)
    training = make_training(config, pair, objective, meshes, steps=steps)
    state = jax.eval_shape(training.init, pair.student_params)
    key = jax.eval_shape(lambda: jax.random.key(0))
    step: Any = training.step  # jitted, as the mesh is one
    return step.lower(state, pair.teacher_params, batch_shapes(config, causal=pair.student.family.causal), key)


def batch_shapes(config: Config, *, causal: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a training batch of the widest rows."""
    shape = config.train.batch_size, config.data.max_length
    kinds = {"input_ids": jnp.int32, "labels": jnp.int32, "attention_mask": jnp.bool_, "label_mask": jnp.bool_}
    if causal and config.data.batching == "packed":
        kinds["segment_ids"] = jnp.int32
    return {name: jax.ShapeDtypeStruct(shape, kind) for name, kind in kinds.items()}


def count_flops(target: Target) -> float:
    """Arithmetic of one update on each device.

    It is counted on one micro-batch with a dense head, or on a part of the micro-batch where that does not fit.

    Raises:
      UserError: not even the smallest part fits the compiler.
    """
    target = without_loops(target)
    config = target.config
    micro_batch = config.train.batch_size // config.train.accumulation
    rows, smallest = micro_batch, config.mask.group * target.mesh.size
    while True:
        compiled, needed = compile_or_need(partial(_lower, target, rows=rows, accumulation=1, head="dense"))
        if compiled is not None:
            return compiled.cost_analysis()["flops"] * config.train.accumulation * micro_batch / rows
        if rows % 2 or rows // 2 % smallest:
            raise UserError(
                f"not even {rows} rows at a time fit the compiler ({needed} bytes a device); take more devices"
            )
        rows //= 2


def without_loops(target: Target) -> Target:
    """The target with layers one by one, and scores of attention written out."""

    def unrolled(model: Model | None) -> Any:
        return model if model is None or model.core is None else replace(model, scan=False, attention="")

    config, pair = target.config, target.pair
    if pair.student.scan and not config.student.remat:
        config = config.changed(student={"remat": "full"})  # as in the loop
    pair = pair._replace(student=unrolled(pair.student), teacher=unrolled(pair.teacher))
    return target._replace(config=config, pair=pair)


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
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as e:  # any error of libtpu: it is absent, or refuses the name
        raise UserError(
            f"--topology {topology} cannot be compiled for ({str(e).splitlines()[0]}); slices are named as v5e:2x4, "
            "and need pip install 'jaxdistill[tpu]'"
        ) from e
