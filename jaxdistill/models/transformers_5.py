"""What differs between transformers 4.57 and transformers 5, so that the rest of the package need not know.

Both are supported, and folders that either has written are read under either.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def is_5() -> bool:
    """Whether the installed transformers is 5; it writes configurations and tokenizers in another form."""
    import transformers

    return int(transformers.__version__.partition(".")[0]) >= 5


# Tokenizers. 5 writes all of a tokenizer into tokenizer.json and names a class that it may call otherwise in 4.57. The
# classes of 4.57 change what they read (LlamaTokenizerFast puts <s> before every text), so such a file is read there by
# PreTrainedTokenizerFast, which leaves it as it stands.


def stands_alone(fields: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json must be read as it stands, by the fields of the tokenizer_config.json beside it.

    It must where transformers 5 wrote it, and where the class is unknown to 4.57. Code of the folder (auto_map) is
    another matter: AutoTokenizer refuses it.
    """
    if is_5() or "auto_map" in fields:
        return False  # transformers 5 reads its own files, and any class, by itself
    of_5 = "backend" in fields or isinstance(fields.get("extra_special_tokens"), list)
    named = fields.get("tokenizer_class")
    return of_5 or (named is not None and not _has_fast_class(named))


def _has_fast_class(name: str) -> bool:
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    return tokenizer_class_from_name(f"{name.removesuffix('Fast')}Fast") is not None


def read_as_it_stands(folder: Path, fields: Mapping[str, Any]) -> Any:
    """The tokenizer.json of a folder under transformers 4.57, with the special tokens that `fields` name."""
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
