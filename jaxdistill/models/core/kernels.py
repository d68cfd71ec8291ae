"""The kernels of attention by name, for the layers that need neither its probabilities nor dropout on them.

None serves every layer, so a name is what is asked for, and `kernel_for` says what runs.
"""

from collections.abc import Callable
from typing import Literal

import jax
from jaxtyping import Array, Float

from jaxdistill.models.core.attention import Reach, Tokens, platform, visible, written_out
from jaxdistill.models.core.splash import splash
from jaxdistill.models.core.tiles import tiled

# Platform -> queries x keys from which `xla` takes tiles. On a CPU they are the faster way from here on; for a v5e the
# compiler expects as much, and memory that does not grow (benchmarks/attention.py). Nothing was measured on a GPU.
LONG = {"cpu": 512**2, "tpu": 1024**2, "gpu": 2048**2}


def _own(
    query: Array, key: Array, value: Array, queries: Tokens, keys: Tokens, reach: Reach, *, scale: float, cap: float
) -> Array:
    return written_out(query, key, value, queries, keys, reach, scale=scale, cap=cap)[0]


def _jax(implementation: Literal["xla", "cudnn"]) -> Callable[..., Array]:
    """jax.nn.dot_product_attention, which has no cap, and holds a mask of [batch, queries, keys] in memory.

    The kernel of cudnn takes 16-bit numbers on an NVIDIA GPU. It is lowered for one in the tests; nobody has run it.
    """

    def kernel(
        query: Array, key: Array, value: Array, queries: Tokens, keys: Tokens, reach: Reach, *, scale: float, cap: float
    ) -> Array:
        assert not cap
        mask = visible(queries, keys, reach)[:, None]
        return jax.nn.dot_product_attention(query, key, value, mask=mask, scale=scale, implementation=implementation)

    return kernel


# Name of a kernel, as in the setting `attention` -> the kernel, with the arguments of `attend`.
KERNELS: dict[str, Callable[..., Array]] = {
    "own": _own,
    "xla": _jax("xla"),
    "cudnn": _jax("cudnn"),
    "tiles": tiled,
    "splash": splash,
}


def kernel_for(asked: str, *, platform: str, queries: int, keys: int, reach: Reach, size: int, cap: float) -> str:
    """The name of the kernel that runs where `asked` is asked for: that one, if it can serve, else as for `xla`.

    Args:
      queries, keys: their numbers in a row; they differ where there is a cache.
      size: of a head.
      cap: of the scores; 0 = none.
    """
    known = isinstance(reach.before, int) and isinstance(reach.after, int)  # when the program is compiled
    serves = {"splash": known and queries == keys, "cudnn": not cap and size % 8 == 0 and size <= 256}
    if asked != "xla" and serves.get(asked, True):
        return asked
    if queries * keys >= LONG[platform]:
        return "tiles"
    return "own" if cap else "xla"


def attend(
    name: str,
    query: Float[Array, "batch queries heads size"],
    key: Float[Array, "batch keys kv_heads size"],
    value: Float[Array, "batch keys kv_heads size"],
    queries: Tokens,
    keys: Tokens,
    reach: Reach,
    *,
    scale: float,
    cap: float = 0.0,
) -> Float[Array, "batch queries heads size"]:
    """Attention by the kernel that is asked for by this name; see `attention.written_out` for the arguments."""
    sizes = {"queries": query.shape[1], "keys": key.shape[1], "size": query.shape[3]}
    chosen = kernel_for(name, platform=platform(), **sizes, reach=reach, cap=cap)
    return KERNELS[chosen](query, key, value, queries, keys, reach, scale=scale, cap=cap).astype(value.dtype)
