"""A run folder has one process at a time; a second one is told who that is, and touches nothing."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run

from jaxdistill import train
from jaxdistill.errors import UserError
from jaxdistill.run.lock import HOLDER, LOCK, locked


def everything(folder: Path) -> dict[str, tuple[bytes | None, int]]:
    return {name: (data, (folder / name).stat().st_mtime_ns) for name, data in tiny_run.bits(folder).items()}


def test_a_second_process_says_who_holds_the_folder_and_touches_nothing(tiny, tmp_path):
    run = tmp_path / "run"
    with locked(run):
        (run / "config.json").write_text('{"teacher": {}}')
        before = everything(run)
        for _ in range(2):
            code, out, err = tiny_run.call(train.main, tiny_run.arguments(tiny, run))
            assert (code, out) == (2, "") and err.startswith(f"error: --workdir {run} is in use by process ")
            assert f"process {os.getpid()} on {socket.gethostname()} since 2" in err and err.count("\n") == 1
        assert everything(run) == before
    assert sorted(path.name for path in run.iterdir()) == [LOCK, "config.json"]


def test_a_killed_process_leaves_the_folder_free(tmp_path):
    program = (
        "import sys, time, pathlib; from jaxdistill.run.lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, tmp_path / "run"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"process {process.pid} on "), locked(tmp_path / "run"):
            raise AssertionError("two processes hold the folder")
        process.kill()
    assert json.loads((tmp_path / "run" / HOLDER).read_text())["process"] == process.pid  # stale, and no matter
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / HOLDER).read_text())["process"] == os.getpid()


def test_a_refused_run_leaves_no_folder(tiny, tmp_path):
    argv = tiny_run.arguments(tiny, tmp_path / "a" / "b" / "run", student__layers="[0,9]")
    assert tiny_run.call(train.main, argv)[0] == 2
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    assert tiny_run.call(train.main, tiny_run.arguments(tiny, tmp_path / "empty", student__layers="[0,9]"))[0] == 2
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.slow
def test_two_processes_started_at_once_make_one_run(tiny, tmp_path):
    command = [sys.executable, "-m", "jaxdistill.train", *tiny_run.arguments(tiny, tmp_path / "run", train__steps=2)]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], said
    assert f"in use by process {both[codes.index(0)].pid} on " in said[codes.index(2)]
    assert max(record["step"] for record in tiny_run.records(tmp_path / "run")) == 2
