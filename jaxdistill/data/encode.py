"""Documents to token ids, block by block: plain text, and pairs of prompt and completion in their template."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, Integer
from tokenizers import Encoding, Tokenizer

from jaxdistill.data.frame import Ragged
from jaxdistill.data.readers import Document

# Text encoded at a time. An encoding takes about 100 bytes a token in the tokenizer's memory, so two blocks in flight
# take some 100 MB, while a block is still large enough for many cores.
BLOCK_CHARACTERS = 2_000_000
BLOCK_DOCUMENTS = 16_384


class Encoded(NamedTuple):
    """Token ids of a block of documents, without special tokens."""

    documents: Ragged  # without the pairs that are too long
    read: int  # documents in the block
    prompts: Int64[np.ndarray, "documents"] | None = None  # tokens of each document that are prompt; None: plain text


def encode_ahead(documents: Iterator[Document], encode: Callable[[list[Any]], Encoded]) -> Iterator[Encoded]:
    """Encodes block after block.

    The Rust code uses all cores and does not hold the interpreter lock, so a block is encoded in a thread while the
    caller writes the block before it.
    """
    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for block in _blocks(documents):
            current, ahead = ahead, pool.submit(encode, block)
            if current is not None:
                yield current.result()
        if ahead is not None:
            yield ahead.result()


def _blocks(documents: Iterator[Document]) -> Iterator[list[Document]]:
    while block := list(itertools.islice(documents, 1)):
        characters = _characters(block[0])
        while characters < BLOCK_CHARACTERS and len(block) < BLOCK_DOCUMENTS:
            document = next(documents, None)
            if document is None:
                break
            block.append(document)
            characters += _characters(document)
        yield block


def _characters(document: Document) -> int:
    return len(document) if isinstance(document, str) else sum(map(len, document))


def encode_texts(texts: Sequence[str], *, tokenizer: Tokenizer) -> Encoded:
    """The token ids of plain documents."""
    ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    tokens = np.fromiter(itertools.chain.from_iterable(ids), np.int32, int(lengths.sum()))
    return Encoded(Ragged(tokens, lengths), read=len(texts))


def encode_pairs(pairs: Sequence[tuple[str, str]], *, tokenizer: Tokenizer, template: str, max_length: int) -> Encoded:
    """The token ids of prompts and completions in their template, of each pair at most max_length tokens.

    A pair is tokenised as one text, so its tokens are those of anybody who writes that text, and is split where its
    characters are. White space right before {completion} belongs to the completion. A pair that is too long loses the
    end of its prompt; a pair without room for one token of the prompt itself is left out.
    """
    before, _, between = template.removesuffix("{completion}").partition("{prompt}")
    literal = len(between.rstrip())
    texts = [f"{before}{prompt}{between}{completion}" for prompt, completion in pairs]
    tokens, sizes = [], []
    for (prompt, _), encoding in zip(pairs, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
        end = len(before + prompt)
        cut = _cut_pair(encoding, (len(before), end, end + literal), max_length=max_length)
        if cut is not None:
            tokens += cut
            sizes.append((len(cut.prompt), len(cut.completion)))
    size = np.array(sizes, np.int64).reshape(-1, 2)
    flat = np.concatenate(tokens) if tokens else np.empty(0, np.int32)
    return Encoded(Ragged(flat, size.sum(axis=1)), read=len(pairs), prompts=size[:, 0])


class _Pair(NamedTuple):
    prompt: Integer[np.ndarray, "prompt"]  # with the text of the template around it
    completion: Integer[np.ndarray, "completion"]


def _cut_pair(encoding: Encoding, borders: tuple[int, int, int], *, max_length: int) -> _Pair | None:
    """Cuts the prompt of an encoded pair so that the pair has at most max_length tokens.

    Args:
      borders: numbers of characters before the prompt's own text, before the text of the template after it, and before
        the completion.

    Returns:
      None where no token of the prompt's own text would be left.
    """
    ids, ends = np.array(encoding.ids, np.int32), np.array([end for _, end in encoding.offsets], np.int64)
    # A token that reaches over a border belongs to the part after the border.
    head, own, middle = (int((ends <= border).sum()) for border in borders)
    room = max_length - (len(ids) - own)
    if room < min(own, head + 1):
        return None
    return _Pair(np.concatenate([ids[: min(own, room)], ids[own:middle]]), ids[middle:])
