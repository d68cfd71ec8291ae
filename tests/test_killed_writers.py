"""Folders that are written whole or not at all, also by processes that are killed."""

import os
import pwd
import subprocess
import sys

import filelock
import pytest

from jaxdistill import train
from jaxdistill.data.cache import remove_stale
from jaxdistill.files import folder_beside, named_path

STAYS = """
import pathlib, sys, time
from jaxdistill.files import folder_beside
with folder_beside(pathlib.Path(sys.argv[1])) as folder:
    (folder / "half").write_text("")
    print(folder.name, flush=True)
    time.sleep(60)
"""


def test_a_folder_gets_its_name_or_leaves_nothing(tmp_path):
    with folder_beside(tmp_path / "a" / "out") as folder:
        (folder / "file").write_text("")
        folder.rename(tmp_path / "a" / "out")
    with pytest.raises(KeyError), folder_beside(tmp_path / "a" / "other") as folder:
        (folder / "file").write_text("")
        raise KeyError
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["a", "a/out", "a/out/file"]


def test_what_a_killed_process_left_is_removed_by_the_next_and_what_a_live_one_writes_is_not(tmp_path):
    with subprocess.Popen([sys.executable, "-c", STAYS, tmp_path / "killed"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        name = process.stdout.readline().decode().strip()
        with folder_beside(tmp_path / "other") as folder:
            assert {path.name for path in tmp_path.iterdir()} == {name, folder.name}
        process.kill()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with folder_beside(tmp_path / "other") as folder:
        assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_prepared_text_that_a_killed_process_left_is_removed_when_other_text_is_prepared(tmp_path):
    for name in ("dead", "live"):
        (tmp_path / f"{name}.partial-x").mkdir()
        (tmp_path / f"{name}.partial-x" / "tokens.bin").write_bytes(b"1")
    with filelock.FileLock(tmp_path / "live.lock"):
        remove_stale(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"dead.lock", "live.lock", "live.partial-x"}


@pytest.fixture
def homeless(monkeypatch):
    """A user without HOME and without an entry in the table of users, as in many containers."""

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_without_a_home_folder(homeless, monkeypatch, capsys):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)

    def run() -> None:
        named_path("~/.cache/jaxdistill", key="config.data.cache_dir")

    assert train.guarded(run) == 2
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    assert capsys.readouterr().err == (
        "error: config.data.cache_dir='~/.cache/jaxdistill' is not a path of this machine: there is no such home "
        "folder; set HOME, or name a path without ~\n"
    )
