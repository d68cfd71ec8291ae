"""Text at an address is copied once, and prepared as the same text in a file is."""

from pathlib import Path

import bucket
import pytest

from jaxdistill.data.fetch import fetched
from jaxdistill.data.settings import DataConfig
from jaxdistill.data.text import open_source
from jaxdistill.errors import UserError


@pytest.fixture
def storage(tmp_path, monkeypatch):
    root = bucket.use(tmp_path / "storage", monkeypatch)
    (root / "bucket" / "text").mkdir(parents=True)
    for name in ("a.txt", "b.txt", "c.md"):
        (root / "bucket" / "text" / name).write_text(f"one document of {name}\n")
    return root


def test_a_file_a_folder_and_a_pattern(storage, tmp_path):
    said: list[str] = []

    def copy(path: str) -> Path:
        return Path(fetched(path, cache_dir=str(tmp_path / "cache"), report=said.append))

    assert copy("corpus.txt") == Path("corpus.txt") and said == []
    file = copy("gs://bucket/text/a.txt")
    assert file.name == "a.txt" and file.read_text() == "one document of a.txt\n" and len(said) == 1
    assert copy("gs://bucket/text/a.txt") == file and len(said) == 1
    assert sorted(path.name for path in copy("gs://bucket/text").iterdir()) == ["a.txt", "b.txt", "c.md"]
    pattern = copy("gs://bucket/text/*.txt")
    assert sorted(path.name for path in pattern.parent.glob(pattern.name)) == ["a.txt", "b.txt"]
    (storage / "bucket" / "text" / "a.txt").write_text("another document\n")
    changed = copy("gs://bucket/text/a.txt")
    assert changed != file and changed.read_text() == "another document\n" and file.is_file()


def test_the_same_text_is_the_same_source(storage, tmp_path):
    data = DataConfig(cache_dir=str(tmp_path / "cache"))
    sources = [
        open_source(data, path=path, split="")
        for path in ("gs://bucket/text/*.txt", str(storage / "bucket" / "text" / "*.txt"))
    ]
    assert sources[0].fingerprint == sources[1].fingerprint
    assert list(sources[0].documents()) == list(sources[1].documents())


def test_what_is_not_there_is_one_line(storage, tmp_path, monkeypatch):
    for path in ("gs://bucket/none.txt", "gs://bucket/text/*.csv"):
        with pytest.raises(UserError, match="there is no file at gs://bucket/"):
            fetched(path, cache_dir=str(tmp_path), report=print)
    with pytest.raises(UserError, match=r"needs a package .*jaxdistill\[s3\]"):
        fetched("s3://bucket/a.txt", cache_dir=str(tmp_path), report=print)

    def refuse(*args, **options):
        raise PermissionError("403 of the storage")

    monkeypatch.setattr(bucket.Bucket, "_open", refuse)
    with pytest.raises(UserError, match=r"cannot be read .*403 of the storage"):
        fetched("gs://bucket/text/a.txt", cache_dir=str(tmp_path), report=print)
    assert not [path for path in (tmp_path / "fetched").iterdir() if path.is_dir()]
