"""Small files of JSON and names of paths: one line for whatever cannot be read."""

import pytest
from refusal import refused

from jaxdistill.files import named_path, read_json

LONG = "x" * 300


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"{", b"{} {}", b"\x00", b'{"a": "\xe9"}', b"1" * 5000, '{"a": 1}'.encode("utf-16")),
        *(b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    ],
    ids=lambda data: repr(data[:9]),
)
def test_what_is_not_json(tmp_path, data):
    path = tmp_path / "x.json"
    path.write_bytes(data)
    refused(lambda: read_json(path), f"{path} is not JSON")


def test_json_that_cannot_be_read(tmp_path, monkeypatch):
    from jaxdistill import files

    refused(lambda: read_json(tmp_path), f"{tmp_path} cannot be read: Is a directory")
    refused(lambda: read_json(tmp_path / LONG), "cannot be read: File name too long")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    refused(lambda: read_json(loop), "cannot be read: Too many levels of symbolic links")
    monkeypatch.setattr(files, "_LARGEST_JSON", 9)
    (tmp_path / "large").write_text("[1, 2, 3, 4]")
    refused(lambda: read_json(tmp_path / "large"), "more than 9 bytes")


@pytest.mark.parametrize("name", ["~nosuchuser/x", "~nosuchuser", LONG, "a\0b", "x/" * 5000, "\ud800"])
def test_names_that_no_file_can_have(name):
    refused(lambda: named_path(name), "is not a path of this machine")


@pytest.mark.parametrize("name", ["gs://bucket/a", "s3://bucket/a", "s3:/bucket/a", "hf://user/name"])
def test_an_address_is_no_path(name):
    refused(lambda: named_path(name, key="config.data.cache_dir"), f"config.data.cache_dir={name} is an address")


def test_other_names_are_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert named_path("~/a b") == tmp_path / "a b"
    assert named_path(str(tmp_path)) == tmp_path
    for name in ("not/there", "a:b/c", "./gs:/a", "C:/a"):
        assert str(named_path(name)) == name.removeprefix("./")
    (tmp_path / "file").write_text("")
    assert named_path(f"{tmp_path}/file/below") == tmp_path / "file" / "below"
