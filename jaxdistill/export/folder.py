"""A model as a folder that plain transformers opens: configuration, weights, tokenizer and model card."""

import copy
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from jaxdistill.models import stored, torch_names, transformers_5
from jaxdistill.models.model import Model, with_tied_head
from jaxdistill.models.tokenizer import end_ids


def write_folder(folder: Path, *, model: Model, params: Mapping[str, Any], tokenizer: Any, to: str, card: str) -> None:
    """Writes the files of a model into an existing folder, with weights in float32; torch is not needed.

    Args:
      params: arrays of the host or of devices, or tensors of files.
      to: format of the weights, one of FORMATS.
      card: text of README.md.
    """
    from transformers import GenerationConfig

    config = type(model.config).from_dict(_without_code(model.config.to_dict()))
    _set_special_ids(config, tokenizer, causal=model.family.causal)
    config.architectures = [model.torch_class]
    config.dtype = "float32"
    fields = transformers_5.in_both_spellings(json.loads(config.to_json_string(use_diff=True)))
    (folder / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if model.family.causal:
        GenerationConfig(**{name: getattr(config, name) for name in _SPECIAL_IDS}).save_pretrained(folder)
    FORMATS[to](folder, model, params)
    _tokenizer_for(model, tokenizer).save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _without_code(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without the names of classes in Python files of the teacher's folder, which are not copied."""
    return {name: value for name, value in fields.items() if name != "auto_map"}


_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _set_special_ids(config: Any, tokenizer: Any, *, causal: bool) -> None:
    """Makes the configuration name the tokens that end the model's texts, and no id beyond its vocabulary."""
    if causal:
        ends = end_ids(config, tokenizer)
        config.eos_token_id = ends[0] if len(ends) == 1 else list(ends) or None
    for name in _SPECIAL_IDS:
        given = getattr(config, name, None)
        if isinstance(given, int) and not 0 <= given < config.vocab_size:
            setattr(config, name, getattr(tokenizer, name))


def _write_pytorch(folder: Path, model: Model, params: Mapping[str, Any]) -> None:
    """Writes what safetensors' own save_file would, to the byte, which wants all tensors on the host at once.

    The file is the length of its header, the header as JSON, and the tensors in the order of their names.
    """
    leaves: dict[str, Any] = flatten_dict(params, sep="/")
    paths = sorted(leaves, key=torch_names.torch_name)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for path in paths:
        shape = leaves[path].shape[::-1] if path.endswith("/kernel") else leaves[path].shape
        begin, end = end, end + 4 * math.prod(shape)
        header[torch_names.torch_name(path)] = {"dtype": "F32", "shape": shape, "data_offsets": (begin, end)}
    said = json.dumps(header, separators=(",", ":")).encode()
    said += b" " * (-len(said) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(said).to_bytes(8, "little") + said)
        for path in paths:
            tensor = torch_names.transposed(path, stored.whole(leaves[path]))
            for rows in np.array_split(tensor, max(tensor.nbytes >> 24, 1)):  # a transposed one has to be copied
                file.write(np.ascontiguousarray(rows, "<f4").data)
            del tensor, rows  # before the next one is there as well


def _write_flax(folder: Path, model: Model, params: Mapping[str, Any]) -> None:
    from flax.serialization import msgpack_serialize

    # With a tied causal head too: FlaxLlama and FlaxMistral would draw a missing head at random.
    whole = jax.tree.map(lambda x: np.asarray(x, np.float32), with_tied_head(model, params))
    (folder / "flax_model.msgpack").write_bytes(msgpack_serialize(whole))


# Name of a format -> writes the weights, in float32, into the folder. models/weights.py must read each format back.
FORMATS: dict[str, Callable[[Path, Model, Mapping[str, Any]], None]] = {
    "pytorch": _write_pytorch,
    "flax": _write_flax,
}


def _tokenizer_for(model: Model, tokenizer: Any) -> Any:
    """A copy with the model's length, which makes no token types for a family without them.

    A BERT tokenizer's token_type_ids would make torch's DistilBERT refuse the call.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.init_kwargs = _without_code(tokenizer.init_kwargs)
    tokenizer.model_max_length = min(tokenizer.model_max_length, model.max_length)
    tokenizer.init_kwargs["model_max_length"] = tokenizer.model_max_length
    if not model.family.token_types:
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
        tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names
    return tokenizer
