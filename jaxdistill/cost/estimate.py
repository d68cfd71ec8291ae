"""What would make an update fit, and the largest batch that fits: found by compiling the update at other settings."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from jaxdistill.cost.program import Programs, Target, kept_bytes, meshes_on, peak
from jaxdistill.models.model import Model

Measure = Callable[[Target], Programs]


class Fit(NamedTuple):
    """Settings with which an update fits."""

    settings: dict[str, Any]  # by dotted key, those that change
    peak: int  # bytes a device


class LargestBatch(NamedTuple):
    """The largest number of rows that fits, by the line through two compiled sizes."""

    rows: int
    smaller: int  # rows of the smaller of the two sizes
    larger: int


def find_fit(target: Target, limit: float, measure: Measure) -> Fit | None:
    """The first settings that fit in `limit` bytes a device, from those that cost little time to those that cost more.

    In turn, each together with those before it: more micro-batches; parameters split over all devices; each layer's
    activations computed again; attention that does not write its scores out; the work on a row shared by devices. Of
    the numbers of micro-batches that fit, the smallest is taken, by doubling.
    """
    now = target.config.train.accumulation
    for settings in _stages(target):
        changed = _changed(target, settings)
        if kept_bytes(changed) > limit:  # no number of micro-batches helps
            continue
        counts = list(_accumulations(changed, again=bool(settings)))
        if not counts:
            continue
        size = peak(measure(_in_pieces(changed, counts[-1])))
        if size > limit:
            continue
        fewest = counts[-1]
        for accumulation in counts[:-1]:
            found = peak(measure(_in_pieces(changed, accumulation)))
            if found <= limit:
                fewest, size = accumulation, found
                break
        return Fit(settings | ({} if fewest == now else {"train.accumulation": fewest}), size)
    return None


def _accumulations(target: Target, *, again: bool) -> Iterator[int]:
    """Numbers of micro-batches, from that of the target by doubling; its own only where it is to be tried again."""
    train = target.config.train
    accumulation = train.accumulation * (1 if again else 2)
    while train.batch_size % (accumulation * target.smallest_piece) == 0:
        yield accumulation
        accumulation *= 2


def _in_pieces(target: Target, accumulation: int) -> Target:
    return target.with_rows(target.config.train.batch_size, accumulation)


def _stages(target: Target) -> Iterator[dict[str, Any]]:
    """Settings to try, each with those before it, as long as they change something."""
    config, pair = target.config, target.pair
    settings: dict[str, Any] = {}
    yield settings
    whole = min(mesh.size // config.mesh.tensor for mesh in target.meshes)
    if config.mesh.fsdp < whole:
        settings = settings | {"mesh.fsdp": whole}
        yield settings
    if config.student.remat != "full" and not pair.student.scan:
        settings = settings | {"student.remat": "full"}
        yield settings
    models = [("student", pair.student), *(("teacher", teacher) for teacher in pair.teachers)]
    if written := {role for role, model in models if model.core and not model.attention}:
        settings = settings | {f"{role}.attention": "tiles" for role in written}
        yield settings
    fewest = min(mesh.size for mesh in target.meshes)
    for tensor in (2, 4, 8):
        whole = all(mesh.size % tensor == 0 for mesh in target.meshes)
        if whole and tensor > config.mesh.tensor and all(_divides(tensor, model) for _, model in models):
            yield settings | {"mesh.tensor": tensor, "mesh.fsdp": fewest // tensor}


def _divides(tensor: int, model: Model) -> bool:
    heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    return heads % tensor == 0


def _changed(target: Target, settings: dict[str, Any]) -> Target:
    by_section: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        section, name = key.split(".")
        by_section.setdefault(section, {})[name] = value
    if "mesh" in by_section:
        by_section["mesh"]["data"] = -1
    config, pair = target.config.changed(**by_section), target.pair
    if attention := by_section.get("student", {}).get("attention"):
        pair = pair._replace(student=replace(pair.student, attention=attention))
    if pair.teacher is not None and (attention := by_section.get("teacher", {}).get("attention")):
        first, *others = (replace(teacher, attention=attention) for teacher in pair.teachers)
        pair = pair._replace(teacher=first, others=tuple(others))
    return Target(config, pair, meshes_on(config, target.devices))


def other_ways(target: Target, limit: float) -> list[str]:
    """What to change where none of the settings that `find_fit` tries is enough."""
    c = target.config
    kept, devices = kept_bytes(target) * target.meshes.student.size, target.meshes.student.size
    ways = [f"a slice of more than {devices} devices"]
    if c.mesh.fsdp == devices and kept > limit * devices:
        ways = [f"at least {int(kept // limit) + 1} devices"]
    ways += (
        ["a smaller config.train.batch_size"]
        if c.train.batch_size > c.train.accumulation * target.smallest_piece
        else []
    )
    ways += ["config.student.dtype=bfloat16"] if c.student.dtype == "float32" else []
    ways += ["config.teacher.dtype=bfloat16"] if c.teacher.dtype == "float32" and c.teacher.name else []
    masked = not target.pair.student.family.causal
    ways += ["config.loss.tokens=masked"] if masked and c.loss.tokens == "all" else []
    return ways


def find_largest_batch(target: Target, programs: Programs, measure: Measure, *, limit: float) -> LargestBatch | None:
    """Compiles half the batch beside the whole, which is given; None where the batch cannot be halved."""
    rows, accumulation = target.config.train.batch_size, target.config.train.accumulation
    step = accumulation * target.smallest_piece
    if rows < 2 * step:
        return None
    half = rows // 2 // step * step
    smaller = peak(measure(target.with_rows(half, accumulation)))
    return LargestBatch(largest((half, smaller), (rows, peak(programs)), step=step, limit=limit), half, rows)


def largest(smaller: tuple[int, int], larger: tuple[int, int], *, step: int, limit: float) -> int:
    """Rows that fit in `limit` bytes, in multiples of `step`, by the line through two (rows, bytes).

    Where more rows take no more memory, there is no such line, and the answer is the larger number of rows.
    """
    (first, low), (second, high) = smaller, larger
    slope = (high - low) / (second - first)
    if slope <= 0:
        return second
    return max(int((limit - low) / slope + first) // step * step, 0)
