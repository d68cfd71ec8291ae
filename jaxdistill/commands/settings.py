"""`jaxdistill settings`: prints settings with their defaults, rules and explanations."""

import argparse
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

from jaxdistill.console import LOADING, show, taking

HELP = "print the settings of a run, all of them or those about a word"
TAKES_CONFIG = False
LESS_MEMORY = "close other programs"
INTERRUPTED = "nothing was changed"

_WIDEST = 120  # letters of a line, as longer ones are hard to read
_MARKS = {
    "content": "may name another place of the same content when a run is resumed",
    "length": "may change when a run is resumed, where no trained step depends on it",
    True: "may change when a run is resumed",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("word", nargs="?", default="", help="part of a name or of an explanation, such as temperature")
    parser.add_argument("--json", action="store_true", help="print key, default, rule and explanation as JSON")


def main(flags: argparse.Namespace, overrides: list[str]) -> None:
    with taking(LOADING):
        from jaxdistill.reference import settings

    found = settings(flags.word)
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    lines = (line for setting in found for line in _lines(setting, width))
    show(lines, [setting._asdict() for setting in found], as_json=flags.json)


def _lines(setting: Any, width: int) -> Iterator[str]:
    """--config.KEY=DEFAULT, and below it what it means, in lines of the terminal's width."""
    yield f"--config.{setting.key}={_as_flag(setting.default)}"
    rule = f" It {setting.rule}." if setting.rule else ""
    mark = f" It {_MARKS[setting.resumable]}." if setting.resumable else ""
    yield from textwrap.wrap(
        f"{setting.explanation}{rule}{mark}", width, initial_indent="    ", subsequent_indent="    "
    )
    yield ""


def _as_flag(value: Any) -> str:
    """A value as it is typed in a shell."""
    return f'"{value!r}"' if isinstance(value, tuple | dict) else str(value)
