"""Text files as lines: decompressed, strictly UTF-8, and never more than a limit of bytes in memory at a time."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from jaxdistill.errors import UserError, first_line

COMPRESSION = {".gz": "gzip", ".zst": "zstd"}

BOM = "\ufeff"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raises UserError where the operating system, or the decompression, cannot read a file."""
    try:
        yield
    except OSError as error:  # missing, not permitted; pyarrow's truncated or corrupted stream
        raise UserError(f"cannot read {str(path)!r}: {error.strerror or first_line(error)}") from error


def open_stream(path: Path) -> io.BufferedReader:
    """The bytes of a file, decompressed where its suffix says so."""
    if path.suffix not in COMPRESSION:
        return io.BufferedReader(open(path, "rb", buffering=0), 1 << 20)
    # pyarrow rather than gzip and zstandard: it reads both, and it reports a truncated zst, where the stream reader of
    # zstandard 0.25 ends in silence.
    import pyarrow as pa

    stream: Any = pa.input_stream(str(path), compression=COMPRESSION[path.suffix])
    return io.BufferedReader(stream, 1 << 20)


def lines_of(path: Path, *, limit: int) -> Iterator[str]:
    """Lines with their line ends, without byte-order marks, which also stand inside of files that were joined.

    Offsets in messages count bytes after decompression.

    Raises:
      UserError: a line of more than `limit` bytes, and what is not UTF-8 text.
    """
    offset = 0
    with reading(path):
        for number, line in enumerate(_raw_lines(path, limit), 1):
            if len(line) > limit and len(line.rstrip(b"\r\n")) > limit:
                raise too_large(f"{str(path)!r} line {number}", limit)
            if (nul := line.find(b"\0")) >= 0:
                raise UserError(f"{str(path)!r} is binary, not UTF-8 text: NUL byte at offset {offset + nul}")
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{str(path)!r} is not UTF-8 text: byte 0x{line[error.start]:02x} at offset "
                    f"{offset + error.start}; convert it, for instance with iconv"
                ) from error
            yield text.lstrip(BOM)
            offset += len(line)


def too_large(where: str, limit: int) -> UserError:
    """The error for a document, line or row above data.max_document_bytes."""
    return UserError(
        f"{where} is larger than config.data.max_document_bytes={limit:,}; divide it into documents, "
        "or set a larger limit"
    )


def has_old_line_ends(path: Path, *, limit: int) -> bool:
    """Whether lines end with CR alone, as on old Macs. In a file with LF, a lone CR is a letter."""
    with reading(path), open_stream(path) as stream:
        first = stream.readline(limit)
    return b"\r" in first.rstrip(b"\r\n") and not first.endswith(b"\n")


def _raw_lines(path: Path, limit: int) -> Iterator[bytes]:
    """Lines with their ends; of a longer line the first `limit` + 2 bytes, where the 2 are for a line end."""
    if has_old_line_ends(path, limit=limit + 2):
        # latin-1 stands for bytes: the wrapper splits at CR, and the caller decodes.
        with io.TextIOWrapper(open_stream(path), encoding="latin-1", newline="") as text:
            for line in iter(partial(text.readline, limit + 2), ""):
                yield line.encode("latin-1")
    else:
        with open_stream(path) as stream:
            yield from iter(partial(stream.readline, limit + 2), b"")
