"""Files written whole or not at all, and errors of the operating system as one line."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxdistill.errors import UserError, first_line

_LFS = b"version https://git-lfs.github.com/spec/"  # how a pointer begins
_LARGEST_JSON = 1 << 28  # bytes; the largest tokenizer.json in use has 34 million


def refusal(error: Exception) -> str:
    """The message of the operating system where a disk failed; "" for any other error.

    The Rust writers of safetensors and tokenizers raise types of their own, with the error number in the text.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        if f"os error {number}" in str(error):
            return os.strerror(number)
    return ""


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
    """Writes whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def check_fetched(path: Path) -> None:
    """Checks that git has fetched a file, where the folder is a clone of a repository that keeps large files apart.

    Raises:
      UserError: the file is a pointer of git-lfs.
    """
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise UserError(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder")


def read_json(path: Path) -> Any:
    """The value of a small file of JSON, such as a configuration.

    Raises:
      UserError: the file cannot be read, is far too large, is a pointer of git-lfs, or is not JSON.
    """
    try:
        check_fetched(path)
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


def named_path(name: str) -> Path:
    """The path that a user names; ~ is the home folder. Whether a file is there is not asked.

    Raises:
      UserError: no file can have this name, or ~ stands for no folder.
    """
    try:
        path = Path(name).expanduser()
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return path
    except (OSError, ValueError, RuntimeError) as error:  # a name that is too long, or holds NUL; an unknown user
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise UserError(f"{name!r} is not a path of this machine: {reason}") from error
    return path
