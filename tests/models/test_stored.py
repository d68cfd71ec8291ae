"""Weights go from their files into the arrays of a mesh, and each part is read once."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.flax import save_file

from jaxdistill.errors import UserError
from jaxdistill.models import stored, torch_names, weights
from jaxdistill.step import sharding


@pytest.fixture
def folder(tmp_path):
    """A BERT in bfloat16, in two shards."""
    tensors = {name: jnp.asarray(x, jnp.bfloat16) for name, x in torch_names.to_torch(tiny.params("bert")).items()}
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, tmp_path / file)
    index = {name: file for file, held in shards.items() for name in held}
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {index}}}'.replace("'", '"'))
    return tmp_path


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_placed_is_loaded(folder, dtype, monkeypatch):
    reads = []
    read_slice = weights._read_slice

    def reading(file, name, index):
        part = read_slice(file, name, index)
        reads.append((name, part.size))
        return part

    monkeypatch.setattr(weights, "_read_slice", reading)
    model = tiny.model("bert")
    opened = weights.open_params(folder, model)
    assert not reads
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    places = sharding.by_rule(opened, mesh, family=model.family, smallest=64)
    params = stored.placed(opened, places, dtype)
    # Each entry is read once, though several devices hold it, and what is split is read in its parts.
    assert sum(size for _, size in reads) == sum(x.size for x in jax.tree.leaves(opened))
    largest = max(jax.tree.leaves(params), key=lambda x: x.size)
    assert not largest.sharding.is_fully_replicated
    assert max(size for _, size in reads) < largest.size
    for x, place in zip(jax.tree.leaves(params), jax.tree.leaves(places), strict=True):
        assert x.dtype == dtype and x.sharding == place
    monkeypatch.undo()
    loaded = weights.load_params(folder, model)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), y.astype(dtype)), params, loaded)
    assert all(type(x) is np.ndarray and x.dtype == np.float32 for x in jax.tree.leaves(loaded))


def test_a_part_that_is_not_finite_is_refused_when_it_is_read(folder):
    bad = {name: np.asarray(x) for name, x in torch_names.to_torch(tiny.params("bert")).items()}
    name = "bert.encoder.layer.1.output.dense.weight"
    bad[name] = np.where(np.arange(bad[name].size).reshape(bad[name].shape) == 5, np.inf, bad[name])
    for file in ("a.safetensors", "b.safetensors", "model.safetensors.index.json"):
        (folder / file).unlink()
    save_file({key: jnp.asarray(x) for key, x in bad.items()}, folder / "model.safetensors")
    model = tiny.model("bert")
    opened = weights.open_params(folder, model)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(UserError, match=rf"{name} holds NaN or infinite values"):
        stored.placed(opened, jax.tree.map(lambda x: here, opened), jnp.float32)


def test_arrays_are_placed_too():
    mesh = sharding.make_mesh(data=1, fsdp=8)
    values = np.arange(2**14, dtype=np.float32).reshape(128, 128)
    tree = {"host": values, "device": jnp.asarray(values)}
    placed = stored.placed(tree, sharding.by_rule(tree, mesh), jnp.bfloat16)
    for x in placed.values():
        np.testing.assert_array_equal(np.asarray(x), values.astype(jnp.bfloat16))
        assert math.prod(x.addressable_shards[0].data.shape) == 2**11
