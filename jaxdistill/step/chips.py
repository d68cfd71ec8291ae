"""The peaks of known devices."""

from typing import Any, NamedTuple

GB = 1e9


class Chip(NamedTuple):
    """Peaks of one device, from its maker's pages."""

    flops: float  # a second, in bfloat16
    bandwidth: float  # bytes a second, of its memory
    memory: float  # bytes


# By the start of jax's device_kind. A v4 or v5p chip is one device with two cores.
CHIPS = {
    "TPU v4": Chip(275e12, 1228 * GB, 32 * 2**30),
    "TPU v5 lite": Chip(197e12, 819 * GB, 16 * 2**30),
    "TPU v5": Chip(459e12, 2765 * GB, 95 * 2**30),
    "TPU v6 lite": Chip(918e12, 1640 * GB, 32 * 2**30),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 1555 * GB, 40 * 2**30),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 2039 * GB, 80 * 2**30),
    "NVIDIA H100": Chip(989e12, 3350 * GB, 80 * 2**30),
    "NVIDIA H200": Chip(989e12, 4800 * GB, 141 * 2**30),
}


def chip_of(device: Any) -> Chip | None:
    """The peaks of a device, by the longest name in CHIPS; None for a CPU, or a kind that is not in the table."""
    names = sorted((name for name in CHIPS if device.device_kind.startswith(name)), key=len)
    return CHIPS[names[-1]] if names else None
