"""Tensors that still lie in a file of weights, read part by part into the arrays of a mesh.

So no process holds a model on its host: the most is one tensor at a time, or its own slice of one.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

Index = tuple[slice, ...]


class Stored:
    """A tensor of a file. It has the shape and the type of an array, and NumPy reads the whole of it as one.

    Floats count as float32, whatever the file keeps them in.

    Args:
      read: gives a part of the tensor as the file keeps it, and checks what it gives.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, read: Callable[[Index], np.ndarray]):
        self.shape, self.read = shape, read
        self.dtype = np.dtype(np.float32) if jnp.issubdtype(dtype, jnp.floating) else np.dtype(dtype)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def T(self) -> "Stored":
        return Stored(self.shape[::-1], self.dtype, lambda index: self.read(index[::-1]).T)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = self.read((slice(None),) * len(self.shape))
        return np.ascontiguousarray(whole.astype(self.dtype if dtype is None else dtype, copy=False))


def whole(leaf: Any) -> np.ndarray:
    """A tensor of a file, or an array of this process's devices, on the host for as long as the caller keeps it.

    NumPy asks an array for a copy that JAX keeps, beside the array, as long as the array itself.
    """
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)
    host = np.empty(leaf.shape, leaf.dtype)
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            host[shard.index] = shard.data if shard.device.platform == "cpu" else shard.data.copy()
    return host


def on_host(params: PyTree) -> PyTree:
    """The parameters in NumPy, tensors of files read."""
    return jax.tree.map(np.asarray, params)


def placed(params: PyTree, shardings: PyTree, dtype: Any) -> PyTree:
    """The parameters as arrays of a mesh, in a data type; of tensors of files, this process reads what it holds."""
    return jax.tree.map(lambda leaf, sharding: _placed(leaf, sharding, dtype), params, shardings)


def _placed(leaf: Any, sharding: jax.sharding.Sharding, dtype: Any) -> jax.Array:
    if isinstance(leaf, jax.Array) and (jax.process_count() == 1 or not leaf.is_fully_addressable):
        return jax.device_put(leaf.astype(dtype), sharding)
    read: Callable[[Index], np.ndarray] = leaf.read if isinstance(leaf, Stored) else np.asarray(leaf).__getitem__
    return jax.make_array_from_callback(leaf.shape, sharding, functools.partial(_part, read, dtype, {}))


def _part(read: Callable[[Index], np.ndarray], dtype: Any, parts: dict[str, np.ndarray], index: Any) -> np.ndarray:
    """A part in a data type; kept in `parts`, as several devices may hold the same one."""
    if (key := str(index)) not in parts:
        parts[key] = np.ascontiguousarray(read(index).astype(dtype, copy=False))
    return parts[key]
