"""Writing whole files, and saying in one line what the operating system refused."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxdistill.errors import UserError


def refusal(error: Exception) -> str:
    """What the operating system said, where it was the disk that failed; "" for any other error.

    The Rust writers of safetensors and tokenizers raise their own types, with the number in the text.
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
            raise UserError(f"cannot write {path}: {reason}; mend that, or write to another folder") from e
        raise


def write_text(path: Path, text: str) -> None:
    """Writes whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
