"""Files written whole or not at all, and errors of the operating system as one line."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxdistill.errors import UserError

_LFS = b"version https://git-lfs.github.com/spec/"  # how a pointer begins


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
