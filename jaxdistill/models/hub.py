"""From the name of a model to its folder and configuration: a local folder, or a download from the Hugging Face hub."""

import json
from pathlib import Path
from typing import Any

from jaxdistill.errors import UserError
from jaxdistill.models.families import FAMILIES

_SMALL_FILES = ["*.json", "*.txt", "*.model"]  # config, tokenizer, index of shards


def resolve(name: str, *, revision: str = "", allow_pickle: bool = False) -> Path:
    """The folder of a model or tokenizer.

    Args:
      name: a folder, or a hub name, which is downloaded unless the hub's cache has it.
      revision: branch, tag or commit of a hub name.
      allow_pickle: whether a download includes *.bin files.

    Raises:
      UserError: there is no such folder, and the hub has no such name or cannot be reached.
    """
    if not name:
        raise UserError("the name of the model or tokenizer is empty: give a folder or a hub name")
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{name} is a file; name the folder it stands in")
    if name[0] in "./~" or name.count("/") > 1:
        raise UserError(f"{name}: there is no such folder, and a hub name reads user/model")
    return _download(name, revision=revision, allow_pickle=allow_pickle)


def _download(name: str, *, revision: str, allow_pickle: bool) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=[*_SMALL_FILES, "*.safetensors", *(["*.bin"] if allow_pickle else [])],
            ignore_patterns=["*/*"],
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        # OSError includes a missing network: requests' errors and the hub's LocalEntryNotFoundError derive from it.
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"{name}{at} is neither a folder here nor to be had from the hub "
            f"({type(error).__name__}): check the name and the network, or give a local folder"
        ) from error
    return Path(folder)


def load_config(folder: Path) -> Any:
    """The configuration of a model folder (a transformers.PretrainedConfig); code in the folder is never run.

    Raises:
      UserError: there is no config.json, it cannot be read, or its model_type is not a family of FAMILIES.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json: it is not a model folder")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from error
    model_type = fields.get("model_type") if isinstance(fields, dict) else None
    if model_type not in FAMILIES:
        raise UserError(f"{path}: model_type {model_type!r} is none of the families here: {', '.join(FAMILIES)}")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {error}") from error
    if model_type == "distilbert":
        # The position table of the weights file counts even where the configuration says sinusoidal: DistilBERT's own
        # training overwrote the sinusoids with BERT's learned positions. As parameters they are read, kept and written.
        config.sinusoidal_pos_embds = False
    return config
