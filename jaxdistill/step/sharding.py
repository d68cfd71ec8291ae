"""Device meshes, and how arrays are split over them."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxdistill.errors import UserError
from jaxdistill.step.settings import MeshConfig

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


class Meshes(NamedTuple):
    """The devices of student and teacher: one mesh for both, or one for each."""

    student: Mesh
    teacher: Mesh

    @property
    def separate(self) -> bool:
        """Whether teacher and student run on different devices, and so as two programs."""
        return self.teacher != self.student


def make_meshes(settings: MeshConfig, *, student: int, teacher: int) -> Meshes:
    """The first `student` devices and the `teacher` devices after them; 0 and 0 give one mesh of all for both.

    Raises:
      UserError: the devices are not there, or the axes do not multiply to them.
    """
    make = partial(make_mesh, data=settings.data, fsdp=settings.fsdp)
    if not student and not teacher:
        mesh = make()
        return Meshes(mesh, mesh)
    asked = f"config.student.devices={student} and config.teacher.devices={teacher}"
    if jax.process_count() > 1:
        raise UserError(f"{asked} are for one process, and here are {jax.process_count()}; set both to 0")
    devices = jax.devices()
    if student + teacher > len(devices):
        raise UserError(f"{asked} are more than the {len(devices)} devices here; lower one of them")
    return Meshes(make(devices=devices[:student]), make(devices=devices[student : student + teacher]))


def by_batch(mesh: Mesh, *, axis: int = 0) -> NamedSharding:
    """Rows, which are `axis` of an array, split over every device."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXES))


def matching_rows(a: Mesh, b: Mesh, *, axis: int) -> tuple[NamedSharding, NamedSharding]:
    """Shardings of rows that match on two meshes: as fine as both allow, with copies where a mesh has more devices.

    Between two such shardings jax.device_put copies from device to device, and returns at once. Between other
    shardings the copy goes through the host, and waits there for the array to be computed.
    """
    pieces = math.gcd(a.size, b.size)

    def split(mesh: Mesh) -> NamedSharding:
        devices = mesh.devices.reshape(pieces, -1)
        return NamedSharding(Mesh(devices, ("rows", "copies")), PartitionSpec(*[None] * axis, "rows"))

    return split(a), split(b)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def by_rule(tree: PyTree, mesh: Mesh, *, smallest: int = 2**14) -> PyTree:
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
    """Global arrays on the devices, of which this host supplies its own rows."""
    return jax.make_array_from_process_local_data(by_batch(mesh), batch)
