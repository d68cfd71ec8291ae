"""How arrays are placed on devices: which axis is split, and which meshes are possible."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxdistill.errors import UserError
from jaxdistill.step import sharding


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return sharding.make_mesh(data=2, fsdp=4)


def test_mesh_takes_what_is_left(mesh: Mesh) -> None:
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert dict(sharding.make_mesh(data=-1, fsdp=2).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert dict(sharding.make_mesh(data=-1, fsdp=1).shape) == {"data": 8, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(("data", "fsdp"), [(3, 2), (-1, 3), (8, 8), (1, 1), (-1, 16)])
def test_mesh_that_does_not_fit_the_devices(data: int, fsdp: int) -> None:
    with pytest.raises(
        UserError, match=rf"config\.mesh\.data={data} .*config\.mesh\.fsdp={fsdp} .*8 devices.* divides 8"
    ):
        sharding.make_mesh(data=data, fsdp=fsdp)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((256, 512), PartitionSpec(None, "fsdp")),  # the longest axis
        ((512, 256), PartitionSpec("fsdp")),
        ((512, 30522), PartitionSpec("fsdp")),  # 30522 is longer and 4 does not divide it
        ((30522, 512), PartitionSpec(None, "fsdp")),
        ((511, 513), PartitionSpec()),  # neither divides
        ((64, 64), PartitionSpec()),  # too small to be worth it
        ((2**14,), PartitionSpec("fsdp")),
        ((), PartitionSpec()),
    ],
)
def test_rule(mesh: Mesh, shape: tuple[int, ...], spec: PartitionSpec) -> None:
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert sharding.by_rule({"x": leaf}, mesh)["x"].spec == spec


def test_without_fsdp_everything_is_replicated() -> None:
    mesh = sharding.make_mesh(data=8, fsdp=1)
    assert sharding.by_rule(jax.ShapeDtypeStruct((4096, 4096), jnp.float32), mesh).is_fully_replicated


def test_optimizer_state_lies_as_its_parameters(mesh: Mesh) -> None:
    params = {"kernel": jax.ShapeDtypeStruct((256, 512), jnp.float32)}
    state = jax.eval_shape(optax.adamw(1e-3).init, params)
    specs = [
        s.spec
        for s, x in zip(jax.tree.leaves(sharding.by_rule(state, mesh)), jax.tree.leaves(state), strict=True)
        if x.ndim
    ]
    assert specs == [PartitionSpec(None, "fsdp")] * 2


def test_split_parameters_take_a_quarter_of_the_memory(mesh: Mesh) -> None:
    x = jax.device_put(np.zeros((256, 512), np.float32), sharding.by_rule(np.zeros((256, 512)), mesh))
    assert {shard.data.shape for shard in x.addressable_shards} == {(256, 128)}


def test_rows_are_split_over_every_device_in_order(mesh: Mesh) -> None:
    batch = {"input_ids": np.arange(32, dtype=np.int32).reshape(16, 2), "mask": np.ones((16, 2), bool)}
    placed = sharding.put_batch(batch, mesh)
    assert placed.keys() == batch.keys()
    for name, x in placed.items():
        np.testing.assert_array_equal(x, batch[name])
        assert x.dtype == batch[name].dtype
    shards = sorted(placed["input_ids"].addressable_shards, key=lambda s: s.index[0].start)
    assert [s.device for s in shards] == list(mesh.devices.flat)
    assert all(s.data.shape == (2, 2) for s in shards)
