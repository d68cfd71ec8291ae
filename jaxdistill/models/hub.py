"""From the name of a model to its folder and configuration: a local folder, or a download from the Hugging Face hub."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import logging

from jaxdistill.console import taking
from jaxdistill.errors import UserError, first_line
from jaxdistill.files import named_path, read_json
from jaxdistill.models import transformers_5
from jaxdistill.models.config_fields import check_fields
from jaxdistill.models.families import FAMILIES, other_kind
from jaxdistill.models.weights import FLAX, has_safetensors
from jaxdistill.network import is_hub_silent

SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]  # config, tokenizer, index of shards, chat template
TEMPLATES = "additional_chat_templates"  # the one folder inside of a model folder that is read
# Patterns of the files of all other folders: their names leave this one's at some letter, end before it, or go on.
_OTHER_FOLDERS = [
    *(f"{TEMPLATES[:i]}[!{letter}/]*/*" for i, letter in enumerate(TEMPLATES)),
    *(f"{TEMPLATES[:i]}/*" for i in range(1, len(TEMPLATES))),
    *(f"{TEMPLATES}[!/]*/*", f"{TEMPLATES}/*/*"),
]


def resolve(name: str, *, revision: str = "", allow_pickle: bool = False, weights: bool = True) -> Path:
    """The folder of a model or tokenizer.

    Args:
      name: a folder, or a hub name, which is downloaded unless the hub's cache has it.
      revision: branch, tag or commit of a hub name; "" of a folder.
      allow_pickle: whether a download includes *.bin files.
      weights: whether a download includes weights at all; configuration and tokenizer are small.

    Raises:
      UserError: there is no such folder, and the hub has no such name or cannot be reached.
    """
    if not name:
        raise UserError("the name of the model or tokenizer is empty: give a folder or a hub name")
    path = named_path(name)
    if is_run(name):
        raise UserError(
            f"{name} is the folder of a run; `jaxdistill export --to-pytorch --workdir {name} --out DIR` writes its "
            "student as a model"
        )
    if path.is_dir():
        if revision:
            raise UserError(f"revision {revision!r} is of a hub name, and {name} is a folder; leave it out")
        return path
    if path.exists():
        raise UserError(f"{name} is a file; name the folder it stands in")
    if name[0] in "./~" or name.count("/") > 1:
        raise UserError(f"{name}: there is no such folder, and a hub name reads user/model")
    return _download(name, revision=revision, allow_pickle=allow_pickle, weights=weights)


def is_run(name: str) -> bool:
    """Whether this names the folder of a run, which holds the run's config beside the folder `student`."""
    path = named_path(name)
    return (path / "config.json").is_file() and (path / "student").is_dir()


def _download(name: str, *, revision: str, allow_pickle: bool, weights: bool) -> Path:
    import huggingface_hub

    # Where the hub does not answer, its cache alone.
    alone: dict[str, Any] = {"local_files_only": True} if is_hub_silent() else {}

    def fetch(patterns: list[str]) -> Path:
        with taking(f"fetching {name} from the hub, or looking it up"):
            folder = huggingface_hub.snapshot_download(
                name, revision=revision or None, allow_patterns=patterns, ignore_patterns=_OTHER_FOLDERS, **alone
            )
        return Path(folder)

    patterns = [*SMALL_FILES, *(["*.safetensors"] if weights else [])]
    try:
        folder = fetch(patterns)
        if weights and not has_safetensors(folder):  # the same weights in a second format are not fetched
            folder = fetch([*patterns, FLAX, *(["*.bin"] if allow_pickle else [])])
    except Exception as error:  # besides the hub's own errors, those of requests or httpx, by the version of its client
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"{name}{at} is neither a folder here nor to be had from the hub "
            f"({type(error).__name__}): check the name and the network, or give a local folder"
        ) from error
    return folder


def load_config(folder: Path) -> Any:
    """The configuration of a model folder (a transformers.PretrainedConfig); code in the folder is never run.

    Raises:
      UserError: there is no config.json, it cannot be read, or its model_type is not a family of FAMILIES.
    """
    path, fields = folder / "config.json", config_fields(folder)
    model_type = fields["model_type"] if "model_type" in fields else _inferred_type(path, fields)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        kind = other_kind(fields)
        which = f"{model_type!r}, {kind}," if kind else repr(model_type)
        raise UserError(f"{path}: model_type {which} is none of the families here: {', '.join(FAMILIES)}")
    from transformers import CONFIG_MAPPING, AutoConfig

    transformers_5.check_class(str(path), model_type)
    check_fields(str(path), fields, kind=model_type)
    # AutoConfig goes by the folder's name where there is no model_type.
    reader = AutoConfig if "model_type" in fields else CONFIG_MAPPING[model_type]
    config: Any
    try:
        config = reader.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever a class of transformers raises is about the file
        raise UserError(f"{path} cannot be read as a {model_type}: {first_line(error)}") from error
    transformers_5.respell(config, fields)
    if model_type == "distilbert":
        # The position table of the weights file counts even where the configuration says sinusoidal: DistilBERT's own
        # training overwrote the sinusoids with BERT's learned positions. As parameters they are read, kept and written.
        config.sinusoidal_pos_embds = False
    if FAMILIES[model_type].causal and (ends := _generation_ends(folder)) is not None:
        config.eos_token_id = ends
    return config


def _generation_ends(folder: Path) -> int | list[int] | None:
    """The end tokens that generation_config.json names, which go before those of config.json."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    fields = read_json(path)
    ends = fields.get("eos_token_id") if isinstance(fields, dict) else None
    if any(type(id) is not int for id in (ends if isinstance(ends, list) else [ends]) if id is not None):
        raise UserError(f"{path}: eos_token_id is {ends!r}; it must be a token's id, or a list of ids")
    return ends or None if isinstance(ends, list) else ends


def config_fields(folder: Path) -> dict[str, Any]:
    """The fields of config.json as they stand; {} where it holds no object.

    Raises:
      UserError: there is no config.json, or it is not JSON.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json: it is not a model folder")
    fields = read_json(path)
    return fields if isinstance(fields, dict) else {}


def _inferred_type(path: Path, fields: dict[str, Any]) -> str | None:
    """The model_type of a configuration of 2019 or 2020, which has none, by its architectures or else by its fields."""
    classes = fields.get("architectures")
    named = [str(name) for name in classes] if isinstance(classes, list) else []
    kinds = {_type_of_class(name) for name in named} or {
        next((kind for kind, fits in _FIELDS.items() if fits(fields)), None)
    }
    kind = kinds.pop() if len(kinds) == 1 else None
    by = f"its architectures, {', '.join(named)}," if named else "the names of its fields"
    if kind:
        logging.warning("%s has no model_type; by %s it is read as %s", path, by, kind)
    return kind


def _type_of_class(name: str) -> str | None:
    """The family of a class by its name: "bert" for BertForMaskedLM, TFBertModel and BertLMHeadModel."""
    from transformers import CONFIG_MAPPING

    for kind in filter(CONFIG_MAPPING.__contains__, FAMILIES):
        stem = CONFIG_MAPPING[kind].__name__.removesuffix("Config")
        if re.match(rf"(TF|Flax)?{stem}(For|Model|LMHead|DoubleHeads)", name):
            return kind
    return None


def _has(*names: str) -> Callable[[dict[str, Any]], bool]:
    return lambda fields: all(name in fields for name in names)


def _like_roberta(fields: dict[str, Any]) -> bool:
    """RoBERTa has the fields of BERT, with a single token type."""
    return _FIELDS["bert"](fields) and fields["type_vocab_size"] == 1


# Family -> whether a configuration without model_type and architectures is of it; the first that fits counts.
_FIELDS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "gpt_neo": _has("attention_types", "num_layers"),
    "opt": _has("word_embed_proj_dim", "ffn_dim"),
    "distilbert": _has("dim", "hidden_dim", "n_heads", "n_layers"),
    "gpt2": _has("n_embd", "n_head", "n_layer"),
    "albert": _has("num_hidden_groups", "inner_group_num"),
    "electra": _has("embedding_size", "hidden_size", "intermediate_size", "type_vocab_size"),
    "roberta": _like_roberta,
    "bert": _has("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "type_vocab_size"),
}
