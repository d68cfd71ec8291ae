"""The device mesh and where arrays lie on it."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdistill.errors import UserError

AXES = ("data", "fsdp")  # both split the batch; fsdp splits the parameters as well


def make_mesh(*, data: int, fsdp: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A (data, fsdp) mesh over `devices`, or all there are; data=-1 takes all that fsdp leaves.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if data == -1 and len(devices) % fsdp == 0:
        data = len(devices) // fsdp
    if data * fsdp != len(devices):
        raise UserError(f"config.mesh.data={data} x config.mesh.fsdp={fsdp} must be the {len(devices)} devices here")
    return Mesh(np.asarray(devices).reshape(data, fsdp), AXES)


def by_batch(mesh: Mesh) -> NamedSharding:
    """Rows split over every device."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def by_rule(tree: Any, mesh: Mesh, *, smallest: int = 2**14) -> Any:
    """A sharding for every leaf: its longest axis that fsdp divides is split, small leaves are replicated.

    Args:
      tree: arrays or their shapes (parameters, or optimizer state over them).
      smallest: elements below which splitting costs more than it saves.
    """
    size = mesh.shape["fsdp"]

    def rule(leaf: Any) -> NamedSharding:
        axes = [i for i, n in enumerate(leaf.shape) if n % size == 0]
        if size == 1 or not axes or math.prod(leaf.shape) < smallest:
            return replicated(mesh)
        split = max(axes, key=lambda i: leaf.shape[i])
        return NamedSharding(mesh, PartitionSpec(*[None] * split, "fsdp"))

    return jax.tree.map(rule, tree)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes global arrays of this host's rows."""
    return jax.make_array_from_process_local_data(by_batch(mesh), batch)
