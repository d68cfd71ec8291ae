"""Text in object storage (gs://, s3://), copied once to the cache of this machine, where it is read as any file."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxdistill.data.cache import lock, whole_or_not, writing
from jaxdistill.errors import UserError, first_line
from jaxdistill.files import named_path

_ADDRESS = re.compile(r"(gs|s3)://")
_EXTRAS = {"gs": "gcs", "s3": "s3"}  # scheme -> the extra that reads it


def fetched(path: str, *, cache_dir: str, report: Callable[[str], None]) -> str:
    """The path of a copy of the file, the folder, or the files of a pattern at an address; any other path as it is.

    A copy is kept under the names, sizes and times of its files, so files that change are copied again.

    Raises:
      UserError: there is nothing at the address, or it cannot be read; the cache cannot be written.
    """
    scheme = _ADDRESS.match(path)
    if not scheme:
        return path
    try:
        from etils import epath

        files, last = _files(epath.Path(path))
        versions = [[str(file), file.stat().length, file.stat().mtime] for file in files]
    except ImportError as error:
        extra = _EXTRAS[scheme[1]]
        raise UserError(f"{path} needs a package ({first_line(error)}): pip install 'jaxdistill[{extra}]'") from error
    except Exception as error:  # of whichever library reaches the storage
        raise _unreadable(path, error) from error
    if not files:
        raise UserError(f"there is no file at {path}; correct the address")
    name = hashlib.sha256(json.dumps(versions).encode()).hexdigest()[:32]
    final = named_path(cache_dir, key="config.data.cache_dir") / "fetched" / name
    if not final.exists():
        with writing(final.parent):
            final.parent.mkdir(parents=True, exist_ok=True)
        with lock(final, report):
            if not final.exists():
                report(f"copying {path} to {final}")
                _copy(files, final, path)
    return str(final / last) if last else str(final)


def _files(address: Any) -> tuple[list[Any], str]:
    """(the files at an address, what stands behind the folder of their copy to name them again)."""
    if re.search(r"[*?\[]", address.name):
        return sorted(file for file in address.parent.glob(address.name) if not file.is_dir()), address.name
    if address.is_dir():
        return sorted(file for file in address.iterdir() if not file.is_dir()), ""
    return ([address] if address.exists() else []), address.name


def _copy(files: list[Any], final: Path, path: str) -> None:
    with whole_or_not(final) as folder:
        for file in files:
            with writing(final.parent), (folder / file.name).open("wb") as copy:
                try:
                    source = file.open("rb")
                except Exception as error:
                    raise _unreadable(path, error) from error
                with source:
                    shutil.copyfileobj(source, copy, 1 << 24)


def _unreadable(path: str, error: BaseException) -> UserError:
    return UserError(
        f"{path} cannot be read ({type(error).__name__}: {first_line(error)}); look after the name, your credentials "
        "and the network"
    )
