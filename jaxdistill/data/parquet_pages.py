"""The sizes of the pages of a Parquet file, which stand in front of each page and not in the file's metadata.

A page is what a reader decompresses at a time, so its size bounds the memory that a row takes. pyarrow does not show
it. The headers are structures of Thrift's compact protocol, of which the first fields are read here and the rest is
skipped.
"""

import io
from collections.abc import Iterator
from typing import NamedTuple

_HEADER = 1 << 16  # bytes that are read at a time; a header with long statistics takes more of them


class Page(NamedTuple):
    """What the header of a page says, in bytes."""

    whole: int  # the page after decompression
    stored: int  # the page in the file
    header: int  # the header itself


def pages(file: io.BufferedIOBase, start: int, size: int) -> Iterator[Page]:
    """The pages of a column in a row group, which takes `size` bytes from `start` on.

    Raises:
      ValueError: the headers do not fill the column.
    """
    at, end = start, start + size
    while at < end:
        page = _read_header(file, at, end)
        yield page
        at += page.header + page.stored
    if at != end:
        raise ValueError("its pages are longer than their column")


def _read_header(file: io.BufferedIOBase, at: int, end: int) -> Page:
    length = _HEADER
    while True:
        file.seek(at)
        data = io.BytesIO(file.read(min(length, end - at)))
        try:
            fields = _struct(data)
            page = Page(whole=fields[2], stored=fields[3], header=data.tell())
        except EOFError:
            if length >= end - at:
                raise ValueError("the header of a page is cut off") from None
            length *= 16
            continue
        except (KeyError, RecursionError):
            raise ValueError("the header of a page does not say its sizes") from None
        if page.whole < 0 or page.stored < 0:
            raise ValueError("the header of a page has a negative size")
        return page


# Thrift's compact protocol: a field is a byte (step to its number, kind) and its value.

_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _STRUCT = 0, 1, 2, 3, 7, 8, 12
_INTEGERS = (4, 5, 6)  # of 16, 32 and 64 bits
_LISTS = (9, 10)  # list and set


def _struct(data: io.BytesIO) -> dict[int, int]:
    """The whole numbers of a structure by the numbers of their fields."""
    found, number = {}, 0
    while (head := _byte(data)) & 15 != _STOP:
        number = number + (head >> 4) if head >> 4 else _integer(data)
        value = _value(data, head & 15)
        if value is not None:
            found[number] = value
    return found


def _value(data: io.BytesIO, kind: int) -> int | None:
    """A whole number; None for any other value, which is skipped.

    Raises:
      ValueError: there is no such kind in the header of a page.
    """
    if kind in _INTEGERS:
        return _integer(data)
    if kind == _STRUCT:
        _struct(data)
    elif kind in _LISTS:
        head = _byte(data)
        for _ in range(head >> 4 if head >> 4 < 15 else _natural(data)):
            _value(data, _BYTE if head & 15 in (_TRUE, _FALSE) else head & 15)
    elif kind not in (_TRUE, _FALSE):
        sizes = {_BYTE: 1, _DOUBLE: 8}
        if kind != _BINARY and kind not in sizes:
            raise ValueError(f"the header of a page has a field of kind {kind}")
        size = sizes.get(kind) or _natural(data)
        if len(data.read(size)) < size:
            raise EOFError
    return None


def _byte(data: io.BytesIO) -> int:
    if not (one := data.read(1)):
        raise EOFError
    return one[0]


def _natural(data: io.BytesIO) -> int:
    value = shift = 0
    while True:
        byte = _byte(data)
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value
        if shift > 63:
            raise ValueError("the header of a page has a number of more than 64 bits")


def _integer(data: io.BytesIO) -> int:
    value = _natural(data)
    return (value >> 1) ^ -(value & 1)  # zigzag
