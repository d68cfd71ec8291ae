"""Folders of prepared text that appear under their final name whole or not at all, however many processes write."""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from jaxdistill.errors import UserError

_PARTIAL = ".partial-"  # in the name of a folder that is still being written


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raises UserError where the operating system refuses to write in a cache folder."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write prepared data in {str(folder)!r}: {error.strerror or error}; "
            "make room there or choose another cache folder"
        ) from error


@contextmanager
def lock(final: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Lets one process at a time prepare a folder.

    The lock only saves work: a second process waits and reuses the folder. On a file system without locks both work in
    folders of their own, and the first rename wins.
    """
    file = filelock.FileLock(final.with_suffix(".lock"))
    try:
        file.acquire(blocking=False)
    except filelock.Timeout:
        report(f"waiting for another process that prepares {final}")
        file.acquire()
    except (OSError, NotImplementedError) as error:
        report(f"no file locks in {final.parent} ({error}); preparing without")
    try:
        yield
    finally:
        file.release()


def remove_stale(folder: Path) -> None:
    """Removes what killed processes left in a cache folder, of any text; what a live one works on is locked."""
    for stale in folder.glob(f"*{_PARTIAL}*"):
        file = filelock.FileLock(folder / f"{stale.name.partition(_PARTIAL)[0]}.lock")
        try:
            with file.acquire(blocking=False):
                shutil.rmtree(stale, ignore_errors=True)
        except (filelock.Timeout, OSError, NotImplementedError):  # in use, or a file system without locks
            continue


@contextmanager
def whole_or_not(final: Path) -> Iterator[Path]:
    """A temporary folder that gets its final name when the block ends, and is removed where the block raises."""
    with writing(final.parent):
        partial_folder = Path(tempfile.mkdtemp(dir=final.parent, prefix=f"{final.name}{_PARTIAL}"))
    try:
        yield partial_folder
        _publish(partial_folder, final)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)  # gone already where the rename succeeded


def _publish(folder: Path, final: Path) -> None:
    with writing(final.parent):
        for path in [*folder.iterdir(), folder]:
            _sync(path)
        try:
            os.rename(folder, final)
        except OSError as error:
            # Another process without a lock was first: its folder has the same content.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
