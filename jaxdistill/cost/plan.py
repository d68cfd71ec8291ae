"""The cost of a run's updates before a machine is rented: counts in the compiled programs, as lines to print."""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax

from jaxdistill import recipe
from jaxdistill.cost.depth import Line, line_of, measure_by_depth
from jaxdistill.cost.estimate import Fit, LargestBatch, find_fit, find_largest_batch, other_ways
from jaxdistill.cost.program import (
    UPDATE,
    Programs,
    Target,
    bytes_of_teachers,
    collectives_of,
    devices_of,
    measure,
    meshes_on,
    peak,
    work_of,
)
from jaxdistill.cost.roofline import REACHED, Work, seconds, tokens_per_second
from jaxdistill.data.teacher_cache import bytes_per_token
from jaxdistill.jobs.cache import meta_of
from jaxdistill.losses.objective import make_objective
from jaxdistill.losses.terms import teacher_layers
from jaxdistill.models.arithmetic import forward_flops
from jaxdistill.models.model import common_words, count_params, in_millions
from jaxdistill.run.models import pair_of_shapes
from jaxdistill.run.teacher_cache import cannot_serve
from jaxdistill.run.training import check_devices
from jaxdistill.step.chips import Chip, chip_of


class Cost(NamedTuple):
    """A line about the cost of an update, and the figures in it."""

    line: str
    figures: dict[str, Any]


def plan(path: str, overrides: Sequence[str], *, topology: str, whole: bool = False) -> Iterator[Cost]:
    """Compiles the update of a recipe, for the devices here or for a TPU slice, and yields what it costs.

    Each line comes as soon as it is known, because compilation takes long. No weights and no text are read.

    Args:
      whole: compile all layers of deep models, where a line through few layers would do (`cost.depth`).

    Raises:
      UserError: anything that would stop the run itself before its text is read; an unknown slice.
    """
    target = read_target(path, overrides, topology=topology)
    yield from _target_lines(target)
    limit = _limit(target)
    line = None if whole else line_of(target)
    programs = line and measure_by_depth(target, line)
    if programs is None:
        programs, line = measure(target), None
    if line:
        yield _depth_line(line)
    yield from _memory_lines(programs, target)
    # A step of the search compiles as the plan itself did.
    measure_again: Callable[[Target], Programs] = partial(_measured, line=line)
    if peak(programs) > limit:
        yield Cost(f"does not fit: {_gb(peak(programs))} of {_gb(limit)} a device", {"limit": limit})
        fit = find_fit(target, limit, measure_again)
        yield Cost(_remedy_line(fit, target, limit), _remedy(fit))
    if any(one.work is None for one in programs.values()):
        return
    yield from _work_lines(programs, target)
    yield from saved_by_cache(target)
    chip = chip_of(target.devices[0])
    if chip and peak(programs) <= limit:
        yield from _speed_lines(target, work_of(programs), chip)
        if batch := find_largest_batch(target, programs, measure_again, limit=0.95 * limit):
            yield Cost(_batch_line(batch), {"largest_batch": batch.rows})


def read_target(path: str, overrides: Sequence[str], *, topology: str) -> Target:
    """The update that a recipe describes, on the devices here or on those of a TPU slice.

    Raises:
      UserError: as `plan`.
    """
    # A run needs text, and its cost does not depend on which: any path will do, as none is read.
    config = recipe.read(path, ["--config.data.path=none", *overrides])
    if not config.train.accumulation:  # the fewest that fit: the plan says how many, where one does not
        config = config.changed(train={"accumulation": 1})
    meshes = meshes_on(config, devices_of(topology) if topology else jax.devices())
    check_devices(config, meshes)
    return Target(config, pair_of_shapes(config), meshes)


def _measured(target: Target, *, line: Line | None) -> Programs:
    return (line and measure_by_depth(target, line)) or measure(target)


def _limit(target: Target) -> float:
    chip = chip_of(target.devices[0])
    return chip.memory if chip else float("inf")


def _target_lines(target: Target) -> Iterator[Cost]:
    config, pair, meshes = target
    roles = [("teacher", pair.teacher, pair.teacher_params), ("student", pair.student, pair.student_params)]
    others = zip(pair.others, pair.others_params, strict=True)
    roles[1:1] = [(f"teacher {i}", model, params) for i, (model, params) in enumerate(others, start=2)]
    models = [f"{role} {model.config.model_type} {in_millions(params)}" for role, model, params in roles if model]
    if pair.cached is not None:
        answers = ", ".join(config.teacher.caches)
        models.insert(0, f"teacher {pair.cached.model.config.model_type} with its answers in {answers}")
    sides = meshes._asdict() if meshes.separate else {"": meshes.student}
    kind, size = target.devices[0].device_kind, len(target.devices)
    shapes = {side: dict(mesh.shape) for side, mesh in sides.items()}
    shape = shapes if meshes.separate else shapes[""]
    yield Cost(
        f"{', '.join(models)} parameters; {size} x {kind}, mesh {json.dumps(shape)}",
        {
            "parameters": {role: count_params(params) for role, model, params in roles if model},
            "devices": size,
            "device_kind": kind,
            "mesh": shape,
        },
    )
    rows, length = config.train.batch_size, config.data.max_length
    yield Cost(
        f"an update: {rows:,} rows x {length} = {rows * length:,} tokens in "
        f"{config.train.accumulation} micro-batch(es)",
        {"rows": rows, "max_length": length, "accumulation": config.train.accumulation},
    )


def _depth_line(line: Line) -> Cost:
    sides = [f"{side} {at.small} and {at.larger} of {at.whole}" for side, at in line._asdict().items() if at.steps]
    return Cost(
        f"compiled with few layers ({', '.join(sides)}) and reckoned along the line; --whole compiles all",
        {"layers_compiled": {side: [at.small, at.larger] for side, at in line._asdict().items() if at.steps}},
    )


def _memory_lines(programs: Programs, target: Target) -> Iterator[Cost]:
    limit, most = _limit(target), peak(programs)
    of = "" if limit == float("inf") else f" of {_gb(limit)}"
    for name, one in programs.items():
        memory, whose = one.memory, "" if name == UPDATE else f", {name}"
        parts = f"arguments {_gb(memory.arguments)}, temporaries {_gb(memory.temporaries)}, "
        line = f"memory a device{whose}: {parts if memory.arguments else ''}peak {_gb(memory.peak)}{of}"
        figures: dict[str, Any] = {} if name != UPDATE else {"memory": memory._asdict() | {"peak": most}}
        yield Cost(line, figures | {"fits": most <= limit})
    if len(programs) > 1:
        yield Cost(f"memory a device, with what stays while text is written: peak {_gb(most)}{of}", {})


def _remedy(fit: Fit | None) -> dict[str, Any]:
    return {
        "fitting": fit.settings if fit else None,
        "fitting_accumulation": fit.settings.get("train.accumulation") if fit else None,
    }


def _remedy_line(fit: Fit | None, target: Target, limit: float) -> str:
    if fit is not None:
        settings = " ".join(f"config.{key}={value}" for key, value in fit.settings.items())
        return f"{settings} would: {_gb(fit.peak)} a device"
    ways = ", ".join(other_ways(target, limit))
    return f"no number of micro-batches would, nor any way to split or to compute again; try {ways}"


def _work_lines(programs: Programs, target: Target) -> Iterator[Cost]:
    work, collectives = work_of(programs), collectives_of(programs)
    moved = ", ".join(f"{kind} {_gb(size)}" for kind, size in sorted(collectives.items())) or "none"
    for side, one in work.items():
        whose = f" of the {side}" if target.meshes.separate else ""
        yield Cost(
            f"work a device{whose}: {one.flops / 1e12:.3g} TFLOP, {_gb(one.bytes_moved)} to and from memory; "
            f"collectives: {moved}",
            {**one._asdict(), "collectives": collectives},
        )
    sizes = {side: mesh.size for side, mesh in target.meshes._asdict().items()}
    flops = sum(one.flops * sizes[side] for side, one in work.items())
    yield Cost(
        f"work of all devices: {flops / 1e12:.3g} TFLOP an update",
        {"total_flops": flops, "programs": {name: _figures(one) for name, one in programs.items()}},
    )


def saved_by_cache(target: Target) -> Iterator[Cost]:
    """What `teacher.cache` would save of an update with a teacher that runs, and read; where it can serve the losses.

    The teacher's arithmetic is counted by the formula of models/arithmetic.py; nothing is compiled.
    """
    config, pair, _ = target
    if pair.teacher is None or config.samples:
        return
    objective = make_objective(config.loss, config.policy, pair)
    masked = not pair.student.family.causal
    layers = tuple(sorted(i - 1 for i in teacher_layers(objective, last=pair.teacher.num_layers)[0]))
    words = common_words(pair.student, *pair.teachers)
    config = config.changed(cache={"layers": layers})
    meta = meta_of(config, pair.teacher, words=words, fingerprint="")
    if cannot_serve(config, meta, objective, pair.teacher):
        return
    tokens, length = config.train.batch_size * config.data.max_length, config.data.max_length
    answered = round(tokens * (config.mask.fraction if masked and meta.tokens == "labels" else 1.0))
    share = config.mask.fraction if masked and config.loss.tokens == "masked" else 1.0
    flops = tokens * sum(forward_flops(teacher, length=length, head_share=share) for teacher in pair.teachers)
    of_hidden = 2 * meta.width * len(meta.layers)
    read = len(pair.teachers) * answered * bytes_per_token(meta) + tokens * of_hidden
    kept, each = bytes_of_teachers(target), " for each teacher" * bool(pair.others)
    hidden = f" and {of_hidden:,} bytes of hidden states for every token" * bool(of_hidden)
    again = "; it needs config.mask.epochs and config.mask.group=1" * (
        masked and not (config.mask.epochs and config.mask.group == 1)
    )
    yield Cost(
        f"with teacher.cache: {flops / 1e12:.3g} TFLOP an update and {_gb(kept)} of parameters a device less, and "
        f"{read / 1e6:.3g} MB an update to read, {bytes_per_token(meta)} bytes of kind {meta.kind} for each of "
        f"{answered:,} tokens{each}{hidden}{again}",
        {"saved_by_cache": {"flops": flops, "bytes": kept, "bytes_read": read}},
    )


def _speed_lines(target: Target, work: dict[str, Work], chip: Chip) -> Iterator[Cost]:
    # Where the two models have devices of their own, the slower side sets the pace.
    slowest = max(work.values(), key=lambda one: max(seconds(one, chip)))
    arithmetic, memory = seconds(slowest, chip)
    bound = "arithmetic" if arithmetic >= memory else "memory"
    yield Cost(
        f"at the peaks {1e3 * arithmetic:.1f} ms of arithmetic, {1e3 * memory:.1f} ms of memory: bound by {bound}",
        {"seconds_of_arithmetic": arithmetic, "seconds_of_memory": memory},
    )
    tokens = target.config.train.batch_size * target.config.data.max_length
    low, high = tokens_per_second(tokens, slowest, chip)
    yield Cost(
        f"expected: {low:,.0f} to {high:,.0f} tokens/s (from {REACHED:.0%} of both peaks, one after the other, to "
        "all of them, overlapped)",
        {"tokens_per_s": [low, high]},
    )


def _figures(one: Any) -> dict[str, Any]:
    return {"times": one.times, "side": one.side, "memory": one.memory._asdict(), **one.work._asdict()}


def _batch_line(batch: LargestBatch) -> str:
    return (
        f"largest batch: about {batch.rows:,} rows (by the line through {batch.smaller:,} and {batch.larger:,}, "
        "in 95 % of the memory)"
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
