"""Files written whole or not at all, and errors of the operating system as one line."""

import errno
import fcntl
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jaxdistill.errors import UserError, first_line

_LFS = b"version https://git-lfs.github.com/spec/"  # how a pointer begins
_UNFINISHED = ".jaxdistill-unfinished"  # how the name of a folder ends that is still being written
_ADDRESS = re.compile(r"[a-z][a-z0-9]+:/.*")  # a Path drops the second slash
_LARGEST_JSON = 1 << 28  # bytes; the largest tokenizer.json in use has 34 million


# What a disk, a quota, a limit of the shell or a mount answers to a writer.
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
# How writers in Rust (safetensors, tokenizers) and C++ (tensorstore), which raise types of their own, name the number.
_NUMBER = re.compile(r"os[ _]error(?:[ _]code)?\W{1,3}(\d+)", re.IGNORECASE)


def os_error(error: BaseException) -> int:
    """The number of the operating system's error that an exception is, or tells of in its text; else 0."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = _NUMBER.search(str(error))
    return int(found[1]) if found else 0


def refusal(error: BaseException) -> str:
    """The message of the operating system where a disk failed; "" for any other error."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    number = os_error(error)
    return os.strerror(number) if number in _REFUSALS else ""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises UserError where the operating system refuses to write."""
    try:
        yield
    except Exception as e:
        if reason := refusal(e):
            raise UserError(f"cannot write {path}: {reason}; fix that, or write to another folder") from e
        raise


def write_text(path: Path, text: str) -> None:
    """Writes whole or not at all; into a device or a pipe, which a rename would replace, directly."""
    if path.exists() and not path.is_file():
        path.write_text(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def appending(path: Path) -> tuple[Callable[[bytes], None], Callable[[], None]]:
    """(appends bytes to a file at once, closes it). Bytes are appended whole or not at all.

    Unbuffered, so that an error is that of the bytes being written, and closing has none left to write.

    Raises:
      UserError: the operating system refuses, here or in the first function.
    """
    with writing(path):
        file = path.open("ab", buffering=0)

    def append(data: bytes) -> None:
        with writing(path):
            size = os.fstat(file.fileno()).st_size
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                with suppress(OSError):  # a device has no size
                    file.truncate(size)
                raise

    return append, file.close


@contextmanager
def folder_beside(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, for the block to fill and to rename to `out`; removed where the block does not.

    A process that is killed leaves its folder, which the next call for the same parent folder removes: the operating
    system frees the lock that every process holds on its own.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f".*{_UNFINISHED}"):
        if (lock := _locked(left)) is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)
    folder = out.parent / f".{out.name[:100]}.{uuid.uuid4().hex[:8]}{_UNFINISHED}"
    folder.mkdir()
    lock = _locked(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """A descriptor that holds a lock on a folder; None where another process holds it, or there are no such locks."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def check_fetched(path: Path) -> None:
    """Checks that git has fetched a file, where the folder is a clone of a repository that keeps large files apart.

    Raises:
      UserError: the file is a pointer of git-lfs, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if start == _LFS:
        raise UserError(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder")


def read_json(path: Path) -> Any:
    """The value of a small file of JSON, such as a configuration.

    Raises:
      UserError: the file cannot be read, is far too large, is a pointer of git-lfs, or is not JSON.
    """
    check_fetched(path)
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_JSON + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > _LARGEST_JSON:
        raise UserError(f"{path} has more than {_LARGEST_JSON:,} bytes, which no such file needs: fetch it again")
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({first_line(error)}): fetch it, or write it, again") from error


def named_path(name: str, *, key: str = "") -> Path:
    """The path that a user names; ~ is the home folder. Whether a file is there is not asked.

    Args:
      key: the setting that names it, for the message.

    Raises:
      UserError: no file can have this name, or ~ stands for no folder; it is an address, such as gs://bucket/name.
    """
    if _ADDRESS.fullmatch(name):
        raise UserError(
            f"{f'{key}={name}' if key else name} is an address, and a path of this machine is needed: copy what is "
            "there to a folder; --workdir, --out of export and config.data.path alone take gs:// and s3://"
        )
    try:
        path = Path(name).expanduser()
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return path
    except (OSError, ValueError, RuntimeError) as error:  # a name that is too long, or holds NUL; an unknown user
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        if isinstance(error, RuntimeError):
            reason = "there is no such home folder; set HOME, or name a path without ~"
        said = f"{key}={name!r}" if key else repr(name)
        raise UserError(f"{said} is not a path of this machine: {reason}") from error
    return path
