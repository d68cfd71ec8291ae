"""Object storage in a folder: gs://BUCKET/NAME is the file BUCKET/NAME there, for etils.epath and for tensorstore.

s3:// addresses are of the same folder, for etils.epath alone: tensorstore's driver is not asked for by orbax.
"""

from pathlib import Path
from typing import Any, ClassVar

from etils.epath import backend
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry
from orbax.checkpoint._src.path import gcs_utils


class Bucket(LocalFileSystem):
    """A file system of fsspec, through which epath reads and writes addresses."""

    protocol = ("gcs", "gs", "s3")
    cachable = False
    root: ClassVar[str] = ""

    def __init__(self, **options: Any):
        super().__init__(auto_mkdir=True)

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        text = str(path)
        _, is_address, name = text.partition("://")
        return f"{cls.root}/{name}".rstrip("/") if is_address else text

    def exists(self, path: Any, **options: Any) -> bool:
        """Object storage has no folders, but for names of files."""
        here = Path(self._strip_protocol(path))
        return here.is_file() or any(found.is_file() for found in here.rglob("*"))

    def isdir(self, path: Any) -> bool:
        return super().isdir(path) and self.exists(path)

    def glob(self, path: Any, **options: Any) -> list[str]:
        return [found.removeprefix(f"{self.root}/") for found in super().glob(path, **options)]


def _kvstore(path: str) -> dict[str, str]:
    name = f"{Bucket.root}/{str(path).removeprefix('gs://').rstrip('/')}"
    # A folder, but for the one file that orbax names in this way.
    return {"driver": "file", "path": name if name.endswith("/_sharding") else f"{name}/"}


def use(root: Path, monkeypatch: Any, schemes: tuple[str, ...] = ("gcs",)) -> Path:
    """Makes addresses files in a folder."""
    monkeypatch.setattr(Bucket, "root", str(root))
    for scheme in schemes:
        monkeypatch.setitem(_registry, scheme, Bucket)
    backend.fsspec_backend._get_filesystem.cache_clear()
    monkeypatch.setattr(gcs_utils, "get_kvstore_for_gcs", _kvstore)
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
    return root
