"""The cost of a training step before a machine is rented: XLA's counts in the compiled program, as lines to print."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

from jaxdistill import recipe
from jaxdistill.cost import hlo
from jaxdistill.cost.chips import REACHED, Chip, Work, chip_of, seconds, tokens_per_second
from jaxdistill.cost.estimate import Fit, LargestBatch, find_fit, find_largest_batch, other_ways
from jaxdistill.cost.program import Memory, Target, compile_step, count_flops, devices_of
from jaxdistill.errors import UserError
from jaxdistill.models.model import count_params, in_millions
from jaxdistill.run.models import pair_of_shapes
from jaxdistill.run.training import check_devices
from jaxdistill.step import sharding
from jaxdistill.step.sharding import Meshes


class Cost(NamedTuple):
    """A line about the cost of a step, and the figures in it."""

    line: str
    figures: dict[str, Any]


def plan(path: str, overrides: Sequence[str], *, topology: str) -> Iterator[Cost]:
    """Compiles the step of a recipe, for the devices here or for a TPU slice, and yields what it costs.

    Each line comes as soon as it is known, because compilation takes long. No weights are read.

    Raises:
      UserError: anything that would stop the run itself before its text is read; an unknown slice.
    """
    target = read_target(path, overrides, topology=topology)
    yield from _target_lines(target)
    train, chip = target.config.train, chip_of(target.mesh.devices.flat[0])
    compiled, memory = compile_step(target, rows=train.batch_size, accumulation=train.accumulation)
    limit = chip.memory if chip else float("inf")
    yield Cost(_memory_line(memory, limit), {"memory": memory._asdict(), "fits": memory.peak <= limit})
    if memory.peak > limit:
        yield Cost(f"does not fit: {_gb(memory.peak)} of {_gb(limit)} a device", {"limit": limit})
        fit = find_fit(target, limit)
        yield Cost(_remedy_line(fit, target), {"fitting_accumulation": fit.accumulation if fit else None})
        return
    text = compiled.as_text()
    work = Work(count_flops(target), hlo.bytes_moved(text))
    collectives = hlo.collectives(text)
    yield Cost(_work_line(work, collectives), {**work._asdict(), "collectives": collectives})
    if chip:
        yield from _speed_lines(target, work, chip)
        if batch := find_largest_batch(target, memory, limit=0.95 * limit):
            yield Cost(_batch_line(batch), {"largest_batch": batch.rows})


def read_target(path: str, overrides: Sequence[str], *, topology: str) -> Target:
    """The step that a recipe describes, on the devices here or on those of a TPU slice.

    Raises:
      UserError: as `plan`.
    """
    config = recipe.read(path, overrides)
    if config.student.devices or config.teacher.devices:
        raise UserError("plan counts one program on one mesh; set config.student.devices and teacher.devices to 0")
    if config.samples:
        raise UserError("plan counts updates on text alone; set config.sample and the losses on what models write to 0")
    devices = devices_of(topology) if topology else jax.devices()
    mesh = sharding.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, devices=devices)
    check_devices(config, Meshes(mesh, mesh))
    return Target(config, pair_of_shapes(config), mesh)


def _target_lines(target: Target) -> Iterator[Cost]:
    config, pair, mesh = target
    roles = [("teacher", pair.teacher, pair.teacher_params), ("student", pair.student, pair.student_params)]
    models = [f"{role} {model.config.model_type} {in_millions(params)}" for role, model, params in roles if model]
    kind = mesh.devices.flat[0].device_kind
    yield Cost(
        f"{', '.join(models)} parameters; {mesh.size} x {kind}, mesh {json.dumps(dict(mesh.shape))}",
        {
            "parameters": {role: count_params(params) for role, model, params in roles if model},
            "devices": mesh.size,
            "device_kind": kind,
            "mesh": dict(mesh.shape),
        },
    )
    rows, length = config.train.batch_size, config.data.max_length
    yield Cost(
        f"an update: {rows:,} rows x {length} = {rows * length:,} tokens in "
        f"{config.train.accumulation} micro-batch(es)",
        {"rows": rows, "max_length": length, "accumulation": config.train.accumulation},
    )


def _memory_line(memory: Memory, limit: float) -> str:
    of = "" if limit == float("inf") else f" of {_gb(limit)}"
    parts = f"arguments {_gb(memory.arguments)}, temporaries {_gb(memory.temporaries)}, "
    return f"memory a device: {parts if memory.arguments else ''}peak {_gb(memory.peak)}{of}"


def _remedy_line(fit: Fit | None, target: Target) -> str:
    if fit is not None:
        return f"config.train.accumulation={fit.accumulation} would: {_gb(fit.peak)} a device"
    return f"no number of micro-batches would; try {', '.join(other_ways(target))}"


def _work_line(work: Work, collectives: dict[str, int]) -> str:
    moved = ", ".join(f"{kind} {_gb(size)}" for kind, size in sorted(collectives.items())) or "none"
    return (
        f"work a device: {work.flops / 1e12:.3g} TFLOP, {_gb(work.bytes_moved)} to and from memory; "
        f"collectives: {moved}"
    )


def _speed_lines(target: Target, work: Work, chip: Chip) -> Iterator[Cost]:
    arithmetic, memory = seconds(work, chip)
    bound = "arithmetic" if arithmetic >= memory else "memory"
    yield Cost(
        f"at the peaks {1e3 * arithmetic:.1f} ms of arithmetic, {1e3 * memory:.1f} ms of memory: bound by {bound}",
        {"seconds_of_arithmetic": arithmetic, "seconds_of_memory": memory},
    )
    tokens = target.config.train.batch_size * target.config.data.max_length
    low, high = tokens_per_second(tokens, work, chip)
    yield Cost(
        f"expected: {low:,.0f} to {high:,.0f} tokens/s (from {REACHED:.0%} of both peaks, one after the other, to "
        "all of them, overlapped)",
        {"tokens_per_s": [low, high]},
    )


def _batch_line(batch: LargestBatch) -> str:
    return (
        f"largest batch: about {batch.rows:,} rows (by the line through {batch.smaller:,} and {batch.larger:,}, "
        "in 95 % of the memory)"
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
