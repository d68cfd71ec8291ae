"""A teacher's answers on a text, kept in a folder: its format, how a shard is written, and how a batch finds its own.

docs/cache.md describes the format for other programs that write such a folder. Answers are found by content and never
by order: the key of an example is a hash of its token ids as the teacher saw them, masks included, and of the tokens
whose answers are kept. So shuffling, other batch sizes, resuming and other devices find theirs.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
import pydantic
from jaxtyping import Bool, Integer, Shaped, UInt8

from jaxdistill.data.batching import HostBatch
from jaxdistill.data.store import CHECKED_ALWAYS_BYTES, TokenFile, digest_of, identity_of
from jaxdistill.errors import UserError, first_line, place_in
from jaxdistill.files import folder_beside, read_json, writing

FORMAT_VERSION = 1
META, SHARD = "meta.json", "shard.json"
TEACHER = "teacher"  # folder with the teacher's configuration and tokenizer
KEY_BYTES = 16

Positive = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]


def of_teacher(number: int) -> str:
    """The beginning of the names of the arrays that a batch gets from a cache, the first one having the number 0."""
    return f"teacher_{number}_" if number else "teacher_"


class TeacherRecord(pydantic.BaseModel, strict=True):
    """The teacher of a cache; the fingerprint is of its weights, "" where the writer has none."""

    name: str = ""
    revision: str = ""
    fingerprint: str = ""
    dtype: str = ""  # of its computation


class Meta(pydantic.BaseModel):
    """The content of meta.json."""

    format_version: Literal[1] = FORMAT_VERSION
    kind: Literal["sampled", "topk", "topk+sampled"]
    tokens: Literal["all", "labels"]  # whose answers are kept: those of all tokens, or of the predicted ones
    words: pydantic.PositiveInt  # answers are over the ids below this
    temperatures: tuple[Positive, ...] = pydantic.Field(min_length=1)
    k: pydantic.NonNegativeInt = 0
    samples: pydantic.NonNegativeInt = 0
    values: Literal["float16", "float32"] = "float16"
    layers: tuple[pydantic.NonNegativeInt, ...] = ()  # hidden states that are kept, 0 being the embeddings
    width: pydantic.NonNegativeInt = 0  # of hidden states
    teacher: TeacherRecord = TeacherRecord()
    causal: bool
    texts: list[dict[str, Any]] = []  # texts, with their masks, all of whose examples are there

    @pydantic.model_validator(mode="after")
    def _sizes(self) -> "Meta":
        if ("topk" in self.kind) != bool(self.k) or ("sampled" in self.kind) != bool(self.samples):
            raise ValueError(f"kind {self.kind} does not go with k={self.k} and samples={self.samples}")
        if self.k > self.words:
            raise ValueError(f"k={self.k} is more than the {self.words} words")
        if self.layers and not self.width:
            raise ValueError("layers are named without their width")
        return self

    @property
    def whole(self) -> bool:
        """Whether all words are kept with their probabilities."""
        return self.k == self.words


class Column(NamedTuple):
    """One array of a shard: raw little-endian values, one entry after the other."""

    dtype: str
    shape: tuple[int, ...]  # of an entry
    every_token: bool = False  # an entry for every token of an example, and not for those that are kept alone

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=int))


def columns_of(meta: Meta) -> dict[str, Column]:
    """The arrays of every shard, by name; each is a file NAME.bin."""
    t = len(meta.temperatures)
    word = ("<u2", ()) if meta.words <= 1 << 16 else ("u1", (3,))  # three bytes, the lowest first
    columns = {}
    if meta.k:
        columns["words"] = Column(word[0], (meta.k, *word[1]))
        columns["log_probs"] = Column({"float16": "<f2", "float32": "<f4"}[meta.values], (meta.k,))
        columns["tails"] = Column("<f4", (t,))
    if meta.samples:
        columns["samples"] = Column(word[0], (t, meta.samples, *word[1]))
        columns["floors"] = Column("<f2", (t,))
    return columns | {f"hidden_{i}": Column("<u2", (meta.width,), every_token=True) for i in meta.layers}


def bytes_per_token(meta: Meta) -> int:
    """Bytes of the answers of one token, without hidden states and without the key of its example."""
    columns = [c for c in columns_of(meta).values() if not c.every_token]
    return sum(np.dtype(c.dtype).itemsize * c.size for c in columns)


def stored(name: str, values: Shaped[np.ndarray, "..."], meta: Meta) -> Shaped[np.ndarray, "..."]:
    """Values of an array of `columns_of` in the type that they are stored in."""
    if name in ("words", "samples"):
        return packed_words(values, meta)
    return np.ascontiguousarray(values).view("<u2") if name.startswith("hidden_") else values


def packed_words(words: Integer[np.ndarray, "..."], meta: Meta) -> Shaped[np.ndarray, "..."]:
    """Ids as they are stored."""
    if meta.words <= 1 << 16:
        return words.astype("<u2")
    return np.ascontiguousarray(words.astype("<u4")).view("u1").reshape(*words.shape, 4)[..., :3]


def _unpacked_words(stored: Shaped[np.ndarray, "..."], meta: Meta) -> Integer[np.ndarray, "..."]:
    if meta.words <= 1 << 16:
        return stored
    return (stored.astype(np.int32) << np.array([0, 8, 16], np.int32)).sum(axis=-1, dtype=np.int32)


# Examples, and their keys.


class Example(NamedTuple):
    """A part of a batch's row that the teacher sees by itself."""

    key: bytes
    row: int
    start: int
    stop: int
    kept: Integer[np.ndarray, "kept"]  # the places in the row of the tokens whose answers are kept


def key_of(ids: Integer[np.ndarray, "length"], kept: Bool[np.ndarray, "length"]) -> bytes:
    """The first 16 bytes of the SHA-256 of the ids, as 32 bits each, lowest byte first, and a byte 0 or 1 for each."""
    return hashlib.sha256(ids.astype("<i4").tobytes() + kept.astype("u1").tobytes()).digest()[:KEY_BYTES]


def examples_of(batch: Mapping[str, np.ndarray], meta: Meta) -> Iterator[Example]:
    """The examples of a batch: its rows; of causal models with several documents in a row, each document's part."""
    real, labelled = batch["attention_mask"], batch["label_mask"]
    segments = batch.get("segment_ids")
    for row, length in enumerate(real.sum(axis=1).tolist()):
        inner = [] if segments is None else (1 + np.flatnonzero(np.diff(segments[row, :length]))).tolist()
        for start, stop in zip([0, *inner], [*inner, length], strict=True):
            kept = labelled[row, start:stop] if meta.tokens == "labels" else np.ones(stop - start, bool)
            if kept.any() or (meta.layers and stop > start):
                key = key_of(batch["input_ids"][row, start:stop], kept)
                yield Example(key, row, start, stop, start + np.flatnonzero(kept))


def digest_text(text: str) -> str:
    """A short hash of a text, for a record."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# Writing.


def write_meta(path: Path, meta: Meta) -> None:
    """Writes meta.json whole or not at all."""
    with writing(path):
        part = path / f"{META}.part"
        part.write_text(json.dumps(meta.model_dump(mode="json"), indent=2) + "\n")
        os.replace(part, path / META)


def write_shard(
    path: Path,
    name: str,
    *,
    keys: Sequence[bytes],
    lengths: Sequence[int],
    counts: Sequence[int],
    columns: Mapping[str, Shaped[np.ndarray, "..."]],
) -> None:
    """Writes the folder of a shard, whole or not at all.

    Args:
      keys: of the examples.
      lengths: tokens of each example.
      counts: how many of these are kept.
      columns: by the names of `columns_of`, in its types; entries of all examples one after the other.
    """
    arrays = {
        "keys": np.frombuffer(b"".join(keys), "u1").reshape(-1, KEY_BYTES),
        "lengths": np.asarray(lengths, "<i4"),
        "counts": np.asarray(counts, "<i4"),
        **columns,
    }
    with writing(path), folder_beside(path / name) as folder:
        for column, values in arrays.items():
            np.ascontiguousarray(values).tofile(folder / f"{column}.bin")
        files = [folder / f"{column}.bin" for column in arrays]
        record = {
            "examples": len(keys),
            "fingerprints": {file.name: digest_of(file) for file in files},
            "written": {file.name: list(identity_of(file)) for file in files},
        }
        (folder / SHARD).write_text(json.dumps(record, indent=2) + "\n")
        os.rename(folder, path / name)


# Reading.


@dataclass(frozen=True, eq=False)
class _Shard:
    """The open files of a shard, and where each example's entries begin in them."""

    keys: UInt8[np.ndarray, "examples key"]
    files: Mapping[str, TokenFile]
    starts: Integer[np.ndarray, "examples_and_1"]  # of kept tokens
    every_starts: Integer[np.ndarray, "examples_and_1"]  # of all tokens


@dataclass(frozen=True, eq=False)
class TeacherCache:
    """An open cache. Answers are read from its files when a batch asks for them."""

    path: Path
    meta: Meta
    shards: Sequence[_Shard]
    sorted_keys: Integer[np.ndarray, "examples"]  # the first eight bytes of every key, ascending
    places: Integer[np.ndarray, "examples 2"]  # shard, and number in it, of each of these

    def __len__(self) -> int:
        return len(self.sorted_keys)

    def find(self, key: bytes) -> tuple[int, int] | None:
        """(shard, number in it) of an example."""
        first = np.frombuffer(key, "<u8", count=1)[0]
        at = int(np.searchsorted(self.sorted_keys, first))
        while at < len(self) and self.sorted_keys[at] == first:
            shard, number = self.places[at].tolist()
            if self.shards[shard].keys[number].tobytes() == key:
                return shard, number
            at += 1
        return None

    def read(self, place: tuple[int, int], name: str) -> Shaped[np.ndarray, "tokens *entry"]:
        """The entries of an array for one example."""
        shard, number = self.shards[place[0]], place[1]
        column = columns_of(self.meta)[name]
        starts = shard.every_starts if column.every_token else shard.starts
        start, stop = (int(x) * column.size for x in starts[number : number + 2])
        return shard.files[name][start:stop].reshape(-1, *column.shape)


def open_cache(path: Path) -> TeacherCache:
    """Opens a folder of `jaxdistill cache`, or of a program that writes the same format.

    Raises:
      UserError: it is none, is damaged, or changed after it was written.
    """
    meta = read_meta(path)
    shards = []
    for folder in sorted(path.glob("shard-*")):
        try:
            shards.append(_open_shard(folder, meta))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"teacher cache {str(path)!r} is damaged ({folder.name}: {first_line(error)}); delete it and "
                "run `jaxdistill cache` again, which makes what is missing"
            ) from error
    keys = [shard.keys for shard in shards] or [np.empty((0, KEY_BYTES), "u1")]
    first = np.concatenate(keys)[:, :8].copy().view("<u8")[:, 0]
    sizes = [len(shard.keys) for shard in shards]
    of_shard = np.repeat(np.arange(len(shards)), sizes)
    number = np.concatenate([np.arange(size) for size in sizes] or [np.empty(0, int)])
    order = np.argsort(first, kind="stable")
    return TeacherCache(path, meta, shards, first[order], np.stack([of_shard, number], axis=1)[order])


def read_meta(path: Path) -> Meta:
    """The content of meta.json.

    Raises:
      UserError: there is none, or it does not fit.
    """
    if not (path / META).is_file():
        raise UserError(f"{str(path)!r} is no teacher cache (it has no {META}); `jaxdistill cache` makes one")
    content = read_json(path / META)
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{str(path)!r} is no teacher cache of format {FORMAT_VERSION}; `jaxdistill cache` makes one")
    try:
        return Meta.model_validate(content)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = f"{META}: {place_in(first['loc'])}"
        raise UserError(f"teacher cache {str(path)!r} is damaged ({where}: {first['msg']})") from None


def _open_shard(folder: Path, meta: Meta) -> _Shard:
    record = read_json(folder / SHARD)
    columns = {"keys": Column("u1", (KEY_BYTES,)), "lengths": Column("<i4", ()), "counts": Column("<i4", ())}
    columns |= columns_of(meta)
    files = {name: TokenFile(folder / f"{name}.bin", column.dtype) for name, column in columns.items()}
    keys = files["keys"][:].reshape(-1, KEY_BYTES)
    lengths, counts = files["lengths"][:], files["counts"][:]
    sizes = {"lengths": len(keys), "counts": len(keys)}
    if (counts < 0).any() or (counts > lengths).any() or not len(keys) == len(counts) == len(lengths):
        raise ValueError("keys, lengths and counts do not go together")
    for name, column in columns_of(meta).items():
        sizes[name] = int((lengths if column.every_token else counts).sum(dtype=np.int64)) * column.size
    for name, size in sizes.items():
        if len(files[name]) != size:
            raise ValueError(f"{name}.bin has {len(files[name])} values, and should have {size}")
    for name in columns:
        file = folder / f"{name}.bin"
        as_written = record.get("written", {}).get(file.name) == list(identity_of(file))
        unchecked = as_written and file.stat().st_size > CHECKED_ALWAYS_BYTES
        if not unchecked and digest_of(file) != record["fingerprints"][file.name]:
            raise ValueError(f"{file.name} changed after it was written")
    starts, every = (np.concatenate([[0], x]).cumsum(dtype=np.int64) for x in (counts, lengths))
    return _Shard(keys, files, starts, every)


class Wanted(NamedTuple):
    """What a run takes from a cache."""

    tokens: Literal["all", "labels", "masked"]  # as config.loss.tokens
    temperature: int  # its index among the cache's
    logits: bool  # whether a loss compares distributions
    layers: tuple[int, ...]  # hidden states
    capacity: int = 0  # `masked`: places for the masked tokens of a row
    number: int = 0  # of the cache, where there are several


def with_answers(cache: TeacherCache, batch: HostBatch, wanted: Wanted) -> HostBatch:
    """The batch with the teacher's answers beside it, as arrays [rows, places ...] named by `of_teacher`.

    The places are the tokens of a row, or where `wanted.tokens` is "masked", its masked tokens in their order. Places
    without an answer hold 0.

    Raises:
      UserError: the answers of an example are not in the cache.
    """
    rows, width = batch["input_ids"].shape
    columns = columns_of(cache.meta)
    answers: dict[str, np.ndarray] = {}
    for name, column in columns.items():
        if wanted.logits if not column.every_token else name in {f"hidden_{i}" for i in wanted.layers}:
            entry = _decoded(name, np.empty((0, *column.shape), column.dtype), cache.meta, wanted)
            places = wanted.capacity if wanted.tokens == "masked" and not column.every_token else width
            answers[name] = np.zeros((rows, places, *entry.shape[1:]), entry.dtype)
    for example in examples_of(batch, cache.meta):
        place = cache.find(example.key)
        if place is None:
            raise UserError(
                f"teacher cache {str(cache.path)!r} has no answers for a row of {example.stop - example.start} tokens; "
                "run `jaxdistill cache` again with this config, which adds what is missing"
            )
        chosen, to = slice(None), example.kept
        if wanted.tokens == "masked":
            chosen = np.flatnonzero(batch["label_mask"][example.row, example.kept])
            to = np.arange(len(chosen))
        for name, array in answers.items():
            values = _decoded(name, cache.read(place, name), cache.meta, wanted)
            if columns[name].every_token:
                array[example.row, example.start : example.stop] = values
            else:
                array[example.row, to] = values[chosen]
    of = of_teacher(wanted.number)
    return batch | {f"{of}{_NAMES.get(name, name)}": array for name, array in answers.items()}


_NAMES = {"tails": "tail", "floors": "floor"}  # of one temperature


def _decoded(name: str, stored: Shaped[np.ndarray, "..."], meta: Meta, wanted: Wanted) -> Shaped[np.ndarray, "..."]:
    if name == "words":
        return _unpacked_words(stored, meta)
    if name == "samples":
        return _unpacked_words(stored[:, wanted.temperature], meta)
    if name in _NAMES:
        return stored[:, wanted.temperature]
    return stored.view(ml_dtypes.bfloat16) if name.startswith("hidden_") else stored
