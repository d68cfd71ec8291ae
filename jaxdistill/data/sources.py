"""Where text comes from: files, a Hugging Face dataset or a TFDS dataset, as a restartable stream."""

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
from typing import Any

from jaxdistill.errors import UserError

COMPRESSION = {".gz": "gzip", ".zst": "zstd"}

Columns = tuple[str, ...]  # (text,) or (prompt, completion)
Document = str | tuple[str, str]


@dataclass(frozen=True)
class Source:
    """A stream of documents; `texts()` starts it afresh and raises UserError at the first broken one."""

    describe: str
    """One line for logs."""
    fingerprint: str
    """Hash of the content and of every setting that changes the documents."""
    texts: Callable[[], Iterator[Document]]
    """Non-empty documents without surrounding white space; pairs (prompt, completion) with a prompt column."""


def open_source(
    *,
    source: str,
    path: str,
    column: str,
    subset: str,
    revision: str,
    split: str,
    streaming: bool,
    limit: int,
    prompt_column: str = "",
) -> Source:
    """Opens one of `SOURCES`; nothing is read yet but what the fingerprint needs.

    Args:
      source: a key of `SOURCES`.
      path: files: a file, a glob, or several separated by commas. hf, tfds: a name or a local folder.
      column: name of the text column; ignored for text.
      subset: hf: configuration name; tfds: builder config; "" = the default one.
      revision: hf: branch, tag or commit; tfds: version; "" = the newest.
      split: hf, tfds: split in their slicing notation, such as "train[:10%]"; "" = "train".
      streaming: hf: read over the network without a copy on disk. See `_hf` for what the fingerprint then
        means.
      limit: documents at most; 0 = all.
      prompt_column: name of the column of prompts, `column` then being that of completions; "" = plain text.

    Raises:
      UserError: unknown source, missing, empty, truncated or binary file, missing column, no network.
    """
    if source not in SOURCES:
        raise UserError(f"data.source={source!r} is not a source; choose one of {', '.join(SOURCES)}")
    if not path:
        raise UserError(f"data.path is empty; data.source={source!r} needs a file, glob, folder or name")
    if limit < 0:
        raise UserError(f"data.limit={limit} is negative; give a number of documents, or 0 for all")
    if prompt_column and source == "text":
        raise UserError(f"data.prompt_column={prompt_column!r}: data.source='text' has no columns; choose another")
    opened = SOURCES[source](
        path=path,
        columns=(prompt_column, column) if prompt_column else (column,),
        subset=subset,
        revision=revision,
        split=split or "train",
        streaming=streaming,
    )
    if not limit:
        return opened
    return Source(
        describe=f"{opened.describe}, first {limit:,} documents",
        fingerprint=_digest(opened.fingerprint, limit),
        texts=lambda: itertools.islice(opened.texts(), limit),
    )


def _digest(*settings: object) -> str:
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


# Files


def _files(*, kind: str, path: str, columns: Columns, **_: object) -> Source:
    """One of the `READERS`, file after file in sorted order. Contents are hashed, names and times are not."""
    paths = _expand(path)
    digests = []
    for file in paths:
        with _reading(file), open(file, "rb") as f:
            # The suffix decides on decompression, so it is content too.
            digests.append(
                (
                    file.suffix if file.suffix in COMPRESSION else "",
                    hashlib.file_digest(f, "sha256").hexdigest(),
                )
            )
    size = sum(file.stat().st_size for file in paths)
    names = paths[0].name if len(paths) == 1 else f"{len(paths)} files, {paths[0].name} … {paths[-1].name}"
    return Source(
        describe=f"{kind}: {names} ({size / 1e6:.1f} MB)",
        fingerprint=_digest(kind, "" if kind == "text" else columns[-1], digests, *columns[:-1]),
        texts=lambda: itertools.chain.from_iterable(map(partial(READERS[kind], columns=columns), paths)),
    )


def _expand(path: str) -> list[Path]:
    # A name that exists is meant literally, even with a comma or a bracket in it.
    entries = [path] if Path(path).exists() else [entry.strip() for entry in path.split(",") if entry.strip()]
    found: set[Path] = set()
    for entry in entries:
        literal = Path(entry).expanduser()
        if literal.is_dir():
            raise UserError(f"data.path: {entry!r} is a folder; give its files, such as {entry.rstrip('/')}/*.txt")
        if literal.exists():
            found.add(literal)
            continue
        matches = {Path(match) for match in glob.glob(str(literal), recursive=True)}
        matches = {match for match in matches if match.is_file()}
        if not matches:
            wrong = "no file matches" if glob.has_magic(entry) else "no such file:"
            raise UserError(f"data.path: {wrong} {entry!r} (looked from {Path.cwd()})")
        found |= matches
    for file in found:
        if file.stat().st_size == 0:
            raise UserError(f"data.path: {str(file)!r} is empty (0 bytes); leave it out or write it again")
    # Of two names of one file the first counts, and not where a link leads: that may lack the suffix.
    return sorted({file.resolve(): file for file in sorted(found, reverse=True)}.values())


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # gone, not permitted; pyarrow's truncated or corrupted stream
        raise UserError(f"cannot read {str(path)!r}: {error.strerror or _one_line(error)}") from error


def _lines(path: Path) -> Iterator[str]:
    """Lines with their ends, strictly UTF-8. Offsets in messages count bytes after decompression."""
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
    # pyarrow rather than gzip and zstandard: it reads both, and it reports a truncated zst, where the
    # stream reader of zstandard 0.25 ends in silence.
    import pyarrow as pa

    stream: Any = pa.input_stream(str(path), compression=COMPRESSION[path.suffix])
    return io.BufferedReader(stream, 1 << 20)


def _text(path: Path, *, columns: Columns) -> Iterator[Document]:
    del columns
    return (text for line in _lines(path) if (text := line.strip()))


def _documents(rows: Iterable[tuple[object, ...]], where: Callable[[], str], columns: Columns) -> Iterator[Document]:
    """Strips; skips rows with a null or a blank; refuses what is not text."""
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
            value.encode()  # JSON can carry half a surrogate pair, which no tokenizer takes
        except UnicodeEncodeError as error:
            raise UserError(f"{where()}: column {column!r} is not valid Unicode: {error.reason}") from error
    return value.strip()


def _check_columns(columns: Columns, there: Iterable[str], where: str) -> None:
    for i, column in enumerate(columns):
        if column not in there:
            key = "data.column" if i == len(columns) - 1 else "data.prompt_column"
            raise UserError(f"{where}: no column {column!r}; it has {', '.join(map(repr, there))}; set {key}")


def _csv(path: Path, *, columns: Columns, delimiter: str) -> Iterator[Document]:
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


def _jsonl(path: Path, *, columns: Columns) -> Iterator[Document]:
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


def _parquet(path: Path, *, columns: Columns) -> Iterator[Document]:
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


READERS: dict[str, Callable[..., Iterator[Document]]] = {
    "text": _text,
    "csv": partial(_csv, delimiter=","),
    "tsv": partial(_csv, delimiter="\t"),
    "jsonl": _jsonl,
    "parquet": _parquet,
}


# Datasets by name


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Drops a library's warnings: the hub client logs five retries before it raises what we report."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _hf(*, path: str, columns: Columns, subset: str, revision: str, split: str, streaming: bool) -> Source:
    """A dataset of the Hugging Face hub, or a folder that `datasets.load_dataset` accepts.

    The fingerprint is the dataset's own, over its files and processing. With streaming nothing has been read
    when it is needed, so it is only the name, subset, revision, split and limit: data that changes under the
    same name is not seen. Give a commit as revision where that matters.
    """
    import datasets

    where = f"dataset {path!r}"
    try:
        with _quiet("huggingface_hub"):
            data: Any = datasets.load_dataset(
                path, name=subset or None, revision=revision or None, split=split, streaming=streaming
            )
    except Exception as error:  # whatever a loader raises is about the name that the user gave
        raise UserError(
            f"cannot load {where} (subset {subset!r}, split {split!r}): {_one_line(error)}; "
            "give a local folder where there is no network"
        ) from error
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
    return Source(
        describe=f"hf: {'/'.join(filter(None, (path, subset)))} {split} ({size})",
        fingerprint=_digest("hf", path, subset, revision, split, *columns[::-1])
        if streaming
        else _digest("hf", data._fingerprint, *columns[::-1]),
        texts=lambda: _documents(values(), lambda: where, columns),
    )


def _tfds(*, path: str, columns: Columns, subset: str, revision: str, split: str, **_: object) -> Source:
    """A TensorFlow Datasets name, or a prepared folder of one, read through its data source without
    TensorFlow.

    The dataset must be prepared as array_record (the default without TensorFlow): TFRecord has no random
    access.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError("data.source='tfds' needs an extra: pip install 'jaxdistill[tfds]'") from error

    name = path + (f"/{subset}" if subset else "") + (f":{revision}" if revision else "")
    where = f"TFDS dataset {name!r}"
    try:
        if Path(path).is_dir():
            builder: Any = tfds.builder_from_directory(path)
            data: Any = builder.as_data_source(split=split)
        else:
            data = tfds.data_source(name, split=split)
    except Exception as error:  # whatever a builder raises is about the name that the user gave
        raise UserError(f"cannot load {where}, split {split!r}: {_one_line(error)}") from error
    info = data.dataset_info
    _check_columns(columns, info.features, where)
    digests = []
    for part in info.splits[split].file_instructions:
        with _reading(Path(part.filename)), open(part.filename, "rb") as f:
            digests.append(hashlib.file_digest(f, "sha256").hexdigest())

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
        describe=f"tfds: {info.full_name} {split} ({len(data):,} rows)",
        fingerprint=_digest("tfds", info.full_name, split, columns[-1], digests, *columns[:-1]),
        texts=lambda: _documents(values(), lambda: where, columns),
    )


SOURCES: dict[str, Callable[..., Source]] = {
    **{kind: partial(_files, kind=kind) for kind in READERS},
    "hf": _hf,
    "tfds": _tfds,
}
