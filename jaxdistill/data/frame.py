"""Token ids of documents to rows, as pure functions of arrays."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, Integer

from jaxdistill.data.settings import DataConfig


class Ragged(NamedTuple):
    """Ragged of token ids, back to back."""

    tokens: Integer[np.ndarray, "tokens"]
    lengths: Int64[np.ndarray, "rows"]


def frame(documents: Ragged, *, bos: int, eos: int, max_length: int | None) -> Ragged:
    """Documents of masked models as rows `bos … eos` of at most max_length tokens (None: one row a document).

    A document that is too long *with its frame* is cut as in the DistilBERT scripts: into pieces of max_length - 2
    tokens, each of which gets the frame tokens that it lacks. So the text of a first row is one token shorter than that
    of the rows in the middle.
    """
    framed = documents.lengths + 2
    rows = np.ones_like(framed) if max_length is None else _rows_of_documents(framed, max_length)
    begin, stop = _borders(documents.lengths, rows, piece=0 if max_length is None else max_length - 2)
    lengths = stop - begin + 2
    ends = np.cumsum(lengths)
    return Ragged(_insert(documents.tokens, int(lengths.sum()), [(ends - lengths, bos), (ends - 1, eos)]), lengths)


def _rows_of_documents(framed: Int64[np.ndarray, "documents"], max_length: int) -> Int64[np.ndarray, "documents"]:
    """The number of rows that each document of `framed` tokens is cut into."""
    return np.where(framed <= max_length, 1, -(-framed // (max_length - 2)))


def _borders(
    lengths: Int64[np.ndarray, "documents"], rows: Int64[np.ndarray, "documents"], *, piece: int
) -> tuple[Int64[np.ndarray, "rows"], Int64[np.ndarray, "rows"]]:
    """Where the text of each row begins and ends, in tokens of the unframed document."""
    ends = np.cumsum(rows)
    is_last = np.zeros(int(rows.sum()), bool)
    is_last[ends - 1] = True
    index = np.arange(len(is_last)) - np.repeat(ends - rows, rows)  # of a row in its document
    # Cut j stands before token j * piece of the framed document, which is token j * piece - 1 of the unframed one.
    begin = np.where(index == 0, 0, index * piece - 1)
    stop = np.where(is_last, np.repeat(lengths, rows), (index + 1) * piece - 1)
    return begin, stop


def frame_causal(documents: Ragged, *, prefix: Sequence[int], eos: int, max_length: int | None) -> Ragged:
    """Documents of causal models as `prefix … eos`, cut where a row of max_length ends (None: one row a document)."""
    framed = documents.lengths + len(prefix) + 1
    ends = np.cumsum(framed)
    special = [(ends - 1, eos), *((ends - framed + i, id) for i, id in enumerate(prefix))]
    tokens = _insert(documents.tokens, int(framed.sum()), special)
    if max_length is None:
        return Ragged(tokens, framed)
    rows = -(-framed // max_length)
    lengths = np.full(int(rows.sum()), max_length, np.int64)
    lengths[np.cumsum(rows) - 1] = framed - (rows - 1) * max_length
    return Ragged(tokens, lengths)


def _insert(
    tokens: Integer[np.ndarray, "tokens"], size: int, special: list[tuple[Int64[np.ndarray, "_"], int]]
) -> Integer[np.ndarray, "size"]:
    """An array of `size` tokens with the special ids at their places, and `tokens` at all other places."""
    is_text = np.ones(size, bool)
    out = np.empty(size, tokens.dtype)
    for places, id in special:
        is_text[places] = False
        out[places] = id
    out[is_text] = tokens
    return out


def fill_rows(tokens: Integer[np.ndarray, "tokens"], *, length: int) -> tuple[Ragged, Integer[np.ndarray, "rest"]]:
    """Cuts packed documents into rows of exactly `length` tokens; returns also the rest, which fills no row."""
    count = len(tokens) // length
    filled, rest = np.split(tokens, [count * length])
    return Ragged(filled, np.full(count, length, np.int64)), rest


def select(rows: Ragged, keep: Bool[np.ndarray, "rows"]) -> Ragged:
    """The rows where `keep` is true."""
    return Ragged(rows.tokens[np.repeat(keep, rows.lengths)], rows.lengths[keep])


def too_short_or_unknown(
    rows: Ragged, data: DataConfig, *, unk: int | None
) -> tuple[Bool[np.ndarray, "rows"], Bool[np.ndarray, "rows"]]:
    """Which rows are under data.min_tokens; which others have a share of `unk` of data.max_unk_fraction or more."""
    is_short = rows.lengths < data.min_tokens
    return is_short, ~is_short & (_unknown_share(rows, unk) >= data.max_unk_fraction)


def _unknown_share(rows: Ragged, unk: int | None) -> np.ndarray:
    """Share of unknown tokens in each row."""
    if unk is None:
        return np.zeros(len(rows.lengths))
    before = np.concatenate([[0], np.cumsum(rows.tokens == unk)])
    ends = np.cumsum(rows.lengths)
    return (before[ends] - before[ends - rows.lengths]) / rows.lengths
