"""Parameters from safetensors, msgpack or (only on request) pickle files, with every tensor checked.

transformers' own PyTorch-to-Flax loading needs torch, so tensors are read here by the names of torch_names.py. A tensor
that is missing, has another shape or is not finite is named in the error.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Key

from jaxdistill.errors import UserError
from jaxdistill.models import torch_names
from jaxdistill.models.library_messages import first_line
from jaxdistill.models.model import Model, init_params, param_shapes
from jaxdistill.models.weight_names import Tensors, check_absent, check_unexpected, with_wanted_names


def load_params(
    folder: Path,
    model: Model,
    *,
    allow_pickle: bool = False,
    missing: Literal["error", "init"] = "error",
    key: Key[Array, ""] | None = None,
) -> dict[str, Any]:
    """The folder's weights as the model's parameter tree, NumPy float32 whatever the data type of the file.

    Read from model.safetensors (or its shards), from flax_model.msgpack, or, only with `allow_pickle`, from
    pytorch_model.bin.

    Args:
      missing: "init" draws a head that the file lacks with `key`, and logs the names; "error" raises. A tensor of the
        body that the file lacks is an error in any case.

    Raises:
      UserError: there are no weights, or they cannot be read, or they do not fit the model.
    """
    shapes: dict[str, Any] = flatten_dict(param_shapes(model), sep="/")
    names = {path: torch_names.torch_name(path) for path in shapes}
    source, held = _read(folder, allow_pickle=allow_pickle)
    wanted = set(names.values())
    tensors = with_wanted_names(source, held, model=model, wanted=wanted)
    absent = check_absent(
        source, tensors, model=model, wanted=list(names.values()), held=list(held), drawn=missing == "init"
    )
    check_unexpected(source, tensors, model=model, wanted=wanted)
    loaded = {path: shape for path, shape in shapes.items() if names[path] not in absent}
    for path, shape in loaded.items():
        _check_tensor(source, names[path], tensors[names[path]], shape.shape, transposed=path.endswith("/kernel"))
    params = flatten_dict(torch_names.from_torch(tensors, unflatten_dict(loaded, sep="/")), sep="/")
    if absent:
        assert key is not None, "missing='init' needs a key"
        logging.warning("%s has no such tensors, so these are drawn at random: %s", source, ", ".join(absent))
        drawn = flatten_dict(init_params(model, key), sep="/")
        params |= {path: np.asarray(drawn[path], np.float32) for path in shapes if path not in loaded}
    return unflatten_dict({path: params[path] for path in shapes}, sep="/")


# Files


def _read(folder: Path, *, allow_pickle: bool) -> tuple[Path, Tensors]:
    """(the file that was read, or the index of its shards; the tensors)."""
    readers: dict[str, Callable[[Path], Tensors]] = {"model.safetensors": _read_safetensors}
    if allow_pickle:
        readers["pytorch_model.bin"] = _read_pickle
    for name, read in readers.items():
        file, index = folder / name, folder / f"{name}.index.json"
        if file.is_file():
            return file, read(file)
        if index.is_file():
            return index, {key: value for shard in _shards(index) for key, value in read(shard).items()}
    msgpack = folder / "flax_model.msgpack"
    if msgpack.is_file():
        return msgpack, _read_msgpack(msgpack)
    pickles = sorted(folder.glob("*.bin"))
    if pickles and not allow_pickle:
        raise UserError(
            f"{pickles[0]} is a pickle, and loading one can run code: convert it to safetensors, "
            "or pass --allow-pickle if you trust it"
        )
    raise UserError(
        f"{folder} holds no weights: no model.safetensors (or its index), no flax_model.msgpack; "
        "pytorch_model.bin is fetched and read with --allow-pickle only"
    )


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} is no index of shards: {type(error).__name__}: {error}") from error
    shards = [index.parent / name for name in names]
    for shard in shards:
        if shard.parent != index.parent or not shard.is_file():
            raise UserError(f"{index} names {shard.name}, which is not in the folder")
    return shards


def _read_safetensors(file: Path) -> Tensors:
    from safetensors import SafetensorError, safe_open

    tensors = {}
    try:
        # framework="flax" because NumPy has no bfloat16.
        with (
            safe_open(file, framework="flax") as opened,
            jax.default_device(jax.local_devices(backend="cpu")[0]),
        ):
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                tensors[name] = _upcast(np.asarray(opened.get_tensor(name)))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is truncated or damaged ({first_line(error)}): fetch it again") from error
    return tensors


def _read_pickle(file: Path) -> Tensors:
    import pickle

    try:
        import torch
    except ImportError as error:
        raise UserError(f"{file} is a pickle: reading it needs torch (pip install torch)") from error
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{file} holds more than tensors, or is damaged ({first_line(error)})") from error
    # NumPy has no bfloat16, so floats are upcast by torch.
    return {name: (t.float() if t.is_floating_point() else t).numpy() for name, t in tensors.items()}


def _read_msgpack(file: Path) -> Tensors:
    """The tensors of a Flax file under torch's names, so that the same checks serve both."""
    from flax.serialization import msgpack_restore

    try:
        flat = flatten_dict(msgpack_restore(file.read_bytes()), sep="/")
    except ValueError as error:
        raise UserError(f"{file} is truncated or damaged ({first_line(error)}): fetch it again") from error
    return {
        torch_names.torch_name(path): torch_names.transposed(path, _upcast(np.asarray(array)))
        for path, array in flat.items()
    }


def _upcast(array: np.ndarray) -> np.ndarray:
    # jnp's issubdtype knows bfloat16, NumPy's does not.
    return array.astype(np.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array


def _check_tensor(source: Path, name: str, array: np.ndarray, shape: tuple[int, ...], *, transposed: bool) -> None:
    wanted = shape[::-1] if transposed else shape
    if array.shape != wanted:
        raise UserError(f"{source}: {name} has shape {array.shape}, by config.json it should be {wanted}")
    if not np.isfinite(array).all():
        raise UserError(f"{source}: {name} holds NaN or infinite values")
