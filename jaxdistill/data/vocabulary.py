"""The special tokens and the size of a tokenizer: all that the data pipeline needs to know of one."""

from dataclasses import dataclass
from typing import Any

from jaxdistill.errors import UserError


@dataclass(frozen=True)
class Vocabulary:
    """Ids of a tokenizer that batching and masking need."""

    size: int
    """All ids are below this."""
    bos: int
    """Begins a framed document: [CLS] for BERT, <s> for RoBERTa. Not used for causal models."""
    eos: int
    """Ends a framed document: [SEP] for BERT, </s> for RoBERTa."""
    pad: int
    unk: int | None
    mask: int | None
    """None for tokenizers of causal models."""
    special: tuple[int, ...]
    """All special ids, ascending; these are never masked."""


def vocabulary_of(tokenizer: Any, *, causal: bool = False) -> Vocabulary:
    """The Vocabulary of a fast tokenizer of transformers.

    A tokenizer without a padding token (GPT-2) pads with unk, as the DistilBERT scripts do, or else with eos.

    Raises:
      UserError: a slow tokenizer, or a tokenizer without the tokens that frame a document.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{_name(tokenizer)} is not a fast tokenizer; save one with its tokenizer.json")
    bos, eos = _causal_frame(tokenizer) if causal else _masked_frame(tokenizer)
    unk, pad = tokenizer.unk_token_id, tokenizer.pad_token_id
    return Vocabulary(
        size=1 + max(tokenizer.get_vocab().values()),  # not len(): added ids may leave gaps
        bos=bos,
        eos=eos,
        pad=next(id for id in (pad, unk, eos) if id is not None),
        unk=unk,
        mask=tokenizer.mask_token_id,
        special=tuple(sorted(set(tokenizer.all_special_ids))),
    )


def _causal_frame(tokenizer: Any) -> tuple[int, int]:
    eos = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if eos is None:
        raise UserError(f"{_name(tokenizer)} has no eos token to end a text, and no sep token; set one")
    return eos, eos  # no bos is added: a text begins with the tokens that the tokenizer itself puts there


def _masked_frame(tokenizer: Any) -> tuple[int, int]:
    bos, eos = tokenizer.cls_token_id, tokenizer.sep_token_id
    if bos is None or eos is None:
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is None or eos is None:
        raise UserError(
            f"{_name(tokenizer)} has neither cls and sep nor bos and eos tokens to frame a document; set them"
        )
    return bos, eos


def _name(tokenizer: Any) -> str:
    return type(tokenizer).__name__
