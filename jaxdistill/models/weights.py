"""Parameters from safetensors, msgpack or (only on request) pickle files, with every tensor checked.

transformers' own PyTorch-to-Flax loading needs torch, so tensors are read here by the names of torch_names.py. A tensor
that is missing, has another shape or is not finite is named in the error.
"""

import contextlib
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Key

from jaxdistill.errors import UserError, first_line, place_in
from jaxdistill.files import check_fetched, read_json
from jaxdistill.models import torch_names
from jaxdistill.models.model import Model, init_params, param_shapes
from jaxdistill.models.stored import Index, Stored, on_host
from jaxdistill.models.weight_names import Tensor, Tensors, check_absent, check_unexpected, with_wanted_names

_SAFETENSORS = "model.safetensors"
FLAX = "flax_model.msgpack"
_PICKLE = "pytorch_model.bin"
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
# Under which names trainers keep the model's state dict, beside the optimizer's state and counters.
_STATE_DICTS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
    "net",
    "network",
    "params",
    "weights",
)


def load_params(
    folder: Path,
    model: Model,
    *,
    allow_pickle: bool = False,
    missing: Literal["error", "init"] = "error",
    key: Key[Array, ""] | None = None,
) -> dict[str, Any]:
    """The folder's weights as the model's parameter tree, NumPy float32 whatever the data type of the file.

    Args:
      as in `open_params`.

    Raises:
      UserError: as `open_params`; a tensor is not finite.
    """
    return on_host(open_params(folder, model, allow_pickle=allow_pickle, missing=missing, key=key))


def open_params(
    folder: Path,
    model: Model,
    *,
    allow_pickle: bool = False,
    missing: Literal["error", "init"] = "error",
    key: Key[Array, ""] | None = None,
) -> dict[str, Any]:
    """The model's parameter tree, whose leaves are tensors that are read later (models/stored.py).

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
    params: dict[str, Any] = {
        path: _finite(source, names[path], torch_names.transposed(path, tensors[names[path]])) for path in loaded
    }
    if absent:
        assert key is not None, "missing='init' needs a key"
        logging.warning("%s has no such tensors, so these are drawn at random: %s", source, ", ".join(absent))
        drawn = flatten_dict(init_params(model, key), sep="/")
        params |= {path: np.asarray(drawn[path], np.float32) for path in shapes if path not in loaded}
    return unflatten_dict({path: params[path] for path in shapes}, sep="/")


# Files


def _read(folder: Path, *, allow_pickle: bool) -> tuple[Path, Tensors]:
    """(the file that was read, or the index of its shards; the tensors)."""
    readers: dict[str, Callable[[Path], Tensors]] = {_SAFETENSORS: _read_safetensors}
    if allow_pickle:
        readers[_PICKLE] = _read_pickle
    for name, read in readers.items():
        file, index = folder / name, folder / f"{name}.index.json"
        if file.is_file():
            check_fetched(file)
            return file, read(file)
        if index.is_file():
            shards = _shards(index, ending=file.suffix)
            return index, {key: value for shard in shards for key, value in read(shard).items()}
    msgpack = folder / FLAX
    if msgpack.is_file():
        check_fetched(msgpack)
        return msgpack, _read_msgpack(msgpack)
    pickles = sorted(file for ending in _PICKLES for file in folder.glob(f"*{ending}") if not _is_state(file))
    if pickles and not allow_pickle:
        raise UserError(
            f"{pickles[0]} is a pickle, and loading one can run code: convert it to safetensors, "
            "or pass --allow-pickle if you trust it"
        )
    if pickles:
        raise UserError(f"{pickles[0]} is not read under this name: rename it to {_PICKLE}")
    raise UserError(
        f"{folder} holds no weights: no {_SAFETENSORS} (or its index), no {FLAX}; "
        f"{_PICKLE} is fetched and read with --allow-pickle only"
    )


def _is_state(file: Path) -> bool:
    """Whether a pickle holds the trainer's state and no weights, by the names that transformers' trainer gives."""
    return file.name.startswith(("training_args", "optimizer", "scheduler", "rng_state"))


def has_safetensors(folder: Path) -> bool:
    """Whether `load_params` reads safetensors from the folder, and so no other format."""
    return any((folder / name).is_file() for name in (_SAFETENSORS, f"{_SAFETENSORS}.index.json"))


class _Index(pydantic.BaseModel):
    """The index of shards: which file holds which tensor."""

    weight_map: dict[str, str] = pydantic.Field(min_length=1)


def _shards(index: Path, *, ending: str) -> list[Path]:
    try:
        names = sorted(set(_Index.model_validate(read_json(index), strict=True).weight_map.values()))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{index} is no index of shards ({place_in(first['loc'])}: {first['msg']}): its weight_map must map names "
            "of tensors to names of files"
        ) from None
    there = {file.name for file in index.parent.iterdir() if file.is_file()}
    for name in names:
        if name not in there or not name.endswith(ending):
            raise UserError(f"{index} names {name!r}, which is not in the folder as a {ending} file: fetch it again")
        check_fetched(index.parent / name)
    return [index.parent / name for name in names]


def _read_safetensors(file: Path) -> Tensors:
    from safetensors import SafetensorError, safe_open

    tensors = {}
    try:
        # framework="flax" because NumPy has no bfloat16.
        with safe_open(file, framework="flax") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                lazy = opened.get_slice(name)
                tensors[name] = Stored(
                    tuple(lazy.get_shape()), _dtype_of(file, lazy.get_dtype()), partial(_read_slice, file, name)
                )
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is truncated or damaged ({first_line(error)}): fetch it again") from error
    return tensors


# As safetensors calls them. Whole numbers are refused where a model wants them, and else passed over.
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"} | {
    f"{letter}{bits}": f"{kind}{bits}" for letter, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
}


def _dtype_of(file: Path, name: str) -> Any:
    if name not in _DTYPES:
        raise UserError(
            f"{file} holds a data type that is not read here ({name}): give weights in float32, float16 or bfloat16"
        )
    return jnp.dtype(_DTYPES[name])


def _read_slice(file: Path, name: str, index: Index) -> np.ndarray:
    """A part of a tensor. The file is opened each time, so that none of its pages count as this process's memory."""
    from safetensors import SafetensorError, safe_open

    try:
        # framework="flax" because NumPy has no bfloat16.
        with safe_open(file, framework="flax") as opened, _on_host():
            return np.asarray(opened.get_slice(name)[index] if index else opened.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is truncated or damaged ({first_line(error)}): fetch it again") from error


def _on_host() -> contextlib.AbstractContextManager[Any]:
    """New arrays are made on the CPU, where JAX may use it: JAX_PLATFORMS may name an accelerator alone."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return contextlib.nullcontext()


def _read_pickle(file: Path) -> Tensors:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{file} is a pickle: reading it needs torch (pip install torch)") from error
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damage makes the unpickler raise errors of many types
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        holds = f"it holds a {named[1]}, which could run code" if named else "it is no file of torch, or is damaged"
        raise UserError(f"{file} cannot be read as tensors: {holds}; save model.state_dict() alone") from error
    if not isinstance(saved, Mapping):
        raise UserError(f"{file} holds a {type(saved).__name__}, no state dict; save model.state_dict() alone")
    tensors = _tensors_alone(_state_dict(saved))
    if not tensors:
        raise UserError(
            f"{file} holds {', '.join(map(str, list(saved)[:5])) or 'nothing'}, and no tensors of one model; save "
            "model.state_dict() alone"
        )
    # NumPy has no bfloat16, so floats are upcast by torch. A parameter is detached, as NumPy refuses one.
    return {
        str(name): (t.float() if t.is_floating_point() else t).detach().to_dense().numpy()
        for name, t in tensors.items()
    }


def _state_dict(saved: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The model's state dict in what a trainer saved: the whole of it, or one of its values."""
    named = next((saved[name] for name in _STATE_DICTS if isinstance(saved.get(name), Mapping)), None)
    if named is not None:
        return _state_dict(named)
    dicts = [one for one in saved.values() if isinstance(one, Mapping) and one and len(_tensors_alone(one)) == len(one)]
    return dicts[0] if len(dicts) == 1 and not _tensors_alone(saved) else saved


def _tensors_alone(saved: Mapping[Any, Any]) -> dict[Any, Any]:
    import torch

    return {name: value for name, value in saved.items() if isinstance(value, torch.Tensor)}


def _read_msgpack(file: Path) -> Tensors:
    """The tensors of a Flax file under torch's names, so that the same checks serve both."""
    from flax.serialization import msgpack_restore

    try:
        flat = flatten_dict(msgpack_restore(file.read_bytes()), sep="/")
        arrays = {str(path): _upcast(np.asarray(array)) for path, array in flat.items()}
    except Exception as error:  # msgpack, its extension types and flax raise errors of many types
        raise UserError(f"{file} is truncated or damaged ({first_line(error)}): fetch it again") from error
    return {torch_names.torch_name(path): torch_names.transposed(path, array) for path, array in arrays.items()}


def _upcast(array: np.ndarray) -> np.ndarray:
    # jnp's issubdtype knows bfloat16, NumPy's does not.
    return array.astype(np.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array


def _check_tensor(source: Path, name: str, array: Tensor, shape: tuple[int, ...], *, transposed: bool) -> None:
    wanted = shape[::-1] if transposed else shape
    if array.shape != wanted:
        raise UserError(f"{source}: {name} has shape {array.shape}, by config.json it should be {wanted}")
    if array.dtype != np.float32:  # as all floats are by now
        raise UserError(f"{source}: {name} holds {array.dtype}; give weights that are floats, and so not quantised")


def _finite(source: Path, name: str, tensor: Tensor) -> Stored:
    """The tensor, of which every part is checked when it is read."""
    return Stored(tensor.shape, tensor.dtype, partial(_read_finite, source, name, tensor))


def _read_finite(source: Path, name: str, tensor: Tensor, index: Index) -> np.ndarray:
    part = tensor.read(index) if isinstance(tensor, Stored) else tensor[index]
    if not np.isfinite(part).all():
        raise UserError(f"{source}: {name} holds NaN or infinite values")
    return part
