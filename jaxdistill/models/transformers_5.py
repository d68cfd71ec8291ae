"""What differs between transformers 4.57 and transformers 5, so that the rest of the package need not know.

Both are supported, and folders that either has written are read under either.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxdistill.errors import UserError


def is_5() -> bool:
    """Whether the installed transformers is 5; it writes configurations and tokenizers in another form."""
    import transformers

    return int(transformers.__version__.partition(".")[0]) >= 5


def check_class(where: str, kind: str) -> None:
    """Checks that the installed transformers has a configuration for a family; of EuroBERT's kind 4.57 has none.

    Raises:
      UserError: it begins with `where`.
    """
    from transformers import CONFIG_MAPPING, __version__

    if kind not in CONFIG_MAPPING:
        raise UserError(
            f"{where}: {kind} models need transformers 5, and {__version__} is installed: pip install "
            "'transformers>=5,<6', in an environment without the extra flax"
        )


# Configurations. 5 writes rotary positions as `rope_parameters`, which 4.57 passes over in silence, and ModernBERT's
# windows as `layer_types`. It reads the fields of 4.57 as well, so those are what both understand.

_FULL, _SLIDING = "full_attention", "sliding_attention"
# Model type -> the fields of 4.57 for the base of the frequencies: of layers that see everything, and of those with a
# window, in the types where 5 has a rope for each.
_THETAS = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert": ("global_rope_theta", "local_rope_theta"),
    "olmo3": ("rope_theta", "rope_theta"),
}
_STRETCHED_ALIKE = ("modernbert",)  # rope_scaling is of all layers; in the others, of those that see everything


def fields_of_4(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields in which 4.57 writes what a configuration of transformers 5 says of ropes and windows.

    Empty for a configuration without such fields, or where 4.57 has no words for it: then its torch classes cannot
    compute the model.
    """
    kind, ropes = fields.get("model_type"), fields.get("rope_parameters")
    every = _pattern(fields.get("layer_types")) if kind == "modernbert" else None
    windows = {} if every is None else {"global_attn_every_n_layers": every}
    if not isinstance(ropes, dict) or not ropes:
        return windows
    if not isinstance(ropes.get(_FULL, ropes.get(_SLIDING)), dict):
        return windows | _rope_of_4(ropes, "rope_theta")
    names = _THETAS.get(str(kind))
    full, sliding = ropes.get(_FULL), ropes.get(_SLIDING)
    if names is None or not isinstance(full, dict) or not isinstance(sliding, dict):
        return windows
    of_full, of_sliding = _rope_of_4(full, names[0]), _rope_of_4(sliding, names[1])
    wanted = of_full["rope_scaling"] if kind in _STRETCHED_ALIKE else None
    if of_sliding["rope_scaling"] != wanted or (of_sliding | of_full)[names[1]] != of_sliding[names[1]]:
        return windows
    return windows | of_sliding | of_full


def _rope_of_4(rope: Mapping[str, Any], theta: str) -> dict[str, Any]:
    """rope_theta under the name that is given, rope_scaling (None for the plain rope) and what else stands beside."""
    moved = {theta: rope.get("rope_theta")}
    if "partial_rotary_factor" in rope:
        moved["partial_rotary_factor"] = rope["partial_rotary_factor"]
    rest = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    plain = rope.get("rope_type", rope.get("type", "default")) == "default"
    return {**moved, "rope_scaling": None if plain else rest}


def _pattern(layer_types: Any) -> int | None:
    """n, where every n-th layer from the first on sees everything and the others have a window."""
    if not isinstance(layer_types, list) or not layer_types or layer_types[0] != _FULL:
        return None
    every = next((i for i, kind in enumerate(layer_types) if i and kind == _FULL), len(layer_types))
    wanted = [_SLIDING if i % every else _FULL for i in range(len(layer_types))]
    return every if layer_types == wanted else None


def respell(config: Any, fields: Mapping[str, Any]) -> None:
    """Makes a configuration, in place, say what the fields of its file say in the words of the other version."""
    if is_5():
        ropes = in_both_spellings(fields).get("rope_parameters")
        if ropes is not None and "rope_parameters" not in fields:
            config.rope_parameters = ropes
        return
    old = fields_of_4(config.to_dict())
    for name, value in old.items():
        setattr(config, name, value)
    if "rope_scaling" in old:  # the words of 4.57 alone, so that an override of them counts
        del config.rope_parameters


def in_both_spellings(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration for a folder that the torch classes of both versions read alike."""
    both = {**fields, **{name: value for name, value in fields_of_4(fields).items() if value is not None}}
    if fields.get("model_type") == "olmo3" and "rope_parameters" not in fields and "rope_theta" in fields:
        # 5 reads rope_theta for one kind of layer, and gives the other its default.
        plain = {"rope_type": "default", "rope_theta": fields["rope_theta"]}
        both["rope_parameters"] = {_FULL: {**plain, **(fields.get("rope_scaling") or {})}, _SLIDING: plain}
    return both


# Tokenizers. 5 writes all of a tokenizer into tokenizer.json and names a class that it may call otherwise in 4.57. The
# classes of 4.57 change what they read (LlamaTokenizerFast puts <s> before every text), so such a file is read there by
# PreTrainedTokenizerFast, which leaves it as it stands.


def stands_alone(fields: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json must be read as it stands, by the fields of the tokenizer_config.json beside it.

    It must where transformers 5 wrote it and 4.57 reads it, and where the class is unknown or reads no tokenizer.json.
    Code of the folder (auto_map) is another matter: AutoTokenizer refuses it.
    """
    if "auto_map" in fields:
        return False
    of_5 = "backend" in fields or isinstance(fields.get("extra_special_tokens"), list)
    named = fields.get("tokenizer_class")
    return (of_5 and not is_5()) or (named is not None and not _has_fast_class(named))


def _has_fast_class(name: str) -> bool:
    from transformers import PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    stem = name.removesuffix("Fast")
    known = tokenizer_class_from_name(stem if is_5() else f"{stem}Fast")
    return known is not None and issubclass(known, PreTrainedTokenizerFast)


def read_as_it_stands(folder: Path, fields: Mapping[str, Any]) -> Any:
    """The tokenizer.json of a folder, unchanged, with the special tokens that `fields` name."""
    from transformers import PreTrainedTokenizerFast

    extra = fields.get("extra_special_tokens") or []
    usual = PreTrainedTokenizerFast.SPECIAL_TOKENS_ATTRIBUTES
    of_a_model = {  # such as image_token
        name: token
        for name, token in fields.items()
        if name.endswith("_token") and name not in usual and isinstance(token, str)
    }
    options: dict[str, Any] = {
        "additional_special_tokens": fields.get("additional_special_tokens")
        or (extra if isinstance(extra, list) else []),
        "extra_special_tokens": {**(extra if isinstance(extra, dict) else {}), **of_a_model},
    }
    before = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("pre_tokenizer") or {}
    if "add_prefix_space" in before:  # 4.57 writes the field of the configuration, or its default, into the tokenizer
        options["add_prefix_space"] = before["add_prefix_space"]
    return PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **options)
