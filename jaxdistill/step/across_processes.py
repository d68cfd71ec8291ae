"""What several processes decide together while they train, and arrays that lie on the devices of all of them."""

from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, PyTree

# Steps after which an answer is read. By then its program has run, or waits for steps that the devices are computing;
# to ask and wait in every step would keep them idle between two steps.
LAG = 2


class Agreement:
    """Flags that hold as soon as they hold in one process; every process learns of them at the same step."""

    def __init__(self) -> None:
        # The answers that are not read yet, and which of their flags still count.
        self.asked: deque[tuple[Array, Bool[np.ndarray, "flags"]]] = deque()
        if jax.process_count() > 1:
            self.rows = NamedSharding(Mesh(np.asarray(jax.devices()), ("devices",)), PartitionSpec("devices"))
            everywhere = NamedSharding(self.rows.mesh, PartitionSpec())
            self.any = jax.jit(lambda flags: jnp.any(flags, axis=0), out_shardings=everywhere)

    def ask(self, flags: Bool[np.ndarray, "flags"]) -> Bool[np.ndarray, "flags"]:
        """The flags of LAG calls ago, each true where it was in any process; of this call where there is one process.

        All processes call this at the same steps.
        """
        if jax.process_count() == 1:
            return flags
        own = np.tile(flags, (jax.local_device_count(), 1))
        answer = self.any(jax.make_array_from_process_local_data(self.rows, own))
        self.asked.append((answer, np.ones_like(flags)))
        if len(self.asked) <= LAG:
            return np.zeros_like(flags)
        answer, counts = self.asked.popleft()
        return np.asarray(answer) & counts

    def forget(self, flags: Bool[np.ndarray, "flags"]) -> None:
        """Takes back these flags in what was asked until now: what they asked for was done."""
        self.asked = deque((answer, counts & ~flags) for answer, counts in self.asked)


def on_host(tree: PyTree) -> PyTree:
    """The whole arrays in the memory of every process, which all call this; gathered one after the other."""
    return jax.tree.map(_whole, tree)


def _whole(x: Array) -> np.ndarray:
    return np.asarray(multihost_utils.process_allgather(x, tiled=True) if _is_elsewhere(x) else x)


def _is_elsewhere(x: Array) -> bool:
    """Whether a part of an array lies on devices of other processes alone."""
    return isinstance(x, Array) and not x.is_fully_addressable and not x.is_fully_replicated
