"""What a step costs, before a machine is rented: counted by XLA in the compiled program, for devices here or elsewhere.

Memory, collectives and bytes are read from the step as it would run. XLA's count of arithmetic takes the body of a loop
once, so that is counted on a program without loops: one micro-batch, with the head in one piece.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxdistill import recipe
from jaxdistill.config import Config
from jaxdistill.cost import hlo
from jaxdistill.errors import UserError
from jaxdistill.losses.objective import make_objective
from jaxdistill.models.model import count_params
from jaxdistill.models.pair import Pair
from jaxdistill.run.models import pair_of_shapes
from jaxdistill.run.training import check_devices, make_training
from jaxdistill.step import sharding
from jaxdistill.step.sharding import Meshes


class Chip(NamedTuple):
    """Peaks of one device, from its maker's pages."""

    flops: float  # a second, in bfloat16
    bandwidth: float  # bytes a second, of its memory
    memory: float  # bytes


GB = 1e9
# By the start of jax's device_kind, longest first. A v4 or v5p chip is one device with two cores.
CHIPS = {
    "TPU v4": Chip(275e12, 1228 * GB, 32 * 2**30),
    "TPU v5 lite": Chip(197e12, 819 * GB, 16 * 2**30),
    "TPU v5": Chip(459e12, 2765 * GB, 95 * 2**30),
    "TPU v6 lite": Chip(918e12, 1640 * GB, 32 * 2**30),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 2039 * GB, 80 * 2**30),
    "NVIDIA H100": Chip(989e12, 3350 * GB, 80 * 2**30),
    "NVIDIA H200": Chip(989e12, 4800 * GB, 141 * 2**30),
}
# The share of the peaks that a well-filled training step reaches, for the pessimistic end of a range.
REACHED = 0.4


class Memory(NamedTuple):
    """Bytes on each device. The state is donated, so what comes out lies where it came in."""

    arguments: int
    temporaries: int
    peak: int


class Work(NamedTuple):
    """Of one update, on each device."""

    flops: float
    bytes_moved: float  # to and from its memory


def plan(path: str, overrides: Sequence[str], *, topology: str) -> None:
    """Compiles a recipe's step, for the devices here or for a TPU slice, and prints what it costs; reads no weights.

    Raises:
      UserError: whatever would stop the run itself before its text is read; an unknown slice.
    """
    config = recipe.read(path, overrides)
    if config.student.devices or config.teacher.devices:
        raise UserError("plan counts one program on one mesh; set config.student.devices and teacher.devices to 0")
    if config.samples:
        raise UserError("plan counts updates on text alone; set config.sample and the losses on what models write to 0")
    devices = devices_of(topology) if topology else jax.devices()
    mesh = sharding.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, devices=devices)
    check_devices(config, Meshes(mesh, mesh))
    models = pair_of_shapes(config)
    chip = chip_of(devices[0])
    rows, accumulation = config.train.batch_size, config.train.accumulation
    sizes = [f"teacher {models.teacher.config.model_type} {_millions(models.teacher_params)}"] if models.teacher else []
    sizes.append(f"student {models.student.config.model_type} {_millions(models.student_params)}")
    print(
        f"{', '.join(sizes)} parameters; {len(devices)} x {devices[0].device_kind}, mesh {json.dumps(dict(mesh.shape))}"
    )
    tokens = rows * config.data.max_length
    print(f"an update: {rows:,} rows x {config.data.max_length} = {tokens:,} tokens in {accumulation} micro-batch(es)")

    step_at = partial(compile_step, config, models, mesh)
    compiled, memory = step_at(rows=rows, accumulation=accumulation)
    limit = chip.memory if chip else float("inf")
    print(_memory_line(memory, limit))
    if memory.peak > limit:
        print(f"does not fit: {_gb(memory.peak)} of {_gb(limit)} a device")
        print(_what_would_fit(step_at, config, models, mesh, limit))
        return
    text = compiled.as_text()
    moved = hlo.collectives(text)
    told = ", ".join(f"{kind} {_gb(size)}" for kind, size in sorted(moved.items())) or "none"
    work = Work(count_flops(config, models, mesh), hlo.bytes_moved(text))
    print(
        f"work a device: {work.flops / 1e12:.3g} TFLOP, {_gb(work.bytes_moved)} to and from memory; collectives: {told}"
    )
    if chip:
        arithmetic, reading = seconds(work, chip)
        bound = "arithmetic" if arithmetic >= reading else "memory"
        low, high = tokens_per_second(tokens, work, chip)
        print(
            f"at the peaks {1e3 * arithmetic:.1f} ms of arithmetic, {1e3 * reading:.1f} ms of memory: bound by {bound}"
        )
        print(
            f"expected: {low:,.0f} to {high:,.0f} tokens/s (from {REACHED:.0%} of both peaks, one after the other, to "
            "all of them, overlapped)"
        )
        step = accumulation * config.mask.group * mesh.size
        if rows >= 2 * step:
            half = rows // 2 // step * step
            fits = largest(
                rows,
                step=step,
                at=(rows, memory),
                also=(half, step_at(rows=half, accumulation=accumulation)[1]),
                limit=0.95 * limit,
            )
            print(
                f"largest batch: about {fits:,} rows (by the line through {half:,} and {rows:,}, in 95 % of the memory)"
            )


def compile_step(config: Config, models: Pair, mesh: Any, *, rows: int, accumulation: int) -> tuple[Any, Memory]:
    """(compiled step, its memory); (None, what the compiler would need) where it refuses."""
    lower = partial(_lower, config, models, mesh, rows=rows, accumulation=accumulation, head=config.loss.head)
    compiled, need = compile_or_need(lower)
    return compiled, Memory(0, 0, need) if need is not None else memory_of(compiled)


def _lower(config: Config, models: Pair, mesh: Any, *, rows: int, accumulation: int, head: str) -> Any:
    config = config.changed(train={"batch_size": rows, "accumulation": accumulation}, loss={"head": head})
    steps = config.train.steps or 1000  # of the schedule, which costs nothing
    objective = make_objective(config.loss, config.policy, models)
    training = make_training(config, models, objective, Meshes(mesh, mesh), steps=steps)
    state = jax.eval_shape(training.init, models.student_params)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return training.step.lower(
        state, models.teacher_params, batch_shapes(config, causal=models.student.family.causal), key
    )


def batch_shapes(config: Config, *, causal: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a training batch of the widest rows."""
    shape = config.train.batch_size, config.data.max_length
    kinds = {"input_ids": jnp.int32, "labels": jnp.int32, "attention_mask": jnp.bool_, "label_mask": jnp.bool_}
    if causal and config.data.batching == "packed":
        kinds["segment_ids"] = jnp.int32
    return {name: jax.ShapeDtypeStruct(shape, kind) for name, kind in kinds.items()}


def count_flops(config: Config, models: Pair, mesh: Any) -> float:
    """Of one update, a device: on one micro-batch with a dense head, or on a part of it where that does not fit."""
    whole = config.train.batch_size // config.train.accumulation
    rows, smallest = whole, config.mask.group * mesh.size
    while True:
        compiled, need = compile_or_need(partial(_lower, config, models, mesh, rows=rows, accumulation=1, head="dense"))
        if compiled is not None:
            return compiled.cost_analysis()["flops"] * config.train.accumulation * whole / rows
        if rows % 2 or rows // 2 % smallest:
            raise UserError(
                f"not even {rows} rows at a time fit the compiler ({need} bytes a device); take more devices"
            )
        rows //= 2


def _what_would_fit(step_at: Any, config: Config, models: Pair, mesh: Any, limit: float) -> str:
    """More micro-batches are tried, as they change nothing but memory; the other ways are named."""
    c = config
    accumulation = 2 * c.train.accumulation
    while c.train.batch_size % (accumulation * c.mask.group * mesh.size) == 0:
        _, memory = step_at(rows=c.train.batch_size, accumulation=accumulation)
        if memory.peak <= limit:
            return f"config.train.accumulation={accumulation} would: {_gb(memory.peak)} a device"
        accumulation *= 2
    ways = [f"config.mesh.fsdp={2 * c.mesh.fsdp}", "more devices", "a smaller config.train.batch_size"]
    ways += ["config.student.dtype=bfloat16"] if c.student.dtype == "float32" else []
    ways += ["config.teacher.dtype=bfloat16"] if c.teacher.dtype == "float32" and c.teacher.name else []
    ways += ["config.student.remat=dots"] if not c.student.remat else []
    masked = not models.student.family.causal
    ways += ["config.loss.tokens=masked"] if masked and c.loss.tokens == "all" else []
    return f"no number of micro-batches would; try {', '.join(ways)}"


def _memory_line(memory: Memory, limit: float) -> str:
    of = "" if limit == float("inf") else f" of {_gb(limit)}"
    parts = f"arguments {_gb(memory.arguments)}, temporaries {_gb(memory.temporaries)}, "
    return f"memory a device: {parts if memory.arguments else ''}peak {_gb(memory.peak)}{of}"


def _millions(params: PyTree) -> str:
    return f"{count_params(params) / 1e6:.1f}M"


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def devices_of(topology: str) -> Sequence[Any]:
    """The devices of a TPU slice such as v5e:2x4, to compile for; needs libtpu (extra `tpu`), and no TPU.

    Raises:
      UserError: there is no libtpu, or it knows no such slice.
    """
    # Without these libtpu asks the metadata server of a machine in Google's cloud.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # And lets one process in at a time, which is meant for those that use the chips.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as e:  # whatever libtpu says: it is absent, or refuses the name
        raise UserError(
            f"--topology {topology} cannot be compiled for ({str(e).splitlines()[0]}); slices are named as v5e:2x4, "
            "and need pip install 'jaxdistill[tpu]'"
        ) from e


def chip_of(device: Any) -> Chip | None:
    """What is known of a device; None for a CPU, or a kind that is not in CHIPS."""
    names = sorted((name for name in CHIPS if device.device_kind.startswith(name)), key=len)
    return CHIPS[names[-1]] if names else None


def memory_of(compiled: Any) -> Memory:
    counts = compiled.memory_analysis()
    kept = counts.argument_size_in_bytes + counts.output_size_in_bytes - counts.alias_size_in_bytes
    return Memory(counts.argument_size_in_bytes, counts.temp_size_in_bytes, kept + counts.temp_size_in_bytes)


def needed_bytes(error: Exception) -> int | None:
    """What a TPU compiler says the program would need where it does not fit; None for any other error."""
    match = re.search(r"Used ([\d.]+)([KMG]) of", str(error))
    return int(float(match[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[match[2]]) if match else None


def compile_or_need(lower: Callable[[], Any]) -> tuple[Any, int | None]:
    """(compiled program, None), or (None, bytes needed) where the compiler itself finds that it does not fit."""
    try:
        return lower().compile(), None
    except jax.errors.JaxRuntimeError as e:
        need = needed_bytes(e)
        if need is None:
            raise
        return None, need


def seconds(work: Work, chip: Chip) -> tuple[float, float]:
    """(arithmetic, memory) at the chip's peaks; the larger one binds."""
    return work.flops / chip.flops, work.bytes_moved / chip.bandwidth


def tokens_per_second(tokens: int, work: Work, chip: Chip) -> tuple[float, float]:
    """(low, high): both at REACHED of the peaks and one after the other; at the peaks and wholly overlapped."""
    arithmetic, memory = seconds(work, chip)
    return tokens * REACHED / (arithmetic + memory), tokens / max(arithmetic, memory)


def largest(rows: int, *, step: int, at: tuple[int, Memory], also: tuple[int, Memory], limit: float) -> int:
    """Rows that fit in `limit` bytes, in multiples of `step`, by the line through two compiled sizes."""
    (first, one), (second, two) = sorted((at, also), key=lambda x: x[0])
    slope = (two.peak - one.peak) / (second - first)
    if slope <= 0:
        return rows
    return max(int((limit - one.peak) / slope + first) // step * step, 0)
