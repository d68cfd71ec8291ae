"""Where text comes from: files, a Hugging Face data set or a TFDS data set, as a stream that can be started again.

A source is one row of SOURCES: a function from a Location to a Source. A new kind of file is a function in readers.py
and a row.
"""

import glob
import hashlib
import itertools
import json
import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jaxdistill.console import is_live, taking
from jaxdistill.data.lines import (
    COMPRESSION,
    has_old_line_ends,
    open_stream,
    reading,
)
from jaxdistill.data.readers import (
    Columns,
    Document,
    Limits,
    Reader,
    Row,
    check_columns,
    documents_of,
    read_csv,
    read_json,
    read_parquet,
    read_text,
    read_tsv,
    rows_of_table,
)
from jaxdistill.errors import UserError, first_line
from jaxdistill.files import check_fetched, named_path
from jaxdistill.network import is_hub_silent, is_silent


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
    limits: Limits
    subset: str = ""  # hf: configuration name; tfds: builder config; "" = the default one
    revision: str = ""  # hf: branch, tag or commit; tfds: version; "" = the newest
    split: str = "train"  # hf, tfds: a split in their slicing notation, such as "train[:10%]"
    streaming: bool = False  # hf: read over the network without a copy on disk
    key: str = "data.path"  # the setting or flag that names the path, for messages


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
    with reading(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Files


def _open_files(location: Location, *, read: Reader) -> Source:
    """File after file in sorted order. The fingerprint is of their contents, not of their names and times."""
    source, path, columns, limits, *_ = location
    paths = _expand(path, location.key)
    # The suffix decides on decompression, so it is content too.
    digests = [(file.suffix if file.suffix in COMPRESSION else "", _file_digest(file)) for file in paths]
    anew = [index for index, file in enumerate(paths) if _is_read_anew(file, source, limits)]
    size = sum(file.stat().st_size for file in paths)
    names = paths[0].name if len(paths) == 1 else f"{len(paths)} files, {paths[0].name} … {paths[-1].name}"
    return Source(
        description=f"{source}: {names} ({size / 1e6:.1f} MB)",
        fingerprint=_digest(source, columns[-1], digests, *columns[:-1], *([anew] if anew else [])),
        documents=lambda: itertools.chain.from_iterable(read(file, columns, limits) for file in paths),
    )


def _is_read_anew(path: Path, source: str, limits: Limits) -> bool:
    """Whether version 0.1.0 read other documents from a file, so that what it prepared must not be found again.

    It merged rows of tsv between quotation marks, and lines that end with CR alone. All other files keep their names.
    """
    if source == "parquet":
        return False
    with reading(path), open_stream(path) as stream:
        if source == "tsv" and any(b'"' in block for block in iter(partial(stream.read, 1 << 20), b"")):
            return True
    return has_old_line_ends(path, limit=limits.document)


def _open_text_files(location: Location) -> Source:
    """Text files have no columns: every line is a document."""
    if len(location.columns) > 1:
        raise UserError(
            f"data.prompt_column={location.columns[0]!r}: data.source='text' has no columns; choose another"
        )
    return _open_files(location._replace(columns=("",)), read=read_text)


def _expand(path: str, key: str) -> list[Path]:
    # The name of an existing file is meant literally, even with a comma or a bracket in it.
    entries = [path] if os.path.exists(path) else [entry.strip() for entry in path.split(",") if entry.strip()]
    if not entries:
        raise UserError(f"{key}={path!r} names no file; give a file, a glob, or several separated by commas")
    found = {file for entry in entries for file in _matches(entry, key)}
    for file in found:
        if not stat.S_ISREG(file.stat().st_mode):
            raise UserError(f"{key}: {str(file)!r} is a device or a pipe, whose size is not known; give a file")
        if file.stat().st_size == 0:
            raise UserError(f"{key}: {str(file)!r} is empty (0 bytes); leave it out or write it again")
        with reading(file):
            check_fetched(file)
    # Of two names of one file the first counts. The target of a link is not used: its name may lack the suffix.
    return sorted({file.resolve(): file for file in sorted(found, reverse=True)}.values())


def _matches(entry: str, key: str) -> set[Path]:
    """The files that a name or a glob means."""
    literal = named_path(entry, key=key)
    if literal.is_dir():
        raise UserError(f"{key}: {entry!r} is a folder; give its files, such as {entry.rstrip('/')}/*.txt")
    if literal.exists():
        return {literal}
    files = {Path(match) for match in glob.glob(str(literal), recursive=True) if Path(match).is_file()}
    if not files:
        wrong = "no file matches" if glob.has_magic(entry) else "no such file:"
        raise UserError(f"{key}: {wrong} {entry!r} (looked from {Path.cwd()})")
    return files


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
    import datasets

    _, path, columns, limits, subset, revision, split, *_ = location
    where = f"dataset {path!r}"
    _check_folder(location)
    is_saved = _is_saved(named_path(path))
    data = _load_saved(location, where) if is_saved else _load_hf(location, where)
    streaming = isinstance(data, datasets.IterableDataset)
    names = data.column_names
    if names is None:  # a stream that does not know its columns before it is read
        names = list(next(iter(data), {}))
    check_columns(columns, names, where)
    if is_saved:
        content = ([_file_digest(Path(file["filename"])) for file in data.cache_files], split)
    else:
        content = (path, subset, revision, split) if streaming else (data.select_columns(list(columns))._fingerprint,)
    tables = data.select_columns(list(columns)).with_format("arrow")

    def values() -> Iterator[Row]:
        try:
            for table in tables.iter(batch_size=1000):
                yield from rows_of_table(table, columns, where, limit=limits.document)
        except OSError as error:
            raise UserError(f"reading {where} failed: {first_line(error)}") from error

    size = "streamed" if streaming else f"{len(data):,} rows"
    return Source(
        description=f"hf: {'/'.join(filter(None, (path, subset)))} {split} ({size})",
        fingerprint=_digest("hf", *content, *columns[::-1]),
        documents=lambda: documents_of(values(), lambda: where, columns, limit=limits.document),
    )


def _check_folder(location: Location) -> None:
    """Refuses what would be ignored, or read as text, where the name of a data set is a local folder."""
    folder = named_path(location.path, key=location.key)
    if not folder.is_dir():
        return
    if location.revision:
        raise UserError(
            f"config.data.revision={location.revision!r}: {location.path!r} is a local folder; leave it empty"
        )
    for file in folder.rglob("*"):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts):
            with reading(file):
                check_fetched(file)


def _is_saved(folder: Path) -> bool:
    """Whether a folder is of Dataset.save_to_disk or DatasetDict.save_to_disk, which load_dataset does not read."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _load_saved(location: Location, where: str) -> Any:
    import datasets

    try:
        saved = datasets.load_from_disk(str(named_path(location.path)))
        # A data set that was saved alone is whatever split the config names by default.
        parts = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved, str(saved.split): saved}
        lengths = {name: len(part) for name, part in parts.items()}
        instructions = datasets.ReadInstruction.from_spec(location.split).to_absolute(lengths)
        return datasets.concatenate_datasets(
            [parts[part.splitname].select(range(part.from_, part.to)) for part in instructions]
        )
    except Exception as error:  # whatever the loader raises is about the folder that the user gave
        raise UserError(f"cannot load {where} (split {location.split!r}): {first_line(error)}") from error


def _load_hf(location: Location, where: str) -> Any:
    import datasets

    _, path, _, _, subset, revision, split, streaming, _ = location
    try:
        alone = not Path(path).exists() and is_hub_silent()
        if not is_live():  # of the hub's client, the bars are for a terminal alone anyway
            datasets.disable_progress_bars()
        with taking(f"loading {where}"), _quiet("huggingface_hub"), _cache_alone(datasets, wanted=alone):
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
            f"cannot load {where} (subset {subset!r}, split {split!r}): {first_line(error)}; "
            "give a local folder where there is no network"
        ) from error


@contextmanager
def _cache_alone(datasets: Any, *, wanted: bool) -> Iterator[None]:
    """Where the hub does not answer: what `datasets` has in its cache, at once, as in its offline mode."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = wanted or before
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _open_tfds(location: Location) -> Source:
    """A TensorFlow Datasets name, or a prepared folder of one, read through its data source without TensorFlow.

    The data set must be prepared as array_record (the default without TensorFlow): TFRecord has no random access.
    """
    _, path, columns, limits, subset, revision, split, *_ = location
    name = path + (f"/{subset}" if subset else "") + (f":{revision}" if revision else "")
    where = f"TFDS dataset {name!r}"
    _check_folder(location)
    data = _load_tfds(path, name, split, where)
    info = data.dataset_info
    check_columns(columns, info.features, where)
    digests = [_file_digest(Path(part.filename)) for part in info.splits[split].file_instructions]

    def decoded(value: object, index: int, column: str) -> object:
        try:
            return value.decode() if isinstance(value, bytes) else value
        except UnicodeDecodeError as error:
            raise UserError(f"{where}, example {index}: column {column!r} is not UTF-8 text") from error

    def values() -> Iterator[Row]:
        for index in range(len(data)):
            example = data[index]
            yield tuple(decoded(example[column], index, column) for column in columns)

    return Source(
        description=f"tfds: {info.full_name} {split} ({len(data):,} rows)",
        fingerprint=_digest("tfds", info.full_name, split, columns[-1], digests, *columns[:-1]),
        documents=lambda: documents_of(values(), lambda: where, columns, limit=limits.document),
    )


_TFDS_SERVER = "https://storage.googleapis.com"  # where TFDS looks first


def _load_tfds(path: str, name: str, split: str, where: str) -> Any:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError("data.source='tfds' needs an extra: pip install 'jaxdistill[tfds]'") from error

    try:
        if Path(path).is_dir():
            builder: Any = tfds.builder_from_directory(path)
            return builder.as_data_source(split=split)
        # Without a network, its downloads are tried again for minutes each.
        if not tfds.builder(name).is_prepared() and is_silent(_TFDS_SERVER):
            raise UserError(
                f"{where} is not prepared on this machine, and no network answers; prepare it where there is one, and "
                "give its folder"
            )
        return tfds.data_source(name, split=split)
    except UserError:
        raise
    except Exception as error:  # whatever a builder raises is about the name that the user gave
        raise UserError(f"cannot load {where}, split {split!r}: {first_line(error)}") from error


SOURCES: dict[str, Callable[[Location], Source]] = {
    "text": _open_text_files,
    "csv": partial(_open_files, read=read_csv),
    "tsv": partial(_open_files, read=read_tsv),
    "jsonl": partial(_open_files, read=read_json),
    "parquet": partial(_open_files, read=read_parquet),
    "hf": _open_hf,
    "tfds": _open_tfds,
}
