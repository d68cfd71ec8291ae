"""What a command says, on standard error, and what it results in, on standard output."""

import json
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

PATIENCE = 2.0  # seconds of silence

LOADING = "loading the libraries"


def say(line: str) -> None:
    """Prints a line for the user, at once. It is no result, so it stays out of what a script reads."""
    print(line, file=sys.stderr, flush=True)


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


def show(lines: Iterable[str], values: Any, *, as_json: bool) -> None:
    """Prints the result of a command: lines for people, or values for a script."""
    if as_json:
        print(json.dumps(values, indent=2))
        return
    for line in lines:
        print(line)
