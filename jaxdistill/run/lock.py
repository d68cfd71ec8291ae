"""One process at a time trains in a run folder."""

import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from jaxdistill import processes
from jaxdistill.console import say
from jaxdistill.errors import UserError
from jaxdistill.files import write_text, writing
from jaxdistill.run import mirror

LOCK = ".lock"  # stays in the folder, as a lock file that is removed could be locked twice
HOLDER = ".holder.json"  # apart from the lock file, which some versions of filelock empty when they try it


class GoneError(UserError):
    """The run folder was deleted, moved or taken while the run trained in it."""


class Held:
    """A run folder that this process holds; `own` is what its file HOLDER says, "" in processes that hold nothing."""

    def __init__(self, workdir: Path, own: str = ""):
        self.workdir, self.own = workdir, own
        self.place = mirror.place_of(workdir)
        self.needed: tuple[str, ...] = ()  # names that must be in the folder from now on

    def check(self) -> None:
        """Checks that the folder is still there. A writer would not notice: its file is open, or made anew.

        Raises:
          GoneError: it is not, or it is the folder of another process.
        """
        if not self.own:
            return
        is_own = self.is_own()
        if is_own:
            mirror.send(self.workdir, every=mirror.PERIOD)
        gone = [name for name in self.needed if not self._has(name)]
        if not is_own or gone:
            what = self.place / gone[0] if is_own else f"--workdir {self.workdir}"
            raise GoneError(
                f"{what} was deleted, moved or replaced while the run trained in it, so nothing more can be saved; if "
                "the folder was moved, name its new place as --workdir to go on from its last checkpoint"
            )

    def _has(self, name: str) -> bool:
        # An address has no folders, but for names of files: before the first checkpoint there is none of checkpoints.
        return (self.place / name).exists() or (self.place != self.workdir and name == mirror.CHECKPOINTS)

    def publish(self) -> None:
        """Sends what has changed to the address of the run, where it has one."""
        if self.own:
            mirror.send(self.workdir)

    def is_own(self) -> bool:
        """Whether the folder under this name is the one that this process holds."""
        try:
            return (self.place / HOLDER).read_text() == self.own
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # a read that failed says nothing about the folder
            return True


def check_shared(held: Held) -> None:
    """Checks that all processes of a run see the folder that the first one holds, before any of them computes.

    Raises:
      UserError: names the first process that does not, in all processes; no folder of this kind can be shared.
    """
    mirror.check_processes(held.workdir, processes.count())
    if processes.count() == 1:
        return
    seen = Held(held.workdir, processes.gathered("holder", held.own)[0])
    deadline = time.monotonic() + _DELAY
    while not (sees := seen.is_own()) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = processes.gathered("blind", "" if sees else socket.gethostname())
    for number, host in enumerate(blind):
        if host:
            raise UserError(
                f"--workdir {held.workdir} is not one folder for all {len(blind)} processes: process {number} on "
                f"{host} does not see what process 0 has written there; name a folder that all hosts share"
            )


_DELAY = 30.0  # seconds after which a network file system shows a new file to other hosts


@contextmanager
def locked(workdir: Path) -> Iterator[Held]:
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
    who = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}
    who["id"] = uuid.uuid4().hex  # in containers, processes and hosts may have the same names
    held = Held(workdir, json.dumps(who))
    try:
        with writing(workdir):
            write_text(workdir / HOLDER, held.own)
        if held.place == workdir:
            yield held
        else:
            with _at_address(held):
                yield held
    finally:
        with suppress(OSError):  # which must not bury the error of the block
            if held.is_own():
                (workdir / HOLDER).unlink(missing_ok=True)
            _remove_if_unused(workdir, made)
        lock.release()


@contextmanager
def _at_address(held: Held) -> Iterator[None]:
    """Makes this process the holder of an address, which has no locks: one that held it before ends when it looks."""
    holder = held.place / HOLDER
    if holder.exists():
        say(f"{held.place} names another process as its holder; if that one still runs, it stops at its next record")
    held.place.mkdir(parents=True, exist_ok=True)
    holder.write_text(held.own)
    try:
        yield
        mirror.send(held.workdir)
    except Exception:
        if held.is_own() and (held.workdir / "config.json").exists():
            with suppress(UserError):  # which must not bury the error of the block
                mirror.send(held.workdir)
        raise
    finally:
        if held.is_own():
            holder.unlink(missing_ok=True)


def _holder(workdir: Path) -> str:
    try:
        who = json.loads((workdir / HOLDER).read_text())
        return f"process {who['process']} on {who['host']} since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # it has just begun, or ended
        return "another process"


def _remove_if_unused(workdir: Path, made: list[Path]) -> None:
    """Takes back what `locked` made, where the run was refused before it wrote anything."""
    if not workdir.is_dir() or set(os.listdir(workdir)) - {LOCK}:
        return
    (workdir / LOCK).unlink(missing_ok=True)
    for folder in made:
        if os.listdir(folder):
            return
        folder.rmdir()
