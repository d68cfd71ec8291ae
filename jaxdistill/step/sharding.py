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
from jaxdistill.models.axes import AXES, ROWS, TENSOR, row_devices
from jaxdistill.models.families import Family
from jaxdistill.models.head import Head
from jaxdistill.models.pair import Pair
from jaxdistill.models.partition import Cut, cut_of, is_split
from jaxdistill.step.optimizer import path_name
from jaxdistill.step.settings import MeshConfig


def make_mesh(*, data: int, fsdp: int, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over `devices`, or all there are; data=-1 takes all that the others leave.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if data == -1 and len(devices) % (fsdp * tensor) == 0:
        data = len(devices) // (fsdp * tensor)
    if data * fsdp * tensor != len(devices):
        split = f" x config.mesh.tensor={tensor}" if tensor > 1 else ""
        raise UserError(
            f"config.mesh.data={data} x config.mesh.fsdp={fsdp}{split} must be the {len(devices)} devices here; set "
            f"config.mesh.data to -1, and config.mesh.fsdp and tensor so that their product divides {len(devices)}"
        )
    return Mesh(np.asarray(devices).reshape(data, fsdp, tensor), AXES)


def mesh_here(settings: MeshConfig) -> Mesh:
    """A mesh of all devices here, which split parameters as the settings say, as far as their number allows."""
    tensor = math.gcd(settings.tensor, jax.local_device_count())  # devices of one process share rows
    return make_mesh(data=-1, fsdp=math.gcd(settings.fsdp, jax.device_count() // tensor), tensor=tensor)


def mesh_of_flags(*, fsdp: int, tensor: int) -> Mesh:
    """A mesh of all devices, for a command whose flags --fsdp and --tensor say how many of them split a model.

    Raises:
      UserError: they do not divide the devices.
    """
    count, own = jax.device_count(), jax.local_device_count()
    if fsdp < 1 or tensor < 1 or count % (fsdp * tensor):
        raise UserError(f"--fsdp {fsdp} x --tensor {tensor} must divide the {count} devices here; lower one of them")
    if own % tensor:  # each process has the rows of its own devices
        raise UserError(f"--tensor {tensor} must divide the {own} devices of each process; lower it, and raise --fsdp")
    return make_mesh(data=-1, fsdp=fsdp, tensor=tensor)


def local_mesh(shapes: PyTree) -> Mesh | None:
    """The devices of this process, which split a model that it works on alone; None where one of them has room for it.

    Args:
      shapes: of the parameters, which are kept in float32.
    """
    own = jax.local_devices()
    size = 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    room = (own[0].memory_stats() or {}).get("bytes_limit", _ROOM) // 3  # as the proof of an export holds a model twice
    return make_mesh(data=1, fsdp=len(own), devices=own) if len(own) > 1 and size > room else None


_ROOM = 1 << 32  # bytes; of a device that does not say what it has


class Meshes(NamedTuple):
    """The devices of student and teacher: one mesh for both, or one for each."""

    student: Mesh
    teacher: Mesh

    @property
    def separate(self) -> bool:
        """Whether teacher and student run on different devices, and so as two programs."""
        return set(self.teacher.devices.flat) != set(self.student.devices.flat)


def make_meshes(settings: MeshConfig, *, student: int, teacher: int) -> Meshes:
    """The first `student` devices and the `teacher` devices after them; 0 and 0 give one mesh of all for both.

    Raises:
      UserError: the devices are not there, or the axes do not multiply to them.
    """
    make = partial(make_mesh, data=settings.data, fsdp=settings.fsdp, tensor=settings.tensor)
    if not student and not teacher:
        mesh = make()
        return Meshes(mesh, teacher_view(mesh, settings.teacher_fsdp))
    asked = f"config.student.devices={student} and config.teacher.devices={teacher}"
    if jax.process_count() > 1:
        raise UserError(f"{asked} are for one process, and here are {jax.process_count()}; set both to 0")
    devices = jax.devices()
    if student + teacher > len(devices):
        raise UserError(f"{asked} are more than the {len(devices)} devices here; lower one of them")
    of_teacher = make(devices=devices[student : student + teacher])
    return Meshes(make(devices=devices[:student]), teacher_view(of_teacher, settings.teacher_fsdp))


def teacher_view(mesh: Mesh, fsdp: int) -> Mesh:
    """The same devices, and the same rows on each, with another number of them that splits parameters; 0 = the same."""
    if not fsdp or fsdp == mesh.shape["fsdp"]:
        return mesh
    rows = row_devices(mesh)
    if rows % fsdp:
        raise UserError(f"config.mesh.teacher_fsdp={fsdp} must divide the {rows} devices that rows are split over")
    return Mesh(mesh.devices.reshape(rows // fsdp, fsdp, -1), AXES)


def by_batch(mesh: Mesh, *, axis: int = 0) -> NamedSharding:
    """Rows, which are `axis` of an array, split over every device, but for `tensor`, whose devices share their rows."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, ROWS))


def matching_rows(a: Mesh, b: Mesh, *, axis: int) -> tuple[NamedSharding, NamedSharding]:
    """Shardings of rows that match on two meshes: as fine as both allow, with copies where a mesh has more devices.

    Between two such shardings jax.device_put copies from device to device, and returns at once. Between other
    shardings the copy goes through the host, and waits there for the array to be computed.
    """
    pieces = math.gcd(row_devices(a), row_devices(b))

    def split(mesh: Mesh) -> NamedSharding:
        devices = mesh.devices.reshape(pieces, -1)
        return NamedSharding(Mesh(devices, ("rows", "copies")), PartitionSpec(*[None] * axis, "rows"))

    return split(a), split(b)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def by_rule(
    tree: PyTree,
    mesh: Mesh,
    *,
    family: Family | None = None,
    smallest: int = 2**14,
) -> PyTree:
    """A sharding for every leaf: `tensor` splits what models/partition.py says, and fsdp the longest axis of the rest.

    Args:
      tree: arrays or their shapes (parameters, or optimizer state over them).
      family: whose parameters these are; None = `tensor` splits nothing.
      smallest: elements below which fsdp costs more than it saves; such leaves it leaves whole.
    """
    if not is_split(mesh):
        return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)

    def rule(path: tuple, leaf: Any) -> NamedSharding:
        cut = Cut() if family is None else cut_of(path_name(path), len(leaf.shape), family)
        return _split(leaf, mesh, cut, smallest=smallest)

    return jax.tree_util.tree_map_with_path(rule, tree)


def on_mesh(shapes: PyTree, mesh: Mesh | None, *, family: Family) -> PyTree:
    """As `by_rule`, for a model's parameters; without a mesh on the devices of `local_mesh`."""
    if (mesh := mesh or local_mesh(shapes)) is not None:
        return by_rule(shapes, mesh, family=family)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: here, shapes)


def of_teacher(pair: Pair, mesh: Mesh) -> PyTree:
    """Shardings of the parameters of all teachers (`Pair.params_of_teachers`)."""
    if pair.others:
        both = zip(pair.teachers, pair.params_of_teachers, strict=True)
        return tuple(by_rule(params, mesh, family=teacher.family) for teacher, params in both)
    return by_rule(pair.teacher_params, mesh, family=None if pair.teacher is None else pair.teacher.family)


def of_head(head: Head | None, mesh: Mesh) -> Head | None:
    """Shardings for the weights of a vocabulary projection, and for their gradient: those of the parameters."""
    if head is None:
        return None
    bias = None if head.bias is None else _split(head.bias, mesh, Cut(0))
    return head._replace(features=None, kernel=_split(head.kernel, mesh, Cut(0 if head.tied else 1)), bias=bias)


def _split(leaf: Any, mesh: Mesh, cut: Cut, *, smallest: int = 2**14) -> NamedSharding:
    spec: list[Any] = [None] * len(leaf.shape)
    if cut.tensor is not None and mesh.shape[TENSOR] > 1 and leaf.shape[cut.tensor] % mesh.shape[TENSOR] == 0:
        spec[cut.tensor] = TENSOR
    across = [axis for axis in cut.over if mesh.shape[axis] > 1]
    size = math.prod(mesh.shape[axis] for axis in across)
    left = [i for i, n in enumerate(leaf.shape) if n % size == 0 and spec[i] is None]
    if size > 1 and left and math.prod(leaf.shape) >= smallest:
        # The axis of `tensor` comes last, so that tables of words are split by their width (partition.rows_stay).
        longest = max(left, key=lambda i: (i != cut.tensor, leaf.shape[i]))
        spec[longest] = tuple(across) if len(across) > 1 else across[0]
    while spec and spec[-1] is None:
        spec.pop()
    return NamedSharding(mesh, PartitionSpec(*spec))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays on the devices, of which this host supplies its own rows.

    Where the devices do not divide them, empty rows follow, which no mask counts. Batches of training have none.
    """
    devices = max(row_devices(mesh) // jax.process_count(), 1)

    def filled(x: np.ndarray) -> np.ndarray:
        return np.pad(x, [(0, -len(x) % devices), *[(0, 0)] * (x.ndim - 1)])

    return jax.make_array_from_process_local_data(by_batch(mesh), {name: filled(x) for name, x in batch.items()})
