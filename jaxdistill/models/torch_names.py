"""Flax parameter tree <-> the state dict of the PyTorch class, in NumPy: renames and transposes Dense kernels only.

The module trees of transformers have the same names in both frameworks; only the leaves differ. A tied vocabulary
projection has no array of its own on either side, and torch's second name for the vocabulary bias (decoder.bias) is
left out, as `save_pretrained` leaves it out: torch ties both again when it loads.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def torch_name(path: str) -> str:
    """'bert/encoder/layer/0/output/dense/kernel' -> 'bert.encoder.layer.0.output.dense.weight'."""
    *modules, leaf = path.split("/")
    return ".".join([*modules, _LEAVES.get(leaf, leaf)])


def transposed(path: str, array: Any) -> Any:
    """The array of a Flax path in torch's layout, and the reverse: Linear keeps [out, in], Dense [in, out]."""
    return array.T if path.endswith("/kernel") else array


def to_torch(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of the torch class by name: contiguous, dtypes kept."""
    return {
        torch_name(path): np.ascontiguousarray(transposed(path, np.asarray(array)))
        for path, array in flatten_dict(params, sep="/").items()
    }


def from_torch(tensors: Mapping[str, np.ndarray], shapes: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `to_torch`; `shapes` is any tree with the model's paths (parameters, or their shapes)."""
    return unflatten_dict(
        {
            path: np.ascontiguousarray(transposed(path, np.asarray(tensors[torch_name(path)])))
            for path in flatten_dict(shapes, sep="/")
        },
        sep="/",
    )
