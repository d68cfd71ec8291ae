"""Object storage in a folder: gs://BUCKET/NAME is the file BUCKET/NAME there, for etils.epath and for tensorstore."""

from pathlib import Path
from typing import Any, ClassVar

import fsspec
from etils.epath import backend
from fsspec.implementations.local import LocalFileSystem
from orbax.checkpoint._src.path import gcs_utils


class Bucket(LocalFileSystem):
    """A file system of fsspec, through which epath reads and writes addresses."""

    protocol = ("gcs", "gs")
    cachable = False
    root: ClassVar[str] = ""

    def __init__(self, **options: Any):
        super().__init__(auto_mkdir=True)

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        text = str(path)
        return f"{cls.root}/{text.removeprefix('gs://')}".rstrip("/") if text.startswith("gs://") else text

    def glob(self, path: Any, **options: Any) -> list[str]:
        return [found.removeprefix(f"{self.root}/") for found in super().glob(path, **options)]


def _kvstore(path: str) -> dict[str, str]:
    name = f"{Bucket.root}/{str(path).removeprefix('gs://').rstrip('/')}"
    # A folder, but for the one file that orbax names in this way.
    return {"driver": "file", "path": name if name.endswith("/_sharding") else f"{name}/"}


def use(root: Path, monkeypatch: Any) -> Path:
    """Makes gs:// addresses files in a folder."""
    monkeypatch.setattr(Bucket, "root", str(root))
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()
    monkeypatch.setattr(gcs_utils, "get_kvstore_for_gcs", _kvstore)
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
    return root
