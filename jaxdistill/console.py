"""What a command says, on standard error, and what it results in, on standard output."""

import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

PATIENCE = 2.0  # seconds of silence

LOADING = "loading the libraries"


_shown: dict[str, str] = {}  # text -> what people read in its place


def show_as(text: str, name: str) -> None:
    """From here on, shows a name in the place of a text, such as that of a temporary folder."""
    _shown[text] = name


def named(line: str) -> str:
    """A line as people read it."""
    for text, name in _shown.items():
        line = line.replace(text, name)
    return line


_is_quiet = False  # of several processes, all but the first: nobody reads the same line many times


def quiet() -> None:
    """From here on, this process says how it ends, and nothing else."""
    global _is_quiet
    _is_quiet = True


def say(line: str) -> None:
    """Prints a line for the user, at once. It is no result, so it stays out of what a script reads."""
    if not _is_quiet:
        say_last(line)


def say_last(line: str) -> None:
    """As `say`, for the line that a process ends with."""
    print(named(line), file=sys.stderr, flush=True)


def say_at_once(line: str) -> None:
    """Past sys.stderr, whose lock the interrupted thread may hold; on a terminal over the progress bar."""
    start = "\r\x1b[2K\x1b[?25h" if os.isatty(2) else ""
    os.write(2, f"{start}{named(line)}\n".encode())


def is_live() -> bool:
    """Whether somebody watches standard error as it changes: a terminal, which is not dumb and not that of a CI job.

    Only there a line may be drawn again and again. Colours are another question, which rich answers by NO_COLOR.
    """
    watched = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    return watched and os.environ.get("CI", "").lower() in ("", "0", "false")


@contextmanager
def taking(what: str) -> Iterator[None]:
    """Says what the block does, if it takes long enough for a user to wonder."""
    timer = threading.Timer(PATIENCE, say, [f"{what} ..."])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def counted(items: Sequence[T], what: str, *, unit: str) -> Iterator[T]:
    """The items, while a line says how many are done: "measuring: 12 of 40 batches, 2 min left".

    Nothing is said in the first seconds. Where somebody watches, one line is drawn again and again, and then removed;
    elsewhere there is a line after 2, 4, 8, 16 ... seconds, so that the log of a long night stays short.
    """
    began = time.monotonic()
    due, drawn = began + PATIENCE, False
    for done, item in enumerate(items):
        now = time.monotonic()
        if now >= due and done:
            left = _duration((now - began) * (len(items) - done) / done)
            line = f"{what}: {done:,} of {len(items):,} {unit}, {left} left"
            if drawn := _draws():
                print(f"\r\x1b[2K{line}", end="", file=sys.stderr, flush=True)
            else:
                say(line)
            due = now + (0.2 if drawn else now - began)
        yield item
    if drawn:
        print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


def _draws() -> bool:
    """Whether a line may be drawn over itself here: not where a progress bar of rich has taken standard error."""
    return is_live() and not _is_quiet and sys.stderr is sys.__stderr__


def _duration(seconds: float) -> str:
    if seconds < 5400:
        return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def show(lines: Iterable[str], values: Any, *, as_json: bool) -> None:
    """Prints the result of a command: lines for people, or values for a script."""
    if as_json:
        print(named(json.dumps(values, indent=2)))
        return
    for line in lines:
        print(named(line))
