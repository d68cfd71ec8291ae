"""The last line of defence: whatever ends a command is one line with an exit code, and a traceback on request only."""

import errno
import os

import pytest
import tiny_run

from jaxdistill import cli, train
from jaxdistill.errors import UserError, place_in


def guarded(error: BaseException) -> tuple[int, str]:
    def run():
        raise error

    code, out, err = tiny_run.call(lambda argv: train.guarded(run), [])
    assert out == "" and err.endswith("\n")
    return code, err


class JaxRuntimeError(RuntimeError):
    """Under the name of jax's own, which no Python code can raise with a message."""


class PanicException(BaseException):
    """As the libraries in Rust raise one."""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("config.x=1: must be 2"), 2, "error: config.x=1: must be 2\n"),
        (ValueError("no rule\nfor this"), 1, "ValueError: no rule (no rule of jaxdistill"),
        (RecursionError(), 1, "error: RecursionError"),
        (PanicException("index out of bounds"), 1, "index out of bounds"),
        (OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), "/a/b"), 2, "error: /a/b: File name too long"),
        (MemoryError("Unable to allocate 8 TiB"), 2, "the machine has not enough memory (Unable to allocate 8 TiB)"),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 3 GB"), 2, "config.train.accumulation"),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 3 GB"), 2, "config.student.remat=dots"),
        (JaxRuntimeError("INTERNAL: broken"), 1, "INTERNAL: broken"),
    ],
)
def test_any_error_is_one_line(monkeypatch, error, code, said):
    monkeypatch.delenv("JAXDISTILL_TRACEBACK", raising=False)
    got, err = guarded(error)
    assert got == code and said in err and err.startswith("error: ") and err.count("\n") == 1, err
    monkeypatch.setenv("JAXDISTILL_TRACEBACK", "1")
    got, err = guarded(error)
    assert got == code and said in err and "Traceback" in err and "in run" in err, err


def test_a_line_is_one_whatever_is_in_it():
    _, err = guarded(UserError("config.x='a\n\x1b[2Jb': must be " + "y" * 100_000 + " and not z"))
    assert err.count("\n") == 1 and "\x1b" not in err and len(err) < 1_100
    assert "config.x='a" in err and err.endswith("y and not z\n")


def test_an_exit_is_no_error():
    with pytest.raises(SystemExit, match="3"):
        guarded(SystemExit(3))


def test_every_command_says_what_takes_less_memory():
    assert all(command.LESS_MEMORY for command in cli.COMMANDS.values())


def test_a_place_in_a_file_is_one_line_whatever_its_keys_are():
    assert place_in(("weight_map", 0, "x")) == "weight_map.0.x" and place_in(()) == "the whole"
    assert place_in(("weight_map", "\n")) == "weight_map. " and len(place_in(("y" * 9_999,))) < 1_010
