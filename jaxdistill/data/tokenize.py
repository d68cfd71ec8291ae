"""Tokenises a source once into a folder that is memory-mapped for training.

The folder is named by a hash of everything that decides on its content, so a second run reuses it and a
changed file, tokenizer or setting does not. It holds tokens.bin (rows back to back; uint16, or int32 for
65,536 ids and more), offsets.npy (int64, where each row starts, and the end), counts.npy (int64, how often
each id stands in tokens.bin) and meta.json (settings and counts). For causal models also documents.npy (int64, where
each document starts, and the end) and prompts.npy (int64, how many of its tokens are prompt).
"""

import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, Integer

from jaxdistill.data.sources import Document, Source
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


def vocabulary_of(tokenizer: Any, *, causal: bool = False) -> Vocabulary:
    """The Vocabulary of a fast tokenizer of transformers.

    Without a padding token (GPT-2) pad is unk, as in the reference, or else eos.

    Raises:
      UserError: a slow tokenizer, or one that has no tokens to frame a document, of causal models to end it.
    """
    name = type(tokenizer).__name__
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{name} is not a fast tokenizer; save one with its tokenizer.json")
    if None not in (tokenizer.cls_token_id, tokenizer.sep_token_id):
        bos, eos = tokenizer.cls_token_id, tokenizer.sep_token_id
    else:
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if causal:
        eos = tokenizer.eos_token_id
        if eos is None:
            raise UserError(f"{name} has no eos token to end a text; set it")
        bos = eos  # not put anywhere: a text begins with what the tokenizer itself puts there
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
    causal: bool = False,
    template: str = "",
) -> Path:
    """Tokenises `source` into cache_dir/<content hash>, or finds it there.

    Lengths count tokens with the frame. Without packing a document becomes `bos … eos`, cut as the reference
    does into rows of at most max_length with a frame each; rows under min_tokens, or with a share of unk of
    max_unk_fraction or more, are dropped. With packing these two apply to whole documents, which are strung
    together and cut into rows of exactly max_length; the tokens left at the end are dropped.

    For causal models a document is what the tokenizer itself puts before a text (nothing for GPT-2, <s> for Llama), so
    that a prompt looks as it does in training, the text, and eos. Longer than max_length it goes on in the next row as
    it is. Pairs are put into the `template`: what is too long loses the end of its prompt, and is dropped where nothing
    of that would be left. White space right before {completion} belongs to it: byte-level vocabularies have words with
    their space.

    A folder appears under its final name whole or not at all, whatever happens and however many processes
    prepare.

    Args:
      tokenizer: a fast tokenizer of transformers; left as it is.
      tell: takes lines for the log.
      causal: for causal models.
      template: "" = plain text; else the source has pairs, and this holds {prompt} and ends with {completion}.

    Raises:
      UserError: nothing usable in the source, or it cannot be read or the folder cannot be written (disk
        full); a template of another form.
    """
    import filelock
    import tokenizers

    if max_length < 4:
        raise UserError(f"max_length={max_length} leaves no room for text between the frame tokens; give 4 or more")
    if template:
        _check_template(template)
    vocabulary = vocabulary_of(tokenizer, causal=causal)
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
        **({"causal": True, "template": template} if causal else {}),
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


def _check_template(template: str) -> None:
    once = template.count("{prompt}") == template.count("{completion}") == 1
    if not (once and template.endswith("{completion}")):
        raise UserError(f"data.template={template!r} must hold {{prompt}} once and end with its one {{completion}}")


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
    own_lengths: list[Int64[np.ndarray, "_"]] = []  # of documents, where rows are packed
    prompts: list[Int64[np.ndarray, "_"]] = []
    documents = tokens = short = unknown = long = 0
    causal, template = settings.get("causal", False), settings.get("template", "")
    prefix = own_prefix(rust) if causal else ()
    # GPT-2's unknown token is its end token, which every document has and which then says nothing.
    unk = None if causal and vocabulary.unk == vocabulary.eos else vocabulary.unk
    encode = functools.partial(_encode_block, rust)
    if template:
        longest = settings["max_length"] - len(prefix) - 1
        encode = functools.partial(encode_pairs, rust=rust, template=template, max_length=longest)
    rest = np.empty(0, np.int32)  # packing: what does not fill a row yet
    start = told = time.monotonic()
    with _writing(folder.parent):
        file = open(folder / "tokens.bin", "wb")  # noqa: SIM115 - reading and writing errors are told apart below
    try:
        for encoded in _ahead(source.texts(), encode):
            documents += encoded.documents
            long += encoded.documents - len(encoded.lengths)
            cut = None if settings["pack"] else settings["max_length"]
            if causal:
                rows, row_lengths = frame_causal(
                    encoded.tokens, encoded.lengths, prefix=prefix, eos=vocabulary.eos, max_length=cut
                )
            else:
                rows, row_lengths = frame(
                    encoded.tokens, encoded.lengths, bos=vocabulary.bos, eos=vocabulary.eos, max_length=cut
                )
            is_short = row_lengths < settings["min_tokens"]
            is_unknown = ~is_short & (_share(rows, row_lengths, unk) >= settings["max_unk_fraction"])
            short, unknown = short + int(is_short.sum()), unknown + int(is_unknown.sum())
            keep = ~(is_short | is_unknown)
            own = np.zeros(len(keep), np.int64) if encoded.prompts is None else encoded.prompts + len(prefix)
            prompts.append(own[keep])
            rows, row_lengths = rows[np.repeat(keep, row_lengths)], row_lengths[keep]
            own_lengths.append(row_lengths)
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
        **({"dropped_long": long} if template else {}),
    }
    if not meta["rows"]:
        left = f", {long:,} dropped for no room for a prompt in {settings['max_length']} tokens" if template else ""
        left += f", {len(rest):,} tokens do not fill one row" if settings["pack"] else ""
        raise UserError(
            f"no usable text in {source.describe}: {documents:,} documents read, {short:,} dropped under "
            f"{settings['min_tokens']} tokens, {unknown:,} dropped for "
            f"{settings['max_unk_fraction']:.0%} or more unknown tokens{left}"
        )
    with _writing(folder.parent):
        np.save(folder / "offsets.npy", offsets)
        np.save(folder / "counts.npy", counts)
        if causal:
            starts = np.concatenate([[0], *own_lengths]).cumsum(dtype=np.int64)
            whole = int(np.searchsorted(starts, tokens))  # those that begin before the tokens left at the end
            starts = np.minimum(starts[: whole + 1], tokens)
            np.save(folder / "documents.npy", starts)
            np.save(folder / "prompts.npy", np.minimum(np.concatenate(prompts)[:whole], np.diff(starts)))
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    seconds = time.monotonic() - start
    tell(
        f"tokenised {documents:,} documents into {meta['rows']:,} rows, {tokens:,} tokens in {seconds:.1f} s "
        f"({short:,} too short, {unknown:,} unknown{f', {long:,} too long' if template else ''})"
    )


def _blocks(texts: Iterator[Document]) -> Iterator[list[Document]]:
    while block := list(itertools.islice(texts, 1)):
        characters = _size(block[0])
        while characters < BLOCK_CHARACTERS and len(block) < BLOCK_DOCUMENTS:
            text = next(texts, None)
            if text is None:
                break
            block.append(text)
            characters += _size(text)
        yield block


def _size(document: Document) -> int:
    return len(document) if isinstance(document, str) else sum(map(len, document))


class Encoded(NamedTuple):
    """The ids of some documents, back to back, without a frame."""

    tokens: Integer[np.ndarray, "tokens"]
    lengths: Int64[np.ndarray, "kept"]
    documents: int  # that were read; those that are too long are not among `lengths`
    prompts: Int64[np.ndarray, "kept"] | None = None  # tokens of each that are prompt


def _ahead(texts: Iterator[Document], encode: Callable[[list[Any]], Encoded]) -> Iterator[Encoded]:
    """Block after block. The Rust side uses all cores without the interpreter lock, so the next block is encoded while
    this one is copied and written."""
    with ThreadPoolExecutor(1) as pool:
        coming = None
        for block in _blocks(texts):
            current, coming = coming, pool.submit(encode, block)
            if current is not None:
                yield current.result()
        if coming is not None:
            yield coming.result()


def _encode_block(rust: Any, block: list[str]) -> Encoded:
    tokens, lengths = _flatten(rust.encode_batch_fast(block, add_special_tokens=False))
    return Encoded(tokens, lengths, documents=len(block))


def encode_pairs(pairs: Sequence[tuple[str, str]], *, rust: Any, template: str, max_length: int) -> Encoded:
    """Prompts and completions in their template, each pair at most max_length tokens; see `prepare`.

    A pair is tokenised as one text, so that its tokens are those of anybody who writes it so, and parted where its
    characters are. Pairs without room for one token of the prompt itself are left out.
    """
    before, _, between = template.removesuffix("{completion}").partition("{prompt}")
    literal = len(between.rstrip())
    texts = [f"{before}{prompt}{between}{completion}" for prompt, completion in pairs]
    tokens, sizes = [], []
    for (prompt, _), encoding in zip(pairs, rust.encode_batch(texts, add_special_tokens=False), strict=True):
        ids, ends = np.array(encoding.ids, np.int32), np.array([end for _, end in encoding.offsets], np.int64)
        # Tokens that reach over a border belong to what follows it.
        head, own, middle = (
            int((ends <= border).sum())
            for border in (len(before), len(before + prompt), len(before + prompt) + literal)
        )
        room = max_length - (len(ids) - own)
        if room >= min(own, head + 1):
            tokens += [ids[: min(own, room)], ids[own:]]
            sizes.append((min(own, room) + middle - own, len(ids) - middle))
    size = np.array(sizes, np.int64).reshape(-1, 2)
    flat = np.concatenate(tokens) if tokens else np.empty(0, np.int32)
    return Encoded(flat, size.sum(axis=1), documents=len(pairs), prompts=size[:, 0])


def _flatten(encodings: list[Any]) -> tuple[Integer[np.ndarray, "tokens"], Int64[np.ndarray, "documents"]]:
    ids = [encoding.ids for encoding in encodings]
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    return np.fromiter(itertools.chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths


def own_prefix(rust: Any) -> tuple[int, ...]:
    """The ids that a tokenizer itself puts before a text."""
    encoding = rust.encode("a")
    words = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
    return tuple(id for id, _ in itertools.takewhile(lambda word: word[1], words))


def frame_causal(
    tokens: Integer[np.ndarray, "tokens"],
    lengths: Int64[np.ndarray, "documents"],
    *,
    prefix: Sequence[int],
    eos: int,
    max_length: int | None,
) -> tuple[Integer[np.ndarray, "framed"], Int64[np.ndarray, "rows"]]:
    """Documents, back to back, as `prefix … eos`, cut where a row of max_length is full (None: one row a document)."""
    framed = lengths + len(prefix) + 1
    ends = np.cumsum(framed)
    inside: Bool[np.ndarray, "framed"] = np.ones(int(framed.sum()), bool)
    out = np.empty(len(inside), tokens.dtype)
    for place, id in ((ends - 1, eos), *((ends - framed + i, id) for i, id in enumerate(prefix))):
        inside[place] = False
        out[place] = id
    out[inside] = tokens
    if max_length is None:
        return out, framed
    rows = -(-framed // max_length)
    row_lengths = np.full(int(rows.sum()), max_length, np.int64)
    row_lengths[np.cumsum(rows) - 1] = framed - (rows - 1) * max_length
    return out, row_lengths


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
    documents: Int64[np.ndarray, "documents_and_1"] | None = None
    """Where each document starts in `tokens`, of the whole folder; None where it was not prepared for causal models."""
    prompts: Int64[np.ndarray, "documents"] | None = None
    """How many tokens of each document are prompt."""

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
        documents = prompts = None
        if meta.get("causal", False):
            documents, prompts = np.load(path / "documents.npy"), np.load(path / "prompts.npy")
            if (len(documents) - 1, int(documents[-1])) != (len(prompts), meta["tokens"]):
                raise ValueError("documents and prompts do not go together")
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
        path=path,
        meta=meta,
        tokens=tokens,
        offsets=offsets,
        lengths=np.diff(offsets),
        token_counts=counts,
        documents=documents,
        prompts=prompts,
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
