"""What would make a step fit, and the largest batch that fits: found by compiling the step at other sizes."""

from typing import NamedTuple

from jaxdistill.cost.program import Memory, Target, compile_step


class Fit(NamedTuple):
    """A number of micro-batches with which a step fits."""

    accumulation: int
    peak: int  # bytes a device


class LargestBatch(NamedTuple):
    """The largest number of rows that fits, by the line through two compiled sizes."""

    rows: int
    smaller: int  # rows of the smaller of the two sizes
    larger: int


def find_fit(target: Target, limit: float) -> Fit | None:
    """The fewest micro-batches, by doubling, with which the step fits in `limit` bytes a device; None: no number does.

    More micro-batches are tried first, because they change nothing but the memory.
    """
    train = target.config.train
    accumulation = 2 * train.accumulation
    while train.batch_size % (accumulation * target.config.mask.group * target.mesh.size) == 0:
        _, memory = compile_step(target, rows=train.batch_size, accumulation=accumulation)
        if memory.peak <= limit:
            return Fit(accumulation, memory.peak)
        accumulation *= 2
    return None


def other_ways(target: Target) -> list[str]:
    """The settings that save memory where micro-batches do not help."""
    c = target.config
    ways = [f"config.mesh.fsdp={2 * c.mesh.fsdp}", "more devices", "a smaller config.train.batch_size"]
    ways += ["config.student.dtype=bfloat16"] if c.student.dtype == "float32" else []
    ways += ["config.teacher.dtype=bfloat16"] if c.teacher.dtype == "float32" and c.teacher.name else []
    ways += ["config.student.remat=dots"] if not c.student.remat else []
    masked = not target.pair.student.family.causal
    ways += ["config.loss.tokens=masked"] if masked and c.loss.tokens == "all" else []
    return ways


def find_largest_batch(target: Target, memory: Memory, *, limit: float) -> LargestBatch | None:
    """Compiles half the batch beside the whole, whose memory is given; None where the batch cannot be halved."""
    rows, accumulation = target.config.train.batch_size, target.config.train.accumulation
    step = accumulation * target.config.mask.group * target.mesh.size
    if rows < 2 * step:
        return None
    half = rows // 2 // step * step
    _, memory_of_half = compile_step(target, rows=half, accumulation=accumulation)
    return LargestBatch(largest((half, memory_of_half), (rows, memory), step=step, limit=limit), half, rows)


def largest(smaller: tuple[int, Memory], larger: tuple[int, Memory], *, step: int, limit: float) -> int:
    """Rows that fit in `limit` bytes, in multiples of `step`, by the line through two (rows, memory).

    Where more rows take no more memory, there is no such line, and the answer is the larger number of rows.
    """
    (first, low), (second, high) = smaller, larger
    slope = (high.peak - low.peak) / (second - first)
    if slope <= 0:
        return second
    return max(int((limit - low.peak) / slope + first) // step * step, 0)
