"""The kernels of attention by name, for the layers that need neither its probabilities nor dropout on them.

None serves every layer, so a name is what is asked for, and `kernel_for` says what runs.
"""

from collections.abc import Callable
from typing import Literal

import jax

from jaxdistill.models.core.attention import Attended, Heads, platform, visible, written_out
from jaxdistill.models.core.splash import splash
from jaxdistill.models.core.tiles import tiled

# Platform -> queries x keys from which `xla` takes tiles. On a CPU they are the faster way from here on; for a v5e the
# compiler expects as much, and memory that does not grow; on a GPU they save memory alone (docs/performance.md).
LONG = {"cpu": 512**2, "tpu": 1024**2, "gpu": 2048**2}


def _own(inputs: Attended, *, scale: float, cap: float) -> Heads:
    return written_out(inputs, scale=scale, cap=cap)[0]


def _jax(implementation: Literal["xla", "cudnn"]) -> Callable[..., Heads]:
    """jax.nn.dot_product_attention, which has no cap, and holds a mask of [batch, queries, keys] in memory.

    The kernel of cudnn takes 16-bit numbers on an NVIDIA GPU. It is lowered for one in the tests, and ran on an H200.
    """

    def kernel(inputs: Attended, *, scale: float, cap: float) -> Heads:
        assert not cap
        mask = visible(inputs.queries, inputs.keys, inputs.reach)[:, None]
        return jax.nn.dot_product_attention(
            inputs.query, inputs.key, inputs.value, mask=mask, scale=scale, implementation=implementation
        )

    return kernel


# Name of a kernel, as in the setting `attention` -> the kernel, with the arguments of `attend`.
KERNELS: dict[str, Callable[..., Heads]] = {
    "own": _own,
    "xla": _jax("xla"),
    "cudnn": _jax("cudnn"),
    "tiles": tiled,
    "splash": splash,
}


def kernel_for(asked: str, inputs: Attended, *, platform: str, cap: float) -> str:
    """The name of the kernel that runs where `asked` is asked for: that one, if it can serve, else as for `xla`."""
    queries, keys, size = inputs.query.shape[1], inputs.key.shape[1], inputs.query.shape[3]
    known = all(isinstance(steps, int) for steps in inputs.reach)  # when the program is compiled
    serves = {"splash": known and queries == keys, "cudnn": not cap and size % 8 == 0 and size <= 256}
    if asked != "xla" and serves.get(asked, True):
        return asked
    if queries * keys >= LONG[platform]:
        return "tiles"
    return "own" if cap else "xla"


def attend(name: str, inputs: Attended, *, scale: float, cap: float = 0.0) -> Heads:
    """Attention by the kernel that is asked for by this name; see `attention.written_out` for the arguments."""
    chosen = kernel_for(name, inputs, platform=platform(), cap=cap)
    return KERNELS[chosen](inputs, scale=scale, cap=cap).astype(inputs.value.dtype)
