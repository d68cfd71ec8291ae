"""Tokenizers of model folders, and the tokens that end a text."""

import json
from pathlib import Path
from typing import Any

from jaxdistill.errors import UserError
from jaxdistill.models.hub import quiet
from jaxdistill.models.weights import first_line

# Special tokens of a folder that holds a bare tokenizer.json, recognised by its mask (or end) token.
_SPECIAL_TOKENS = {
    "[MASK]": {
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    },
    "<mask>": {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "sep_token": "</s>",
        "pad_token": "<pad>",
        "cls_token": "<s>",
        "mask_token": "<mask>",
    },
    "<|endoftext|>": {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    },
}


def load_tokenizer(folder: Path) -> Any:
    """The folder's fast tokenizer (transformers.PreTrainedTokenizerFast); a bare tokenizer.json will do."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not file.is_file() and not settings.is_file():
        raise UserError(f"{folder} has no tokenizer: neither tokenizer.json nor tokenizer_config.json")
    try:
        if not settings.is_file() and not (folder / "config.json").is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(file), **_special_tokens(file))
        named = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        # transformers 5 writes this name for what 4 calls PreTrainedTokenizerFast.
        backend = named.get("tokenizer_class") == "TokenizersBackend"
        reader = PreTrainedTokenizerFast if backend else AutoTokenizer
        with quiet():
            tokenizer = reader.from_pretrained(folder, local_files_only=True)
    except UserError:
        raise
    except Exception as error:  # the Rust parser raises plain Exception
        raise UserError(f"{folder} has no tokenizer that can be read: {first_line(error)}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{folder} has no fast tokenizer: a tokenizer.json is needed")
    return tokenizer


def _special_tokens(file: Path) -> dict[str, str]:
    from tokenizers import Tokenizer

    vocabulary = Tokenizer.from_file(str(file)).get_vocab()
    for sign, special in _SPECIAL_TOKENS.items():
        if sign in vocabulary:
            return special
    raise UserError(f"{file} has none of the tokens {', '.join(_SPECIAL_TOKENS)}: add a tokenizer_config.json")


def check_tokenizer(tokenizer: Any, config: Any) -> None:
    """UserError where the tokenizer can produce an id the model has no embedding for."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise UserError(
            f"the tokenizer does not fit the model: its largest id is {largest}, "
            f"the model's vocabulary has {config.vocab_size} entries"
        )


def end_ids(folder: Path, config: Any, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a text: by generation_config.json, else config.json, else the tokenizer; () for none."""
    path = folder / "generation_config.json"
    fields: Any = {}
    if path.is_file():
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error})") from error
    named = fields.get("eos_token_id") if isinstance(fields, dict) else None
    for ids in (named, config.eos_token_id, tokenizer.eos_token_id):
        if ids is not None:
            return tuple(ids) if isinstance(ids, list | tuple) else (ids,)
    return ()
