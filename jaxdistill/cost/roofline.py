"""The time that work takes on devices of known peaks."""

from typing import NamedTuple

from jaxdistill.step.chips import Chip

# The share of the peaks that a well-filled training step reaches, for the pessimistic end of a range.
REACHED = 0.4


class Work(NamedTuple):
    """The work of one update, on each device."""

    flops: float
    bytes_moved: float  # to and from its memory


def seconds(work: Work, chip: Chip) -> tuple[float, float]:
    """(arithmetic, memory) at the chip's peaks; the larger is the bound."""
    return work.flops / chip.flops, work.bytes_moved / chip.bandwidth


def tokens_per_second(tokens: int, work: Work, chip: Chip) -> tuple[float, float]:
    """(low, high) for an update of `tokens` tokens.

    Low: at REACHED of both peaks, with arithmetic and memory one after the other. High: at the peaks, fully overlapped.
    """
    arithmetic, memory = seconds(work, chip)
    return tokens * REACHED / (arithmetic + memory), tokens / max(arithmetic, memory)
