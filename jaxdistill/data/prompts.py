"""Single texts to token ids, as training frames them: every prompt of the program is made here.

Training puts a tokenizer's own beginning before the text of a causal model, and eos after it. A prompt gets the
beginning alone: a model that reads its end token there has nothing left to say. What else a tokenizer's template adds
(eos, [SEP]) and what its file says of truncation and padding does not count, as in `prepare`.
"""

import itertools
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from jaxdistill.data.vocabulary import vocabulary_of


def whole_texts(tokenizer: Any) -> Tokenizer:
    """The Rust tokenizer of one of transformers, without truncation and padding.

    It is a copy: transformers sets truncation and padding on its own object at every call, and hashes differ with them.
    """
    rust = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    rust.no_truncation()
    rust.no_padding()
    rust.encode_special_tokens = tokenizer.backend_tokenizer.encode_special_tokens  # not in the text of a tokenizer
    return rust


def prefix_of(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that a tokenizer itself puts before a text: none for GPT-2, <s> for Llama."""
    encoding = tokenizer.encode("a")
    ids = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
    return tuple(id for id, _ in itertools.takewhile(lambda pair: pair[1], ids))


def prompt_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of texts that a causal model goes on with: the beginning of a training text, without its end."""
    rust = whole_texts(tokenizer)
    prefix = prefix_of(rust)
    return [[*prefix, *encoding.ids] for encoding in rust.encode_batch(list(texts), add_special_tokens=False)]


def framed_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of texts for a masked language model: whole documents in the frame that they have in training."""
    vocabulary = vocabulary_of(tokenizer)
    encodings = whole_texts(tokenizer).encode_batch(list(texts), add_special_tokens=False)
    return [[vocabulary.bos, *encoding.ids, vocabulary.eos] for encoding in encodings]
