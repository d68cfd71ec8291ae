"""Tokenises a source once into a folder that is memory-mapped for training.

The folder is named by a hash of everything that decides on its content, so a second run reuses it and a
changed file, tokenizer or setting does not. It holds tokens.bin (rows back to back; uint16, or int32 for
65,536 ids and more), offsets.npy (int64, where each row starts, and the end), counts.npy (int64, how often
each id stands in tokens.bin) and meta.json (settings and counts).
"""

import dataclasses
import errno
import hashlib
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, Integer

from jaxdistill.data.sources import Source
from jaxdistill.errors import UserError

FORMAT_VERSION = 1
# Text encoded at a time. An encoding takes about 100 bytes a token in the tokenizer's memory, so this is some
# 100 MB in flight with two blocks, while it still feeds many cores.
BLOCK_CHARACTERS = 2_000_000
BLOCK_DOCUMENTS = 16_384
TELL_SECONDS = 10.0


@dataclass(frozen=True)
class Vocabulary:
    """What batching and masking need to know of a tokenizer."""

    size: int
    """Ids are below this."""
    bos: int
    """Frames a document at its start: [CLS] for BERT, <s> for RoBERTa."""
    eos: int
    """Frames a document at its end: [SEP] for BERT, </s> for RoBERTa."""
    pad: int
    unk: int | None
    mask: int | None
    """None for tokenizers of causal models."""
    special: tuple[int, ...]
    """All special ids, ascending: these are never masked."""


def vocabulary_of(tokenizer: Any) -> Vocabulary:
    """The Vocabulary of a fast tokenizer of transformers.

    Without a padding token (GPT-2) pad is unk, as in the reference, or else eos.

    Raises:
      UserError: a slow tokenizer, or one that has no tokens to frame a document.
    """
    name = type(tokenizer).__name__
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{name} is not a fast tokenizer; save one with its tokenizer.json")
    if None not in (tokenizer.cls_token_id, tokenizer.sep_token_id):
        bos, eos = tokenizer.cls_token_id, tokenizer.sep_token_id
    else:
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is None or eos is None:
        raise UserError(f"{name} has neither cls and sep nor bos and eos tokens to frame a document; set them")
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


def prepare(
    source: Source,
    tokenizer: Any,
    *,
    cache_dir: Path,
    max_length: int,
    min_tokens: int,
    max_unk_fraction: float,
    pack: bool,
    tell: Callable[[str], None],
) -> Path:
    """Tokenises `source` into cache_dir/<content hash>, or finds it there.

    Lengths count tokens with the frame. Without packing a document becomes `bos … eos`, cut as the reference
    does into rows of at most max_length with a frame each; rows under min_tokens, or with a share of unk of
    max_unk_fraction or more, are dropped. With packing these two apply to whole documents, which are strung
    together and cut into rows of exactly max_length; the tokens left at the end are dropped.

    A folder appears under its final name whole or not at all, whatever happens and however many processes
    prepare.

    Args:
      tokenizer: a fast tokenizer of transformers; left as it is.
      tell: takes lines for the log.

    Raises:
      UserError: nothing usable in the source, or it cannot be read or the folder cannot be written (disk
        full).
    """
    import filelock
    import tokenizers

    if max_length < 4:
        raise UserError(f"max_length={max_length} leaves no room for text between the frame tokens; give 4 or more")
    vocabulary = vocabulary_of(tokenizer)
    # A copy: the transformers object sets truncation and padding on its own at every call, and hashes differ
    # with them.
    rust = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    rust.no_truncation()
    rust.no_padding()
    settings = {
        "max_length": max_length,
        "min_tokens": min_tokens,
        "max_unk_fraction": max_unk_fraction,
        "pack": pack,
        "source": source.fingerprint,
        "tokenizer": hashlib.sha256(rust.to_str().encode()).hexdigest(),
        "vocabulary": dataclasses.asdict(vocabulary),
        "format_version": FORMAT_VERSION,
    }
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    final = Path(cache_dir) / name
    if final.exists():
        return _reuse(final, tell)

    with _writing(cache_dir):
        final.parent.mkdir(parents=True, exist_ok=True)
    # The lock only saves work: a second process waits and reuses, and what a killed one left is cleared.
    # Without it (a file system that has no locks) both work in folders of their own and the first rename
    # wins.
    lock = filelock.FileLock(final.with_suffix(".lock"))
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        tell(f"waiting for another process that prepares {final}")
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        tell(f"no file locks in {cache_dir} ({error}); preparing without")
    try:
        if final.exists():
            return _reuse(final, tell)
        if lock.is_locked:
            for stale in final.parent.glob(f"{name}.partial-*"):
                shutil.rmtree(stale, ignore_errors=True)
        with _writing(cache_dir):
            partial = Path(tempfile.mkdtemp(dir=final.parent, prefix=f"{name}.partial-"))
        try:
            _write(partial, source, rust, vocabulary, settings, tell)
            _publish(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # gone already where the rename succeeded
    finally:
        lock.release()
    return final


def _reuse(final: Path, tell: Callable[[str], None]) -> Path:
    store = open_store(final)
    tell(f"reusing {final}: {len(store):,} rows, {store.meta['tokens']:,} tokens")
    return final


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write prepared data in {str(folder)!r}: {error.strerror or error}; "
            "make room there or choose another cache folder"
        ) from error


def _publish(partial: Path, final: Path) -> None:
    with _writing(final.parent):
        for file in [*partial.iterdir(), partial]:
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        try:
            os.rename(partial, final)
        except OSError as error:
            # Another process without a lock was first: its folder has the same content.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        descriptor = os.open(final.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _write(
    folder: Path,
    source: Source,
    rust: Any,
    vocabulary: Vocabulary,
    settings: dict[str, Any],
    tell: Callable[[str], None],
) -> None:
    tell(f"tokenising {source.describe}")
    dtype = np.dtype(np.uint16 if vocabulary.size < 65_536 else np.int32)
    counts = np.zeros(vocabulary.size, np.int64)
    lengths: list[Int64[np.ndarray, "_"]] = []
    documents = tokens = short = unknown = 0
    rest = np.empty(0, np.int32)  # packing: what does not fill a row yet
    start = told = time.monotonic()
    with _writing(folder.parent):
        file = open(folder / "tokens.bin", "wb")  # noqa: SIM115 - reading and writing errors are told apart below
    try:
        for flat, document_lengths in _encode(source.texts(), rust):
            documents += len(document_lengths)
            cut = None if settings["pack"] else settings["max_length"]
            rows, row_lengths = frame(flat, document_lengths, bos=vocabulary.bos, eos=vocabulary.eos, max_length=cut)
            is_short = row_lengths < settings["min_tokens"]
            is_unknown = ~is_short & (_share(rows, row_lengths, vocabulary.unk) >= settings["max_unk_fraction"])
            short, unknown = short + int(is_short.sum()), unknown + int(is_unknown.sum())
            keep = ~(is_short | is_unknown)
            rows, row_lengths = rows[np.repeat(keep, row_lengths)], row_lengths[keep]
            if settings["pack"]:
                rows = np.concatenate([rest, rows])
                whole = len(rows) // settings["max_length"]
                rows, rest = np.split(rows, [whole * settings["max_length"]])
                row_lengths = np.full(whole, settings["max_length"], np.int64)
            counts += np.bincount(rows, minlength=vocabulary.size)
            lengths.append(row_lengths)
            tokens += len(rows)
            with _writing(folder.parent):
                file.write(rows.astype(dtype).data)
            if time.monotonic() - told > TELL_SECONDS:
                told = time.monotonic()
                tell(f"{documents:,} documents, {tokens:,} tokens, {tokens / (told - start):,.0f} tokens/s")
    finally:
        with _writing(folder.parent):
            file.close()

    offsets = np.concatenate([[0], *lengths]).cumsum(dtype=np.int64)
    meta = {
        **settings,
        "describe": source.describe,
        "dtype": dtype.name,
        "documents": documents,
        "rows": len(offsets) - 1,
        "tokens": tokens,
        "dropped_short": short,
        "dropped_unk": unknown,
        "dropped_rest_tokens": len(rest),
    }
    if not meta["rows"]:
        left = f", {len(rest):,} tokens do not fill one row" if settings["pack"] else ""
        raise UserError(
            f"no usable text in {source.describe}: {documents:,} documents read, {short:,} dropped under "
            f"{settings['min_tokens']} tokens, {unknown:,} dropped for "
            f"{settings['max_unk_fraction']:.0%} or more unknown tokens{left}"
        )
    with _writing(folder.parent):
        np.save(folder / "offsets.npy", offsets)
        np.save(folder / "counts.npy", counts)
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    seconds = time.monotonic() - start
    tell(
        f"tokenised {documents:,} documents into {meta['rows']:,} rows, {tokens:,} tokens in {seconds:.1f} s "
        f"({short:,} too short, {unknown:,} unknown)"
    )


def _blocks(texts: Iterator[str]) -> Iterator[list[str]]:
    while block := list(itertools.islice(texts, 1)):
        characters = len(block[0])
        while characters < BLOCK_CHARACTERS and len(block) < BLOCK_DOCUMENTS:
            text = next(texts, None)
            if text is None:
                break
            block.append(text)
            characters += len(text)
        yield block


def _encode(
    texts: Iterator[str], rust: Any
) -> Iterator[tuple[Integer[np.ndarray, "tokens"], Int64[np.ndarray, "documents"]]]:
    """Ids of block after block, back to back, and the length of each document.

    The Rust side uses all cores without the interpreter lock, so the next block is encoded while this one is
    copied and written.
    """

    def encode(block: list[str]) -> list[Any]:
        return rust.encode_batch_fast(block, add_special_tokens=False)

    with ThreadPoolExecutor(1) as pool:
        coming = None
        for block in _blocks(texts):
            current, coming = coming, pool.submit(encode, block)
            if current is not None:
                yield _flatten(current.result())
        if coming is not None:
            yield _flatten(coming.result())


def _flatten(encodings: list[Any]) -> tuple[Integer[np.ndarray, "tokens"], Int64[np.ndarray, "documents"]]:
    ids = [encoding.ids for encoding in encodings]
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    return np.fromiter(itertools.chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths


def frame(
    tokens: Integer[np.ndarray, "tokens"],
    lengths: Int64[np.ndarray, "documents"],
    *,
    bos: int,
    eos: int,
    max_length: int | None,
) -> tuple[Integer[np.ndarray, "framed"], Int64[np.ndarray, "rows"]]:
    """Documents, back to back, into rows `bos … eos` of at most max_length tokens (None: one row a document).

    As the reference cuts: a document that is too long *with its frame* goes in pieces of max_length - 2, and
    each piece gets the frame tokens that it lacks. So a first row is one token shorter than the ones in the
    middle.
    """
    framed = lengths + 2
    piece = np.iinfo(np.int64).max if max_length is None else max_length - 2
    rows = np.where(framed <= (max_length or piece), 1, -(-framed // piece))
    ends = np.cumsum(rows)
    last = np.zeros(int(rows.sum()), bool)
    last[ends - 1] = True
    index = np.arange(len(last)) - np.repeat(ends - rows, rows)
    document = np.repeat(lengths, rows)
    # Cut j stands before position j * piece of the framed document, so before token j * piece - 1 of the bare
    # one.
    stop = np.where(last, document, (index + 1) * (piece if max_length else 0) - 1)
    begin = np.where(index == 0, 0, index * (piece if max_length else 0) - 1)
    row_lengths = stop - begin + 2

    row_ends = np.cumsum(row_lengths)
    inside: Bool[np.ndarray, "framed"] = np.ones(int(row_lengths.sum()), bool)
    inside[row_ends - 1] = False
    inside[row_ends - row_lengths] = False
    out = np.empty(len(inside), tokens.dtype)
    out[row_ends - row_lengths] = bos
    out[row_ends - 1] = eos
    out[inside] = tokens
    return out, row_lengths


def _share(rows: Integer[np.ndarray, "framed"], lengths: Int64[np.ndarray, "rows"], unk: int | None) -> np.ndarray:
    """Share of unknown tokens a row."""
    if unk is None:
        return np.zeros(len(lengths))
    seen = np.concatenate([[0], np.cumsum(rows == unk)])
    ends = np.cumsum(lengths)
    return (seen[ends] - seen[ends - lengths]) / lengths


@dataclass(frozen=True, eq=False)
class TokenStore:
    """Prepared rows, memory-mapped: only what is read is in memory. `store[i]` is row i."""

    path: Path
    meta: dict[str, Any]
    tokens: Integer[np.ndarray, "tokens"]
    offsets: Int64[np.ndarray, "rows_and_1"]
    lengths: Int64[np.ndarray, "rows"]
    token_counts: Int64[np.ndarray, "vocab"]
    """Of the whole folder, of a slice too."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> Integer[np.ndarray, "length"]:
        return self.tokens[self.offsets[row] : self.offsets[row + 1]]

    def slice(self, start: int, stop: int) -> "TokenStore":
        """A view of rows start to stop - 1."""
        assert 0 <= start <= stop <= len(self), (start, stop, len(self))
        return dataclasses.replace(self, offsets=self.offsets[start : stop + 1], lengths=self.lengths[start:stop])


def open_store(path: Path | str) -> TokenStore:
    """Opens a folder that `prepare` wrote.

    Raises:
      UserError: it is not one, is of another format version, or is truncated.
    """
    path = Path(path)
    try:
        meta = json.loads((path / "meta.json").read_text())
        version = meta["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(path)!r} is not a folder of prepared data (no readable meta.json)") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{str(path)!r} has prepared data of format {version}, not {FORMAT_VERSION}; prepare it again")
    try:
        # As plain arrays, for slicing a np.memmap is several times slower.
        tokens = np.asarray(np.memmap(path / "tokens.bin", meta["dtype"], mode="r"))
        offsets = np.load(path / "offsets.npy")
        counts = np.load(path / "counts.npy")
        sizes = (len(tokens), len(offsets) - 1, int(offsets[-1]), len(counts))
        expected = (meta["tokens"], meta["rows"], meta["tokens"], meta["vocabulary"]["size"])
    except (OSError, ValueError, EOFError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"prepared data {str(path)!r} is damaged ({error}); delete the folder") from error
    if sizes != expected:
        raise UserError(
            f"prepared data {str(path)!r} is truncated: tokens, rows, end of the last row and vocabulary "
            f"are {sizes}, meta.json says {expected}; delete the folder"
        )
    return TokenStore(
        path=path, meta=meta, tokens=tokens, offsets=offsets, lengths=np.diff(offsets), token_counts=counts
    )


def split_store(store: TokenStore, *, fraction: float) -> tuple[TokenStore, TokenStore]:
    """(train, held-out): the last rows are held out, so a cut document can stand on both sides at one place
    only.

    Raises:
      UserError: fraction is not between 0 and 1, or there are fewer than two rows.
    """
    if not 0 < fraction < 1:
        raise UserError(f"held-out fraction {fraction} is not between 0 and 1")
    if len(store) < 2:
        raise UserError(f"{str(store.path)!r} has {len(store)} row; holding some out needs two or more")
    held_out = min(max(1, round(len(store) * fraction)), len(store) - 1)
    return store.slice(0, len(store) - held_out), store.slice(len(store) - held_out, len(store))


def load_token_counts(path: Path | str) -> Int64[np.ndarray, "vocab"]:
    """Token counts by id, from a .npy array or a .json list.

    Raises:
      UserError: it cannot be read, or is not a flat list of counts.
    """
    path = Path(path)
    try:
        counts = np.asarray(json.loads(path.read_text())) if path.suffix == ".json" else np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read token counts {str(path)!r} as a .npy array or a .json list: {error}") from error
    if counts.ndim != 1 or not np.issubdtype(counts.dtype, np.integer) or (counts < 0).any():
        raise UserError(f"token counts {str(path)!r} must be one flat list of whole numbers of 0 or more")
    return counts.astype(np.int64)
