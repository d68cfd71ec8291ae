"""Run folders and exports in object storage (gs://, s3://): a folder of this machine mirrors their small files.

Object storage has no locks, no appending and no renaming, which most files of a run need. So these files stand in a
temporary folder here, which is filled from the address at the start, and sent to it while the run goes on. Checkpoints
are no part of it where orbax writes and reads them at the address, every process its own part. That is gs:// alone:
checkpoints of a run at s3:// stand in the mirror, whole, so that one process trains there.
"""

import argparse
import atexit
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxdistill import console
from jaxdistill.errors import UserError, first_line

PERIOD = 30.0  # seconds between two times that changed files are sent
_APART = ("profile", "tensorboard", "wandb")  # not fetched
_OF_PROCESS = (".lock", ".holder.json")  # neither fetched nor sent
_PACKAGES = {"gs": "gcs", "s3": "s3"}  # scheme -> the extra that reads it
_OF_ORBAX = ("gs",)  # where orbax itself writes
CHECKPOINTS = "checkpoints"
_TORN = ".orbax-checkpoint-tmp"  # in the name of a checkpoint that is being written
# A file of every checkpoint. It is sent after all others, and a checkpoint that has none is not fetched.
_SENT_LAST = "_CHECKPOINT_METADATA"


def folder(text: str) -> Path:
    """The folder that a user names on the command line: an address gives an empty mirror, which `fetch` fills.

    Raises:
      argparse.ArgumentTypeError: an address of another kind.
    """
    if not (scheme := re.match(r"([a-z0-9]+)://", text)):
        return Path(os.path.expanduser(text))  # a shell leaves ~ in --workdir=~/run
    if scheme[1] not in _PACKAGES:
        known = " or ".join(f"{name}://" for name in _PACKAGES)
        raise argparse.ArgumentTypeError(f"{text}: addresses begin with {known}")
    address = text.rstrip("/")
    parent = Path(tempfile.mkdtemp(prefix="jaxdistill-mirror-"))
    atexit.register(shutil.rmtree, parent, ignore_errors=True)
    mirror = parent / address.rpartition("/")[2]
    mirror.mkdir()
    _addresses[mirror] = address
    console.show_as(str(mirror), address)
    return mirror


def place_of(workdir: Path) -> Any:
    """Where the files of a folder are kept in the end: the folder itself, or the address that it mirrors."""
    if workdir not in _addresses:
        return workdir
    from etils import epath

    return epath.Path(_addresses[workdir])


def place_of_checkpoints(workdir: Path) -> Any:
    """Where the checkpoints of a run are written and read."""
    place = place_of(workdir)
    return (workdir.absolute() if _holds_checkpoints(workdir) else place) / CHECKPOINTS


def _holds_checkpoints(workdir: Path) -> bool:
    """Whether the checkpoints of a run are in the folder itself, which may be a mirror."""
    return _addresses.get(workdir, "").partition("://")[0] not in _OF_ORBAX


def check_processes(mirror: Path, count: int) -> None:
    """Checks that a run of this many processes can be saved where the folder is.

    Raises:
      UserError: each process would have a part of every checkpoint in a mirror of its own.
    """
    if count > 1 and place_of(mirror) != mirror and _holds_checkpoints(mirror):
        raise UserError(
            f"--workdir {place_of(mirror)}: {count} processes write their parts of a checkpoint into one folder, which "
            "no library here does at s3://; name a folder that all hosts share, or an address of gs://"
        )


def fetch(mirror: Path) -> None:
    """Fills a mirror with what a run needs of its address. Of exported folders, it only notes that they are there.

    Raises:
      UserError: the address cannot be read.
    """
    place = place_of(mirror)
    if place == mirror:
        return
    with _reaching(place):
        for path in list(place.iterdir()) if place.exists() else ():
            if path.name in (*_APART, *_OF_PROCESS) or (path.name == CHECKPOINTS and not _holds_checkpoints(mirror)):
                continue
            if path.name.startswith("export-"):
                (mirror / path.name).mkdir(exist_ok=True)
            else:
                _copy(path, mirror / path.name)
    _sent[mirror] = {name: _identity(path) for name, path in _files(mirror)}


def _copy(path: Any, to: Path) -> None:
    if path.parent.name == CHECKPOINTS and not (path / _SENT_LAST).exists():
        return
    if path.is_dir():
        to.mkdir(exist_ok=True)
        for inner in path.iterdir():
            _copy(inner, to / inner.name)
    else:
        _copy_file(path, to)


def _copy_file(path: Any, to: Any) -> None:
    with path.open("rb") as source, to.open("wb") as copy:
        shutil.copyfileobj(source, copy, 1 << 24)


def check_empty(mirror: Path) -> None:
    """Checks that nothing is at the address that a mirror is to be sent to.

    Raises:
      UserError: there is something.
    """
    place = place_of(mirror)
    with _reaching(place):
        if place != mirror and place.exists() and any(place.iterdir()):
            raise UserError(f"{place} exists and is not empty: choose another --out, nothing is written over")


def send(mirror: Path, *, every: float = 0.0) -> None:
    """Sends the files of a mirror that have changed since they were fetched or sent.

    Args:
      every: seconds since the last time, before which nothing is done.

    Raises:
      UserError: the address cannot be written.
    """
    place = place_of(mirror)
    if place == mirror or time.monotonic() - _when.get(mirror, float("-inf")) < every:
        return
    sent = _sent.setdefault(mirror, {})
    with _reaching(place):
        for name, path in _files(mirror):
            try:
                if sent.get(name) != (identity := _identity(path)):
                    target = place / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    _copy_file(path, target)
                    sent[name] = identity
            except FileNotFoundError:
                if path.exists():  # so it is the address that is gone
                    raise
                # Else orbax has just removed an old checkpoint.
        for name in sent.keys() - dict(_files(mirror)).keys():
            (place / name).unlink(missing_ok=True)
            del sent[name]
    _when[mirror] = time.monotonic()


_addresses: dict[Path, str] = {}  # of the mirrors of this process
# What of each mirror the address holds, by name: size and time of the file here.
_sent: dict[Path, dict[str, tuple[int, int]]] = {}
_when: dict[Path, float] = {}


def _files(mirror: Path) -> Iterator[tuple[str, Path]]:
    """(name, path) of the files of a run, without those that are of this machine alone, or not whole yet."""
    for path in sorted(mirror.rglob("*"), key=lambda path: (path.name == _SENT_LAST, path)):
        name = path.relative_to(mirror).as_posix()
        if path.is_file() and name not in _OF_PROCESS and not name.endswith(".part") and _TORN not in name:
            yield name, path


def _identity(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


@contextmanager
def _reaching(place: Any) -> Iterator[None]:
    """Raises UserError where the address cannot be reached, of whichever type the library's error is."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        extra = _PACKAGES[str(place).partition("://")[0]]
        raise UserError(f"{place} needs a package ({first_line(error)}): pip install 'jaxdistill[{extra}]'") from error
    except Exception as error:
        raise UserError(
            f"{place} cannot be read or written ({type(error).__name__}: {first_line(error)}); look after the name, "
            "your credentials and the network, and run the same command again"
        ) from error
