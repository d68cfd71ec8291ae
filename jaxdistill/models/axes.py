"""The axes of a mesh of devices."""

from jax.sharding import Mesh

ROWS = ("data", "fsdp")  # split the rows of a batch; fsdp splits parameters as well
TENSOR = "tensor"  # splits the work on a row
AXES = (*ROWS, TENSOR)


def row_devices(mesh: Mesh) -> int:
    """The number of pieces that the rows of a batch are cut into."""
    return mesh.size // mesh.shape[TENSOR]
