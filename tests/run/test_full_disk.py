"""Whatever is being written, a disk or a limit that refuses ends the command with one line and exit code 2."""

import errno
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny_run

from jaxdistill import cli
from jaxdistill.errors import UserError
from jaxdistill.files import appending, refusal, write_text, writing
from jaxdistill.run import writers
from jaxdistill.run.closing import Closing

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.is_char_device(), reason="needs /dev/full")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may become larger than so many bytes, as after `ulimit -f`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EFBIG, "File too large"), "File too large"),
        (OSError("of a library, without a number"), "of a library, without a number"),
        (
            RuntimeError("Error while serializing: IoError(Os { ... }): No space (os error 28)"),
            "No space left on device",
        ),
        (ValueError("OUT_OF_RANGE: Failed to write 9 bytes to file 7 [os_error_code='27']"), "File too large"),
        (ValueError("UNAVAILABLE: fsync failed [OS error 5: EIO Input/output error]"), "Input/output error"),
        (ValueError("NOT_FOUND: no such file [os_error_code='2']"), ""),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 28 bytes"), ""),
    ],
)
def test_what_the_operating_system_refused(error, said):
    assert refusal(error) == said


def test_bytes_are_appended_whole_or_not_at_all(tmp_path):
    append, close = appending(tmp_path / "file")
    append(b"0123456789")
    with largest_file(15), pytest.raises(UserError, match=r"cannot write .*file: File too large"):
        append(b"abcdefghij")
    append(b"x")
    close()
    assert (tmp_path / "file").read_bytes() == b"0123456789x"


@needs_full
def test_a_device_is_written_to_and_not_replaced(tmp_path):
    append, close = appending(FULL)
    with pytest.raises(UserError, match="cannot write /dev/full: No space left on device"):
        append(b"x")
    close()
    with pytest.raises(UserError, match="cannot write /dev/full: No space left on device"), writing(FULL):
        write_text(FULL, "x")
    assert stat.S_ISCHR(FULL.stat().st_mode)


def test_a_text_that_cannot_be_written_leaves_the_old_one_and_no_part(tmp_path):
    write_text(tmp_path / "config.json", "old")
    with largest_file(10), pytest.raises(OSError, match="File too large"):
        write_text(tmp_path / "config.json", "new" * 10)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"config.json": "old"}


def test_tensorboard_neither_waits_for_ever_nor_goes_on_in_silence(tmp_path):
    write, close, _ = writers.tensorboard(tmp_path)
    for step in range(1, 20):  # more than the queue of tensorboardX's own writer holds
        write(step, "train", {"loss": 1 / step, "a/b": 2.0})
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    with largest_file(len(whole) + 10):
        for _ in range(30):
            with pytest.raises(UserError, match=r"cannot write .*tfevents.*: File too large"):
                write(20, "train", {"loss": 0.0})
        close()
    assert file.read_bytes() == whole


def test_tensorboard_files_have_the_records_that_its_own_writer_makes(tmp_path):
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import RecordWriter

    event = event_pb2.Event(wall_time=1.5, step=3, file_version="brain.Event:2")  # type: ignore[attr-defined]
    own = RecordWriter(str(tmp_path / "file"))
    own.write(event.SerializeToString())
    own.close()
    assert writers._framed(event) == (tmp_path / "file").read_bytes()


def test_closing_does_not_bury_the_first_error_nor_keep_files_open():
    closed = []

    def fails(name: str) -> None:
        closed.append(name)
        raise OSError(name)

    def close_after(error: Exception | None) -> None:
        with Closing() as closing:
            for name in ("a", "b"):
                closing.callback(lambda name=name: fails(name))
            if error:
                raise error

    with pytest.raises(UserError, match="the first"):
        close_after(UserError("the first"))
    with pytest.raises(OSError, match="b"):
        close_after(None)
    assert closed == ["b", "a"] * 2


@pytest.mark.slow
@needs_full
@pytest.mark.parametrize(
    ("limit", "command", "said"),
    [
        pytest.param(
            40,
            "train",
            "cannot write {folder}/run/checkpoints (File too large); the last whole checkpoint is none",
            marks=pytest.mark.weekly,  # test_bad_input has a disk that is full at a checkpoint
        ),
        (2, "train", "cannot write {folder}/run: File too large"),
        (2, "prepare", "cannot write prepared data in '{folder}/cache': File too large"),
        (8, "init-student", "cannot write {folder}/student: File too large"),
    ],
)
def test_a_limit_of_the_shell(tiny, tmp_path, limit, command, said):
    """`ulimit -f` in KB, while a checkpoint, the run folder, prepared text or a student is written."""
    cache, student = tmp_path / "cache", tmp_path / "student"
    training = tiny_run.arguments(tiny, tmp_path / "run", checkpoint__every=1, log__tensorboard=True)
    argv = {
        "train": ["train", *training],
        "prepare": ["prepare", f"--config={tiny.recipe}", f"--config.data.cache_dir={cache}"],
        "init-student": ["init-student", f"--teacher={tiny.teacher}", "--layers=2", f"--out={student}"],
    }[command]
    assert (
        tiny_run.call(cli.main, ["prepare", f"--config={tiny.recipe}"])[0] == 0
    )  # so that a run begins with its folder
    done = subprocess.run(
        ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "-", sys.executable, "-m", "jaxdistill.cli", *argv],
        capture_output=True, text=True, timeout=300, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {said.format(folder=tmp_path)}")
    assert not list(tmp_path.glob("cache/*partial*")) and not list(tmp_path.glob(".student*"))
