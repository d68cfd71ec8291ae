"""Prepared text, read a row at a time: the folders that `prepare.py` writes."""

import dataclasses
import functools
import hashlib
import json
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pydantic
from jaxtyping import Int64, Integer, Shaped

from jaxdistill.errors import UserError, first_line, place_in
from jaxdistill.files import check_fetched, named_path, read_json

FORMAT_VERSION = 1

TOKENS = "tokens.bin"
ARRAYS = ("offsets.npy", "counts.npy", "documents.npy", "prompts.npy")  # the last two for causal models

# A smaller file of tokens is read whole and checked by every process that opens it, which takes a fifth of a second.
CHECKED_ALWAYS_BYTES = 1 << 28

_BLOCK = 1 << 24  # bytes of a file of tokens that are checked at a time


class TokenFile:
    """The ids in a file, or other numbers, of which slices are read as they are asked for.

    Read and not mapped into memory: a mapped page beyond the end of a file that was cut short kills the process
    (SIGBUS), and to read a row from the file takes a microsecond.
    """

    def __init__(self, path: Path, dtype: str):
        self.path, self.dtype = path, np.dtype(dtype)
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self._bytes = os.fstat(self._descriptor).st_size
        if self._bytes % self.dtype.itemsize:
            raise ValueError(f"{path.name} has {self._bytes} bytes, not a multiple of {self.dtype.itemsize}")

    def __len__(self) -> int:
        return self._bytes // self.dtype.itemsize

    def __getitem__(self, part: slice) -> Shaped[np.ndarray, "part"]:
        """The numbers of a slice without a step.

        Raises:
          UserError: the file was cut short after it was opened.
        """
        start, stop, _ = part.indices(len(self))
        at, end = start * self.dtype.itemsize, max(start, stop) * self.dtype.itemsize
        pieces = []
        while at < end:
            piece = os.pread(self._descriptor, end - at, at)
            if not piece:
                raise UserError(
                    f"{str(self.path)!r} was cut from {self._bytes:,} to {os.fstat(self._descriptor).st_size:,} bytes "
                    "while it was read; delete its folder, and start again"
                )
            pieces.append(piece)
            at += len(piece)
        return np.frombuffer(b"".join(pieces), self.dtype)


@dataclass(frozen=True, eq=False)
class TokenStore:
    """Prepared rows, in memory only while they are used. `store[i]` is row i."""

    path: Path
    meta: dict[str, Any]
    """Content of meta.json."""
    tokens: TokenFile | Integer[np.ndarray, "tokens"]
    """The whole folder's, also in a slice."""
    offsets: Int64[np.ndarray, "rows_and_1"]
    lengths: Int64[np.ndarray, "rows"]
    token_counts: Int64[np.ndarray, "vocab"]
    """The whole folder's, also in a slice."""
    documents: Int64[np.ndarray, "documents_and_1"] | None = None
    """Where each document of the whole folder starts in `tokens`, and the end; None: prepared for masked models."""
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
    """Opens a folder of prepared text.

    Raises:
      UserError: another kind of folder, another format version, or a damaged, truncated or edited folder.
    """
    path = named_path(str(path))
    meta = _read_meta(path)
    try:
        store = _opened(path, meta)
        sizes = (len(store.tokens), len(store), int(store.offsets[-1]), len(store.token_counts))
        expected = (meta["tokens"], meta["rows"], meta["tokens"], meta["vocabulary"]["size"])
    except (OSError, ValueError, EOFError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"prepared data {str(path)!r} is damaged ({error}); delete the folder") from error
    if sizes != expected:
        raise UserError(
            f"prepared data {str(path)!r} is truncated: tokens, rows, end of the last row and vocabulary "
            f"are {sizes}, meta.json says {expected}; delete the folder"
        )
    _check_content(path, meta)
    return store


# What is recorded of a folder's content. Preparing writes two records into meta.json: "fingerprints", the SHA-256 of
# each file, and "written", which file of tokens it was that preparing closed (size, times and inode). Folders of 0.1.0
# have neither, and are opened with the check of their ids alone.
#
# The file of tokens may have many GB. A fingerprint of samples would let most edits pass, so it is of the whole file;
# but the whole file is only read where somebody may have changed it: whoever writes to a file, even one who restores
# the time of its content, changes the time of its inode, and a copy has another inode. A large folder that stands where
# it was prepared thus opens at once, and a copied one is read once by every process, at the speed of the disk.


class _Identity(NamedTuple):
    """What changes when a file is written to or replaced."""

    size: int
    modified: int  # nanoseconds
    changed: int  # nanoseconds; of the inode, which no program can set
    inode: int


def identity_of(file: Path) -> _Identity:
    stat = os.stat(file)
    return _Identity(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


def records_of(folder: Path) -> dict[str, Any]:
    """The part of meta.json by which `open_store` notices that a file of the folder has changed since."""
    names = [name for name in (TOKENS, *ARRAYS) if (folder / name).exists()]
    return {
        "fingerprints": {name: digest_of(folder / name) for name in names},
        "written": list(identity_of(folder / TOKENS)),
    }


def digest_of(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_content(path: Path, meta: dict[str, Any]) -> None:
    try:
        fingerprints = dict(meta.get("fingerprints", {}))
        strange = [name for name in ARRAYS if name in fingerprints and digest_of(path / name) != fingerprints[name]]
        identity = identity_of(path / TOKENS)
        is_as_written = fingerprints and list(identity) == meta.get("written")
        if not (is_as_written and identity.size > CHECKED_ALWAYS_BYTES):
            digest, largest = _scanned(path / TOKENS, meta["dtype"], TOKENS in fingerprints, identity)
            if digest and digest != fingerprints[TOKENS]:
                strange.append(TOKENS)
            elif largest >= meta["vocabulary"]["size"]:
                raise UserError(
                    f"prepared data {str(path)!r} is damaged: {TOKENS} holds the id {largest}, and its vocabulary has "
                    f"{meta['vocabulary']['size']} ids; delete the folder"
                )
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"prepared data {str(path)!r} is damaged ({error}); delete the folder") from error
    if strange:
        raise UserError(
            f"prepared data {str(path)!r} is damaged: {', '.join(strange)} changed after it was written (its "
            "fingerprint in meta.json is another); delete the folder"
        )


@functools.lru_cache
def _scanned(file: Path, dtype: str, hashed: bool, identity: _Identity) -> tuple[str, int]:
    """(SHA-256 or "", largest id) of a file of tokens, read once by a process for each identity of the file."""
    del identity  # a file that was written to since is read again
    digest, largest = hashlib.sha256(), 0
    with open(file, "rb") as stream:
        for block in iter(functools.partial(stream.read, _BLOCK), b""):
            # Unsigned, so that a negative id is a very large one.
            ids = np.frombuffer(block, np.dtype(dtype).str.replace("i", "u"))
            largest = max(largest, int(ids.max()))
            if hashed:
                digest.update(block)
    return digest.hexdigest() if hashed else "", largest


class _Size(pydantic.BaseModel, strict=True, extra="allow"):
    size: pydantic.PositiveInt


class _Meta(pydantic.BaseModel, strict=True, extra="allow"):
    """What is read of meta.json."""

    format_version: Literal[1]
    dtype: Literal["uint16", "int32"]
    tokens: pydantic.NonNegativeInt
    rows: pydantic.NonNegativeInt
    max_length: int
    pack: bool
    vocabulary: _Size
    causal: bool = False
    fingerprints: dict[str, str] = {}
    written: list[int] = []


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = read_json(path / "meta.json")
        version = meta["format_version"]
    except (UserError, KeyError, TypeError) as error:
        raise UserError(f"{str(path)!r} is not a folder of prepared data (no readable meta.json)") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{str(path)!r} has prepared data of format {version}, not {FORMAT_VERSION}; prepare it again")
    try:
        _Meta.model_validate(meta)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"prepared data {str(path)!r} is damaged (meta.json: {place_in(first['loc'])} "
            f"{first['input']!r}: {first['msg']}); delete the folder"
        ) from None
    return meta


def _load(file: Path) -> Any:
    try:
        return np.load(file)
    except Exception as error:  # the header is read as Python, whose parser raises errors of many types
        raise ValueError(f"{file.name}: {first_line(error)}") from error


def _array(file: Path) -> Int64[np.ndarray, "_"]:
    array = _load(file)
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype != np.int64 or not len(array):
        raise ValueError(f"{file.name} is no list of whole numbers of 64 bits")
    return array


def _opened(path: Path, meta: dict[str, Any]) -> TokenStore:
    for name in (TOKENS, *ARRAYS):
        if (path / name).exists():
            check_fetched(path / name)
    tokens = TokenFile(path / TOKENS, meta["dtype"])
    offsets = _array(path / "offsets.npy")
    counts = _array(path / "counts.npy")
    documents = prompts = None
    if meta.get("causal", False):
        documents, prompts = _array(path / "documents.npy"), _array(path / "prompts.npy")
        if (len(documents) - 1, int(documents[-1])) != (len(prompts), meta["tokens"]):
            raise ValueError("documents and prompts do not go together")
        _check_starts(documents, "documents.npy")
    _check_starts(offsets, "offsets.npy")
    return TokenStore(path, meta, tokens, offsets, np.diff(offsets), counts, documents, prompts)


def _check_starts(starts: Int64[np.ndarray, "starts_and_end"], name: str) -> None:
    if starts[0] != 0 or (np.diff(starts) < 0).any():
        raise ValueError(f"{name} does not ascend from 0")


def content_of(store: TokenStore) -> str:
    """Equal for folders with the same rows for the same vocabulary, whatever they are called and were prepared from."""
    meta = store.meta
    if "fingerprints" not in meta:  # of 0.1.0; prepared text is named by its content
        return store.path.name
    kept = {name: meta.get(name) for name in ("fingerprints", "vocabulary", "causal", "pack", "max_length")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def split_store(store: TokenStore, *, fraction: float) -> tuple[TokenStore, TokenStore]:
    """(training rows, held-out rows): the last rows are held out.

    So at most one document, which was cut into rows there, stands on both sides.

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
    """Counts of tokens by id, from a .npy array or a .json list.

    Raises:
      UserError: the file cannot be read, or is not a flat list of counts.
    """
    path = named_path(str(path))
    try:
        counts = np.asarray(read_json(path) if path.suffix == ".json" else _load(path))
    except (UserError, ValueError) as error:
        raise UserError(f"cannot read token counts {str(path)!r} as a .npy array or a .json list: {error}") from error
    if counts.ndim != 1 or not np.issubdtype(counts.dtype, np.integer) or (counts < 0).any():
        raise UserError(f"token counts {str(path)!r} must be one flat list of whole numbers of 0 or more")
    return counts.astype(np.int64)
