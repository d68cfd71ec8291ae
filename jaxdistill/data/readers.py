"""Readers of files: one function for each kind of file, from a path to its documents.

No reader holds more of a file than a few documents, and none accepts a document above a limit: the limit stops a file
that is not what its name says before it fills the memory.
"""

import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxdistill.data.lines import BOM, lines_of, open_stream, reading, too_large
from jaxdistill.data.parquet_pages import Page, pages
from jaxdistill.errors import UserError, first_line

Columns = tuple[str, ...]  # (text,) or (prompt, completion)
Document = str | tuple[str, str]  # text, or prompt and completion
Row = tuple[object, ...]  # the values of the columns


class Limits(NamedTuple):
    """What no document may exceed; the settings data.max_document_bytes and data.max_field_lines."""

    document: int  # bytes of a document, and of the line or row that it stands in
    field_lines: int  # csv: lines of a row


Reader = Callable[[Path, Columns, Limits], Iterator[Document]]

# A key that no record has among so many is a wrong name, said before the rest of a large file is read.
RECORDS_WITHOUT_KEY = 10_000

_LISTED_NAMES = 30  # a message shows so many columns

_BLOCK = 1 << 16  # bytes, or characters of a JSON array, that are read at a time
_PAGE_LIMITS = 16  # documents of the largest size that a page of Parquet, which is decompressed as one, may have
_BATCH_BYTES = 1 << 29  # that a batch of Parquet rows takes at most, where its rows share a cell as large as a column


def read_text(path: Path, columns: Columns, limits: Limits) -> Iterator[Document]:
    """Every line is a document."""
    del columns  # a text file has none
    return (text for line in lines_of(path, limit=limits.document) if (text := line.strip()))


def documents_of(rows: Iterable[Row], where: Callable[[], str], columns: Columns, *, limit: int) -> Iterator[Document]:
    """Strips the values of rows, and skips rows with a null or a blank.

    Raises:
      UserError: a value is not text, or larger than `limit`; `where()` names its place.
    """
    for row in rows:
        texts = [_stripped(value, where, column, limit) for value, column in zip(row, columns, strict=True)]
        if all(texts):
            yield texts[0] if len(texts) == 1 else (texts[0], texts[1])


def _stripped(value: object, where: Callable[[], str], column: str, limit: int) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where()}: column {column!r} holds {type(value).__name__}, not text")
    size = len(value)
    if not value.isascii():
        try:
            size = len(value.encode())  # JSON can carry half a surrogate pair, which no tokenizer accepts
        except UnicodeEncodeError as error:
            raise UserError(f"{where()}: column {column!r} is not valid Unicode: {error.reason}") from error
    if size > limit:
        raise too_large(f"{where()}: a document in column {column!r}", limit)
    return value.strip()


def check_columns(columns: Columns, available: Iterable[str], where: str) -> None:
    """Raises UserError, with the name of the setting, where a column does not exist, or two have its name."""
    names = list(available)
    for i, column in enumerate(columns):
        key = "data.column" if i == len(columns) - 1 else "data.prompt_column"
        if names.count(column) > 1:
            raise UserError(f"{where}: {names.count(column)} columns are named {column!r}; rename all but one ({key})")
        if column not in names:
            listed = ", ".join([*map(repr, names[:_LISTED_NAMES]), *["…"] * (len(names) > _LISTED_NAMES)])
            raise UserError(f"{where}: no column {column!r}; it has {listed}; set {key}")


# Tables in text


def read_csv(path: Path, columns: Columns, limits: Limits) -> Iterator[Document]:
    """Fields as RFC 4180 quotes them, so a field may span lines."""
    return _read_table(path, columns, limits, _csv_rows)


def read_tsv(path: Path, columns: Columns, limits: Limits) -> Iterator[Document]:
    """A quotation mark is a letter and a row is a line, as in the format's registration (text/tab-separated-values)."""
    return _read_table(path, columns, limits, _tsv_rows)


# (path, limits) -> (number of the row's first line, its fields), without blank lines
_Table = Callable[[Path, Limits], Iterator[tuple[int, list[str]]]]


def _tsv_rows(path: Path, limits: Limits) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(lines_of(path, limit=limits.document), 1):
        if row := line.rstrip("\r\n"):
            yield number, row.split("\t")


# Prose has a space after a comma, or a line end.
_DELIMITER = re.compile(r",(?=\S)")


def _csv_rows(path: Path, limits: Limits) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(2**31 - 1)  # limits.document is checked instead; a C long holds no more on Windows
    number = first = size = 0
    delimiters = 0  # of the header
    like_rows = 0  # the last lines, of this row alone, that have the delimiters of a row each

    def where() -> str:
        return f"{str(path)!r} line {first}"

    def lines() -> Iterator[str]:
        nonlocal number, size, like_rows
        for line in lines_of(path, limit=limits.document):
            number += 1
            size += len(line)
            like_rows = like_rows + 1 if len(_DELIMITER.findall(line)) == delimiters > 0 else 0
            if number - first >= limits.field_lines or like_rows > limits.field_lines / 10:
                raise UserError(
                    f"{where()}: a quotation mark opens a field that swallows the {number - first} lines after it; "
                    "double a mark that is a letter, or, if the field is right, set a larger "
                    f"config.data.max_field_lines={limits.field_lines}"
                )
            if size > limits.document:
                raise too_large(where(), limits.document)
            yield line

    reader = csv.reader(lines(), strict=True)
    while True:
        first, size, like_rows = number + 1, 0, 0
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{where()}: {error}; quote fields that hold quotes or line ends") from error
        if row is None:
            return
        if row:
            delimiters = delimiters or len(row) - 1
            yield first, row


def _read_table(path: Path, columns: Columns, limits: Limits, rows_of: _Table) -> Iterator[Document]:
    rows = rows_of(path, limits)
    _, header = next(rows, (0, None))
    if header is None:
        raise UserError(f"{str(path)!r} holds no header line; the first line must name the columns")
    check_columns(columns, header, repr(str(path)))
    indexes = [header.index(column) for column in columns]
    line = 0

    def where() -> str:
        return f"{str(path)!r} line {line}"

    def values() -> Iterator[Row]:
        nonlocal line
        for line, row in rows:  # noqa: B007 - `where` reads it
            if len(row) != len(header):
                raise UserError(f"{where()}: {len(row)} fields where the header has {len(header)}")
            yield tuple(row[index] for index in indexes)

    return documents_of(values(), where, columns, limit=limits.document)


# JSON


def read_json(path: Path, columns: Columns, limits: Limits) -> Iterator[Document]:
    """An object a line, or arrays of objects. An object without the key counts as one with null."""
    line = 0

    def where() -> str:
        return f"{str(path)!r} line {line}"

    def values() -> Iterator[Row]:
        nonlocal line
        missing, names, count = set(columns), dict[str, None](), 0
        for line, record in _array(path, limits.document) if _is_array(path) else _objects(path, limits.document):  # noqa: B007 - as above
            if not isinstance(record, dict):
                raise UserError(f"{where()} is a JSON {type(record).__name__}; each line, or item, must be an object")
            count += 1
            if missing:
                missing -= record.keys()
                names.update(dict.fromkeys(record))
                if count >= RECORDS_WITHOUT_KEY:
                    check_columns(columns, names, f"{str(path)!r}, in its first {count:,} records")
            yield tuple(record.get(column) for column in columns)
        if count:
            check_columns(columns if missing else (), names, repr(str(path)))

    return documents_of(values(), where, columns, limit=limits.document)


def _not_json(path: Path, line: int, error: Exception) -> UserError:
    return UserError(f"{str(path)!r} line {line} is not JSON: {first_line(error)}")


def _objects(path: Path, limit: int) -> Iterator[tuple[int, Any]]:
    """(line, value) of each line."""
    for number, line in enumerate(lines_of(path, limit=limit), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _not_json(path, number, error) from error
        yield from ((number, one) for one in (value if isinstance(value, list) else [value]))


_LETTER = re.compile(rf"[^ \t\r\n{BOM}]")  # a byte-order mark also stands where files were joined


def _is_array(path: Path) -> bool:
    with reading(path), open_stream(path) as stream:
        return stream.read(_BLOCK).removeprefix(BOM.encode()).lstrip().startswith(b"[")


def _array(path: Path, limit: int) -> Iterator[tuple[int, Any]]:
    """(line, item) of each item of arrays that were joined, of which only the item at hand is in memory."""
    decoder = json.JSONDecoder()
    line = 1
    text, at = "", 0  # of what has been read, the items before `at` are done
    with reading(path), io.TextIOWrapper(open_stream(path), encoding="utf-8-sig", newline="\n") as stream:

        def more(count: int) -> str:
            try:
                return stream.read(max(_BLOCK, count))
            except UnicodeDecodeError as error:
                raise UserError(f"{str(path)!r} is not UTF-8 text: {first_line(error)}; convert it") from error

        def next_letter() -> str:
            """Goes on to the next letter that is no white space; "" at the end of the file."""
            nonlocal text, at, line
            while True:
                found = _LETTER.search(text, at)
                end = found.start() if found else len(text)
                line += text.count("\n", at, end)
                at = end
                if found:
                    return text[at]
                text, at = more(_BLOCK), 0
                if not text:
                    return ""

        def item() -> Any:
            nonlocal text, at, line
            while True:
                try:
                    value, end = decoder.raw_decode(text, at)
                except (ValueError, RecursionError) as error:
                    if len(text) - at > limit:
                        raise too_large(f"{str(path)!r} line {line}: an item of the array", limit) from error
                    # As much again, so that a large item is not parsed anew for every block of it.
                    read = "" if isinstance(error, RecursionError) else more(len(text) - at)
                    if not read:
                        raise _not_json(path, line, error) from error
                    text, at = text[at:] + read, 0
                else:
                    line += text.count("\n", at, end)
                    at = end
                    return value

        while letter := next_letter():
            if letter == "{":  # JSON lines that were joined to an array
                began = line
                yield began, item()
                continue
            if letter != "[":
                raise _not_json(path, line, ValueError("text after the end of the array"))
            at += 1
            letter = next_letter()
            while letter != "]":
                began = line
                yield began, item()
                letter = next_letter()
                if letter == ",":
                    at += 1
                    letter = next_letter()
                    if letter == "]":
                        raise _not_json(path, line, ValueError("a comma before the end of the array"))
                elif letter != "]":
                    raise _not_json(path, line, ValueError("',' or ']' must follow an item of the array"))
            at += 1


# Parquet


def read_parquet(path: Path, columns: Columns, limits: Limits) -> Iterator[Document]:
    """Row group after row group, of which a batch of rows is in memory beside the pages that they stand in."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    where = repr(str(path))

    def values() -> Iterator[Row]:
        try:
            with reading(path), pq.ParquetFile(path, buffer_size=_BLOCK) as file:
                check_columns(columns, file.schema_arrow.names, where)
                for group in range(file.num_row_groups):
                    column, cell, page = _sizes(path, file.metadata.row_group(group), columns)
                    if cell > limits.document:  # so one cell or more is larger, and none has been read yet
                        raise too_large(f"{where}: a document of row group {group}", limits.document)
                    if page > _PAGE_LIMITS * limits.document:
                        what = f"{where}: a page of {page:,} bytes in row group {group}, which is read as one,"
                        raise too_large(what, limits.document)
                    size = min(max(_BATCH_BYTES // max(column, 1), 1), 1024)
                    for batch in file.iter_batches(batch_size=size, row_groups=[group], columns=list(columns)):
                        yield from rows_of_table(pa.Table.from_batches([batch]), columns, where, limit=limits.document)
        except (pa.ArrowException, UnicodeDecodeError, ValueError) as error:  # ValueError: of the headers of pages
            raise UserError(f"{where} is not a whole Parquet file: {first_line(error)}") from error

    return documents_of(values(), lambda: where, columns, limit=limits.document)


def _sizes(path: Path, group: Any, columns: Columns) -> tuple[int, float, int]:
    """Bytes of the largest column of a row group that is read, the largest mean of a cell, and the largest page.

    A large cell among small ones is seen by its page alone.
    """
    chunks = [group.column(i) for i in range(group.num_columns)]
    # A column of lists or structs has its name before a dot; a plain one may have a dot in its name.
    read = [chunk for chunk in chunks if {chunk.path_in_schema, chunk.path_in_schema.split(".")[0]} & set(columns)]
    sizes = [chunk.total_uncompressed_size for chunk in read]
    means = [size / max(chunk.num_values, 1) for size, chunk in zip(sizes, read, strict=True)]
    with open(path, "rb") as file:
        page = max((page.whole for chunk in read for page in _pages_of(file, chunk)), default=0)
    return max(sizes, default=0), max(means, default=0.0), page


def _pages_of(file: io.BufferedIOBase, chunk: Any) -> Iterator[Page]:
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        start = min(start, chunk.dictionary_page_offset)
    return pages(file, start, chunk.total_compressed_size)


def rows_of_table(table: Any, columns: Columns, where: str, *, limit: int) -> Iterator[Row]:
    """The rows of an Arrow table, of which texts become Python objects only if they keep to the limit.

    Raises:
      UserError: a larger text.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    def longest(texts: Any) -> int | None:
        return pc.call_function("max", [pc.call_function("binary_length", [texts])]).as_py()

    for chunk in itertools.chain.from_iterable(table[column].chunks for column in columns):
        is_text = pa.types.is_string(chunk.type) or pa.types.is_large_string(chunk.type)
        if is_text and (longest(chunk) or 0) > limit:
            raise too_large(f"{where}: a document", limit)
    yield from zip(*((cell.as_py() for cell in table[column]) for column in columns), strict=True)
