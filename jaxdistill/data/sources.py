"""Where text comes from: files, a Hugging Face data set or a TFDS data set, as a stream that can be started again.

A source is one row of SOURCES: a function from a Location to a Source. A new kind of file is a reader and a row.
"""

import csv
import glob
import hashlib
import io
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jaxdistill.errors import UserError

COMPRESSION = {".gz": "gzip", ".zst": "zstd"}

Columns = tuple[str, ...]  # (text,) or (prompt, completion)
Document = str | tuple[str, str]  # text, or prompt and completion


@dataclass(frozen=True)
class Source:
    """A stream of documents; `documents()` starts the stream afresh and raises UserError at the first broken one."""

    description: str
    """One line for logs."""
    fingerprint: str
    """Hash of the content and of every setting that changes the documents."""
    documents: Callable[[], Iterator[Document]]
    """Non-empty documents without surrounding white space; pairs (prompt, completion) with a prompt column."""


class Location(NamedTuple):
    """Which text to read."""

    source: str  # a key of SOURCES
    path: str  # files: a file, a glob, or several separated by commas; hf, tfds: a name or a local folder
    columns: Columns
    subset: str = ""  # hf: configuration name; tfds: builder config; "" = the default one
    revision: str = ""  # hf: branch, tag or commit; tfds: version; "" = the newest
    split: str = "train"  # hf, tfds: a split in their slicing notation, such as "train[:10%]"
    streaming: bool = False  # hf: read over the network without a copy on disk


def first_documents(source: Source, limit: int) -> Source:
    """The first `limit` documents of a source."""
    return Source(
        description=f"{source.description}, first {limit:,} documents",
        fingerprint=_digest(source.fingerprint, limit),
        documents=lambda: itertools.islice(source.documents(), limit),
    )


def _digest(*settings: object) -> str:
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with _reading(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


# Files

Reader = Callable[[Path, Columns], Iterator[Document]]


def _open_files(location: Location, *, read: Reader) -> Source:
    """File after file in sorted order. The fingerprint is of their contents, not of their names and times."""
    source, path, columns, *_ = location
    paths = _expand(path)
    # The suffix decides on decompression, so it is content too.
    digests = [(file.suffix if file.suffix in COMPRESSION else "", _file_digest(file)) for file in paths]
    size = sum(file.stat().st_size for file in paths)
    names = paths[0].name if len(paths) == 1 else f"{len(paths)} files, {paths[0].name} … {paths[-1].name}"
    return Source(
        description=f"{source}: {names} ({size / 1e6:.1f} MB)",
        fingerprint=_digest(source, columns[-1], digests, *columns[:-1]),
        documents=lambda: itertools.chain.from_iterable(read(file, columns) for file in paths),
    )


def _open_text_files(location: Location) -> Source:
    """Text files have no columns: every line is a document."""
    if len(location.columns) > 1:
        raise UserError(
            f"data.prompt_column={location.columns[0]!r}: data.source='text' has no columns; choose another"
        )
    return _open_files(location._replace(columns=("",)), read=_read_text)


def _expand(path: str) -> list[Path]:
    # The name of an existing file is meant literally, even with a comma or a bracket in it.
    entries = [path] if Path(path).exists() else [entry.strip() for entry in path.split(",") if entry.strip()]
    found = {file for entry in entries for file in _matches(entry)}
    for file in found:
        if file.stat().st_size == 0:
            raise UserError(f"data.path: {str(file)!r} is empty (0 bytes); leave it out or write it again")
    # Of two names of one file the first counts. The target of a link is not used: its name may lack the suffix.
    return sorted({file.resolve(): file for file in sorted(found, reverse=True)}.values())


def _matches(entry: str) -> set[Path]:
    """The files that a name or a glob means."""
    literal = Path(entry).expanduser()
    if literal.is_dir():
        raise UserError(f"data.path: {entry!r} is a folder; give its files, such as {entry.rstrip('/')}/*.txt")
    if literal.exists():
        return {literal}
    files = {Path(match) for match in glob.glob(str(literal), recursive=True) if Path(match).is_file()}
    if not files:
        wrong = "no file matches" if glob.has_magic(entry) else "no such file:"
        raise UserError(f"data.path: {wrong} {entry!r} (looked from {Path.cwd()})")
    return files


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # missing, not permitted; pyarrow's truncated or corrupted stream
        raise UserError(f"cannot read {str(path)!r}: {error.strerror or _one_line(error)}") from error


def _lines(path: Path) -> Iterator[str]:
    """Lines with their line ends, strictly UTF-8. Offsets in messages count bytes after decompression."""
    offset = 0
    with _reading(path), _open(path) as stream:
        for line in stream:
            if (nul := line.find(b"\0")) >= 0:
                raise UserError(f"{str(path)!r} is binary, not UTF-8 text: NUL byte at offset {offset + nul}")
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{str(path)!r} is not UTF-8 text: byte 0x{line[error.start]:02x} at offset "
                    f"{offset + error.start}; convert it, for instance with iconv"
                ) from error
            yield text.removeprefix("\ufeff") if offset == 0 else text
            offset += len(line)


def _open(path: Path) -> Any:
    if path.suffix not in COMPRESSION:
        return open(path, "rb", buffering=1 << 20)
    # pyarrow rather than gzip and zstandard: it reads both, and it reports a truncated zst, where the stream reader of
    # zstandard 0.25 ends in silence.
    import pyarrow as pa

    stream: Any = pa.input_stream(str(path), compression=COMPRESSION[path.suffix])
    return io.BufferedReader(stream, 1 << 20)


def _read_text(path: Path, columns: Columns) -> Iterator[Document]:
    del columns  # a text file has none
    return (text for line in _lines(path) if (text := line.strip()))


def _documents(rows: Iterable[tuple[object, ...]], where: Callable[[], str], columns: Columns) -> Iterator[Document]:
    """Strips the values of rows, and skips rows with a null or a blank.

    Raises:
      UserError: a value is not text; `where()` names its place.
    """
    for row in rows:
        texts = [_stripped(value, where, column) for value, column in zip(row, columns, strict=True)]
        if all(texts):
            yield texts[0] if len(texts) == 1 else (texts[0], texts[1])


def _stripped(value: object, where: Callable[[], str], column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where()}: column {column!r} holds {type(value).__name__}, not text")
    if not value.isascii():
        try:
            value.encode()  # JSON can carry half a surrogate pair, which no tokenizer accepts
        except UnicodeEncodeError as error:
            raise UserError(f"{where()}: column {column!r} is not valid Unicode: {error.reason}") from error
    return value.strip()


def _check_columns(columns: Columns, available: Iterable[str], where: str) -> None:
    for i, column in enumerate(columns):
        if column not in available:
            key = "data.column" if i == len(columns) - 1 else "data.prompt_column"
            raise UserError(f"{where}: no column {column!r}; it has {', '.join(map(repr, available))}; set {key}")


def _read_csv(path: Path, columns: Columns, *, delimiter: str) -> Iterator[Document]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB refuses long articles; a C long holds no more on Windows
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)

    def where() -> str:
        return f"{str(path)!r} line {reader.line_num}"

    def rows() -> Iterator[list[str]]:
        try:
            yield from filter(None, reader)
        except csv.Error as error:
            raise UserError(f"{where()}: {error}; quote fields that hold quotes or line ends") from error

    records = rows()
    header = next(records, None)
    if header is None:
        raise UserError(f"{str(path)!r} holds no header line; the first line must name the columns")
    _check_columns(columns, header, repr(str(path)))
    indexes = [header.index(column) for column in columns]

    def values() -> Iterator[tuple[object, ...]]:
        for row in records:
            if len(row) != len(header):
                raise UserError(f"{where()}: {len(row)} fields where the header has {len(header)}")
            yield tuple(row[index] for index in indexes)

    return _documents(values(), where, columns)


def _read_jsonl(path: Path, columns: Columns) -> Iterator[Document]:
    number = 0

    def where() -> str:
        return f"{str(path)!r} line {number}"

    def values() -> Iterator[tuple[object, ...]]:
        nonlocal number
        for line in _lines(path):
            number += 1
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where()} is not JSON: {_one_line(error)}") from error
            if not isinstance(record, dict):
                raise UserError(f"{where()} is a JSON {type(record).__name__}; each line must be one object")
            _check_columns(columns, record, where())
            yield tuple(record[column] for column in columns)

    return _documents(values(), where, columns)


def _read_parquet(path: Path, columns: Columns) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def values() -> Iterator[tuple[object, ...]]:
        try:
            with _reading(path), pq.ParquetFile(path) as file:
                _check_columns(columns, file.schema_arrow.names, repr(str(path)))
                for batch in file.iter_batches(batch_size=1024, columns=list(columns)):
                    table = batch.to_pydict()
                    yield from zip(*(table[column] for column in columns), strict=True)
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise UserError(f"{str(path)!r} is not a whole Parquet file: {_one_line(error)}") from error

    return _documents(values(), lambda: repr(str(path)), columns)


# Data sets by name


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Drops the warnings of a library: the hub client logs five retries before it raises the error that we report."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _open_hf(location: Location) -> Source:
    """A data set of the Hugging Face hub, or a folder that `datasets.load_dataset` accepts.

    The fingerprint is the data set's own, over its files and processing. With streaming nothing has been read when the
    fingerprint is needed, so it covers only the name, subset, revision, split and limit: data that changes under the
    same name is not noticed. Give a commit as revision where that matters.
    """
    _, path, columns, subset, revision, split, streaming = location
    where = f"dataset {path!r}"
    data = _load_hf(location, where)
    names = data.column_names
    if names is None:  # a stream that does not know its columns before it is read
        names = list(next(iter(data), {}))
    _check_columns(columns, names, where)
    data = data.select_columns(list(columns))

    def values() -> Iterator[tuple[object, ...]]:
        try:
            for batch in data.iter(batch_size=1000):
                yield from zip(*(batch[column] for column in columns), strict=True)
        except OSError as error:
            raise UserError(f"reading {where} failed: {_one_line(error)}") from error

    size = "streamed" if streaming else f"{len(data):,} rows"
    content = (path, subset, revision, split) if streaming else (data._fingerprint,)
    return Source(
        description=f"hf: {'/'.join(filter(None, (path, subset)))} {split} ({size})",
        fingerprint=_digest("hf", *content, *columns[::-1]),
        documents=lambda: _documents(values(), lambda: where, columns),
    )


def _load_hf(location: Location, where: str) -> Any:
    import datasets

    _, path, _, subset, revision, split, streaming = location
    try:
        with _quiet("huggingface_hub"):
            return datasets.load_dataset(
                path,
                name=subset or None,
                revision=revision or None,
                split=split,
                streaming=streaming,
                trust_remote_code=False,
            )
    except Exception as error:  # whatever a loader raises is about the name that the user gave
        raise UserError(
            f"cannot load {where} (subset {subset!r}, split {split!r}): {_one_line(error)}; "
            "give a local folder where there is no network"
        ) from error


def _open_tfds(location: Location) -> Source:
    """A TensorFlow Datasets name, or a prepared folder of one, read through its data source without TensorFlow.

    The data set must be prepared as array_record (the default without TensorFlow): TFRecord has no random access.
    """
    _, path, columns, subset, revision, split, _ = location
    name = path + (f"/{subset}" if subset else "") + (f":{revision}" if revision else "")
    where = f"TFDS dataset {name!r}"
    data = _load_tfds(path, name, split, where)
    info = data.dataset_info
    _check_columns(columns, info.features, where)
    digests = [_file_digest(Path(part.filename)) for part in info.splits[split].file_instructions]

    def decoded(value: object, index: int, column: str) -> object:
        try:
            return value.decode() if isinstance(value, bytes) else value
        except UnicodeDecodeError as error:
            raise UserError(f"{where}, example {index}: column {column!r} is not UTF-8 text") from error

    def values() -> Iterator[tuple[object, ...]]:
        for index in range(len(data)):
            example = data[index]
            yield tuple(decoded(example[column], index, column) for column in columns)

    return Source(
        description=f"tfds: {info.full_name} {split} ({len(data):,} rows)",
        fingerprint=_digest("tfds", info.full_name, split, columns[-1], digests, *columns[:-1]),
        documents=lambda: _documents(values(), lambda: where, columns),
    )


def _load_tfds(path: str, name: str, split: str, where: str) -> Any:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError("data.source='tfds' needs an extra: pip install 'jaxdistill[tfds]'") from error

    try:
        if Path(path).is_dir():
            builder: Any = tfds.builder_from_directory(path)
            return builder.as_data_source(split=split)
        return tfds.data_source(name, split=split)
    except Exception as error:  # whatever a builder raises is about the name that the user gave
        raise UserError(f"cannot load {where}, split {split!r}: {_one_line(error)}") from error


SOURCES: dict[str, Callable[[Location], Source]] = {
    "text": _open_text_files,
    "csv": partial(_open_files, read=partial(_read_csv, delimiter=",")),
    "tsv": partial(_open_files, read=partial(_read_csv, delimiter="\t")),
    "jsonl": partial(_open_files, read=_read_jsonl),
    "parquet": partial(_open_files, read=_read_parquet),
    "hf": _open_hf,
    "tfds": _open_tfds,
}
