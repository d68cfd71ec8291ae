"""Prepared text, opened as a memory map: the folders that `prepare.py` writes."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, Integer

from jaxdistill.errors import UserError

FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class TokenStore:
    """Prepared rows, memory-mapped: only the rows that are read are in memory. `store[i]` is row i."""

    path: Path
    meta: dict[str, Any]
    """Content of meta.json."""
    tokens: Integer[np.ndarray, "tokens"]
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
      UserError: another kind of folder, another format version, or a damaged or truncated folder.
    """
    path = Path(path)
    meta = _read_meta(path)
    try:
        store = _mapped(path, meta)
        sizes = (len(store.tokens), len(store), int(store.offsets[-1]), len(store.token_counts))
        expected = (meta["tokens"], meta["rows"], meta["tokens"], meta["vocabulary"]["size"])
    except (OSError, ValueError, EOFError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"prepared data {str(path)!r} is damaged ({error}); delete the folder") from error
    if sizes != expected:
        raise UserError(
            f"prepared data {str(path)!r} is truncated: tokens, rows, end of the last row and vocabulary "
            f"are {sizes}, meta.json says {expected}; delete the folder"
        )
    return store


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads((path / "meta.json").read_text())
        version = meta["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(path)!r} is not a folder of prepared data (no readable meta.json)") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{str(path)!r} has prepared data of format {version}, not {FORMAT_VERSION}; prepare it again")
    return meta


def _mapped(path: Path, meta: dict[str, Any]) -> TokenStore:
    # As a plain array, for slicing a np.memmap is several times slower.
    tokens = np.asarray(np.memmap(path / "tokens.bin", meta["dtype"], mode="r"))
    offsets = np.load(path / "offsets.npy")
    counts = np.load(path / "counts.npy")
    documents = prompts = None
    if meta.get("causal", False):
        documents, prompts = np.load(path / "documents.npy"), np.load(path / "prompts.npy")
        if (len(documents) - 1, int(documents[-1])) != (len(prompts), meta["tokens"]):
            raise ValueError("documents and prompts do not go together")
    return TokenStore(path, meta, tokens, offsets, np.diff(offsets), counts, documents, prompts)


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
    path = Path(path)
    try:
        counts = np.asarray(json.loads(path.read_text())) if path.suffix == ".json" else np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read token counts {str(path)!r} as a .npy array or a .json list: {error}") from error
    if counts.ndim != 1 or not np.issubdtype(counts.dtype, np.integer) or (counts < 0).any():
        raise UserError(f"token counts {str(path)!r} must be one flat list of whole numbers of 0 or more")
    return counts.astype(np.int64)
