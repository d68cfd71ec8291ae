"""Tokenises a source once into a folder that training reads by rows (`store.py`).

The folder is named by a hash of everything that decides on its content, so a second run reuses it, and a changed file,
tokenizer or setting makes another folder. It holds tokens.bin (rows back to back; uint16, or int32 for 65,536 ids and
more), offsets.npy (int64, where each row starts, and the end), counts.npy (int64, how often each id stands in
tokens.bin) and meta.json (settings, counts, and the fingerprints of the other files). For causal models also
documents.npy (int64, where each document starts, and the end) and prompts.npy (int64, how many tokens of each document
are prompt).
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from jaxtyping import Int64, Integer
from tokenizers import Tokenizer

from jaxdistill.data.cache import lock, remove_stale, whole_or_not, writing
from jaxdistill.data.encode import Encoded, encode_ahead, encode_pairs, encode_texts
from jaxdistill.data.frame import Ragged, fill_rows, frame, frame_causal, select, too_short_or_unknown
from jaxdistill.data.prompts import prefix_of, whole_texts
from jaxdistill.data.settings import DataConfig
from jaxdistill.data.sources import Source
from jaxdistill.data.store import FORMAT_VERSION, TOKENS, open_store, records_of
from jaxdistill.data.vocabulary import Vocabulary, vocabulary_of
from jaxdistill.errors import UserError
from jaxdistill.files import named_path

REPORT_SECONDS = 10.0  # before a report of progress; later ones come ever more slowly

Report = Callable[[str], None]


def prepare(data: DataConfig, source: Source, tokenizer: Any, *, causal: bool, report: Report) -> Path:
    """Tokenises `source` into <data.cache_dir>/<content hash>, or finds that folder there.

    Lengths count tokens with the frame. For masked models a document becomes `bos … eos`. A document that is longer
    than max_length is cut, as in the DistilBERT scripts, into rows with a frame each; rows under min_tokens, or with a
    share of unknown tokens of max_unk_fraction or more, are dropped. With packing these two rules apply to whole
    documents, which are strung together and cut into rows of exactly max_length; the tokens left at the end are
    dropped.

    For causal models a document is the prefix that the tokenizer itself puts before a text (nothing for GPT-2, <s> for
    Llama), so that a prompt looks in training as it does in generation, then the text, then eos. A document that is
    longer than max_length goes on in the next row as it is. Pairs are put into data.template, and cut as `encode_pairs`
    says.

    The folder appears under its final name whole or not at all, whatever happens and however many processes prepare.

    Args:
      tokenizer: a fast tokenizer of transformers; it is not changed.
      causal: whether the rows are for causal models.
      report: called with lines for the log.

    Raises:
      UserError: the source holds nothing usable or cannot be read; the folder cannot be written (disk full); a
        tokenizer without the tokens that are needed.
    """
    layout = _layout(data, tokenizer, causal=causal)
    settings = _settings(source, layout)
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    final = cache_folder(data) / name
    if final.exists():
        return _reuse(final, report)
    remove_stale(final.parent)
    with lock(final, report):
        if final.exists():
            return _reuse(final, report)
        with whole_or_not(final) as folder:
            _write(folder, source, layout, settings, report)
    return final


def cache_folder(data: DataConfig) -> Path:
    """The folder for all prepared text, which is made where it is missing.

    Raises:
      UserError: there is no such home folder, or the folder cannot be made.
    """
    folder = named_path(data.cache_dir, key="config.data.cache_dir")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


class _Layout(NamedTuple):
    """How documents become rows."""

    data: DataConfig
    tokenizer: Tokenizer  # without truncation and padding
    vocabulary: Vocabulary
    causal: bool
    template: str  # of pairs; "" = plain text
    prefix: tuple[int, ...]  # ids before every text of causal models

    @property
    def unk(self) -> int | None:
        # GPT-2's unknown token is its end token, which every document has, so its share says nothing.
        return None if self.causal and self.vocabulary.unk == self.vocabulary.eos else self.vocabulary.unk

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint16 if self.vocabulary.size < 65_536 else np.int32)


def _layout(data: DataConfig, tokenizer: Any, *, causal: bool) -> _Layout:
    vocabulary = vocabulary_of(tokenizer, causal=causal)
    rust = whole_texts(tokenizer)
    template = data.template if causal and data.prompt_column else ""
    return _Layout(data, rust, vocabulary, causal, template, prefix_of(rust) if causal else ())


def _settings(source: Source, layout: _Layout) -> dict[str, Any]:
    """Everything that decides on the content of the folder."""
    data = layout.data
    return {
        "max_length": data.max_length,
        "min_tokens": data.min_tokens,
        "max_unk_fraction": data.max_unk_fraction,
        "pack": data.packed,
        "source": source.fingerprint,
        "tokenizer": hashlib.sha256(layout.tokenizer.to_str().encode()).hexdigest(),
        "vocabulary": dataclasses.asdict(layout.vocabulary),
        "format_version": FORMAT_VERSION,
        **({"causal": True, "template": layout.template} if layout.causal else {}),
        **({"split_special_tokens": True} if layout.tokenizer.encode_special_tokens else {}),
    }


def _reuse(final: Path, report: Report) -> Path:
    store = open_store(final)
    report(f"reusing {final}: {len(store):,} rows, {store.meta['tokens']:,} tokens")
    return final


@dataclass
class _Tally:
    """What has been read, written and dropped so far."""

    counts: Int64[np.ndarray, "vocab"]  # how often each id was written
    documents: int = 0  # read
    tokens: int = 0  # written
    short: int = 0  # rows that were dropped; with packing, documents
    unknown: int = 0
    long: int = 0  # pairs without room for a prompt
    rest: Integer[np.ndarray, "rest"] = field(default_factory=lambda: np.empty(0, np.int32))  # for the next packed row
    row_lengths: list[Int64[np.ndarray, "_"]] = field(default_factory=list)
    document_lengths: list[Int64[np.ndarray, "_"]] = field(default_factory=list)
    prompts: list[Int64[np.ndarray, "_"]] = field(default_factory=list)  # tokens of each document that are prompt


def _write(folder: Path, source: Source, layout: _Layout, settings: dict[str, Any], report: Report) -> None:
    report(f"tokenising {source.description}")
    tally = _Tally(counts=np.zeros(layout.vocabulary.size, np.int64))
    began = reported = time.monotonic()
    with _token_file(folder) as file:
        for encoded in encode_ahead(source.documents(), _encoder(layout)):
            tokens = _add(tally, encoded, layout)
            with writing(folder.parent):  # not around the loop: errors of the source are no errors of writing
                file.write(tokens.astype(layout.dtype).data)
            if time.monotonic() - reported > max(REPORT_SECONDS, (reported - began) / 2):
                reported = time.monotonic()
                speed = tally.tokens / (reported - began)
                report(f"{tally.documents:,} documents, {tally.tokens:,} tokens, {speed:,.0f} tokens/s")
    meta = _meta(tally, source, layout, settings)
    if not meta["rows"]:
        raise UserError(_nothing_usable(tally, source, layout))
    with writing(folder.parent):
        _save_arrays(folder, tally, causal=layout.causal)
        meta |= records_of(folder)
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    report(
        f"tokenised {tally.documents:,} documents into {meta['rows']:,} rows, {tally.tokens:,} tokens in "
        f"{time.monotonic() - began:.1f} s ({tally.short:,} too short, {tally.unknown:,} unknown"
        f"{f', {tally.long:,} too long' if layout.template else ''})"
    )


@contextmanager
def _token_file(folder: Path) -> Iterator[IO[bytes]]:
    with writing(folder.parent):
        file = open(folder / TOKENS, "wb")  # noqa: SIM115 - the block may raise OSErrors of the source
    try:
        yield file
    finally:
        with writing(folder.parent):
            file.close()


def _encoder(layout: _Layout) -> Callable[[list[Any]], Encoded]:
    if not layout.template:
        return partial(encode_texts, tokenizer=layout.tokenizer)
    room = layout.data.max_length - len(layout.prefix) - 1
    return partial(encode_pairs, tokenizer=layout.tokenizer, template=layout.template, max_length=room)


def _add(tally: _Tally, encoded: Encoded, layout: _Layout) -> Integer[np.ndarray, "tokens"]:
    """Frames a block of documents, drops what is unusable, and returns the tokens of the rows that are full."""
    framed = _framed(encoded.documents, layout)
    is_short, is_unknown = too_short_or_unknown(framed, layout.data, unk=layout.unk)
    keep = ~(is_short | is_unknown)
    kept = rows = select(framed, keep)
    prompts = np.zeros(len(keep), np.int64) if encoded.prompts is None else encoded.prompts + len(layout.prefix)
    if layout.data.packed:
        rows, tally.rest = fill_rows(np.concatenate([tally.rest, kept.tokens]), length=layout.data.max_length)
    tally.documents += encoded.read
    tally.long += encoded.read - len(encoded.documents.lengths)
    tally.short += int(is_short.sum())
    tally.unknown += int(is_unknown.sum())
    tally.tokens += len(rows.tokens)
    tally.counts += np.bincount(rows.tokens, minlength=layout.vocabulary.size)
    tally.row_lengths.append(rows.lengths)
    tally.document_lengths.append(kept.lengths)
    tally.prompts.append(prompts[keep])
    return rows.tokens


def _framed(documents: Ragged, layout: _Layout) -> Ragged:
    max_length = None if layout.data.packed else layout.data.max_length
    vocabulary = layout.vocabulary
    if layout.causal:
        return frame_causal(documents, prefix=layout.prefix, eos=vocabulary.eos, max_length=max_length)
    return frame(documents, bos=vocabulary.bos, eos=vocabulary.eos, max_length=max_length)


def _meta(tally: _Tally, source: Source, layout: _Layout, settings: dict[str, Any]) -> dict[str, Any]:
    return {
        **settings,
        "describe": source.description,
        "dtype": layout.dtype.name,
        "documents": tally.documents,
        "rows": sum(map(len, tally.row_lengths)),
        "tokens": tally.tokens,
        "dropped_short": tally.short,
        "dropped_unk": tally.unknown,
        "dropped_rest_tokens": len(tally.rest),
        **({"dropped_long": tally.long} if layout.template else {}),
    }


def _nothing_usable(tally: _Tally, source: Source, layout: _Layout) -> str:
    data = layout.data
    message = (
        f"no usable text in {source.description}: {tally.documents:,} documents read, {tally.short:,} dropped under "
        f"{data.min_tokens} tokens, {tally.unknown:,} dropped for {data.max_unk_fraction:.0%} or more unknown tokens"
    )
    if layout.template:
        message += f", {tally.long:,} dropped for no room for a prompt in {data.max_length} tokens"
    if data.packed:
        message += f", {len(tally.rest):,} tokens do not fill one row"
    return message


def _save_arrays(folder: Path, tally: _Tally, *, causal: bool) -> None:
    np.save(folder / "offsets.npy", _offsets(tally.row_lengths))
    np.save(folder / "counts.npy", tally.counts)
    if causal:
        starts = _offsets(tally.document_lengths)
        # Packing drops the tokens left at the end: documents that begin there are dropped, and one may be cut.
        count = int(np.searchsorted(starts, tally.tokens))
        starts = np.minimum(starts[: count + 1], tally.tokens)
        np.save(folder / "documents.npy", starts)
        np.save(folder / "prompts.npy", np.minimum(np.concatenate(tally.prompts)[:count], np.diff(starts)))


def _offsets(lengths: list[Int64[np.ndarray, "_"]]) -> Int64[np.ndarray, "starts_and_end"]:
    return np.concatenate([[0], *lengths]).cumsum(dtype=np.int64)
