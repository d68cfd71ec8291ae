"""One process at a time trains in a run folder."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from jaxdistill.errors import UserError
from jaxdistill.files import write_text, writing

LOCK = ".lock"  # stays in the folder, as a lock file that is removed could be locked twice
HOLDER = ".holder.json"  # apart from the lock file, which some versions of filelock empty when they try it


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds the folder for the block, and makes it. A folder that holds nothing else afterwards is as it was before.

    The operating system frees the lock of a process that is killed.

    Raises:
      UserError: another process holds the folder, which is not touched; or it cannot be written.
    """
    made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    lock = filelock.FileLock(workdir / LOCK)
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            raise UserError(
                f"--workdir {workdir} is in use by {_holder(workdir)}; wait for it to end, or name another --workdir"
            ) from None
        except NotImplementedError as error:
            raise UserError(f"the file system of {workdir} has no locks ({error}); name another --workdir") from error
    try:
        with writing(workdir):
            who = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}
            write_text(workdir / HOLDER, json.dumps(who))
        yield
    finally:
        (workdir / HOLDER).unlink(missing_ok=True)
        _remove_if_unused(workdir, made)
        lock.release()


def _holder(workdir: Path) -> str:
    try:
        who = json.loads((workdir / HOLDER).read_text())
        return f"process {who['process']} on {who['host']} since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has just begun, or ended
        return "another process"


def _remove_if_unused(workdir: Path, made: list[Path]) -> None:
    """Takes back what `locked` made, where the run was refused before it wrote anything."""
    if not workdir.is_dir() or os.listdir(workdir) != [LOCK]:
        return
    (workdir / LOCK).unlink()
    for folder in made:
        if os.listdir(folder):
            return
        folder.rmdir()
