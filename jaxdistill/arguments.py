"""Flags on the command line: a mistake in them is one line, as every other mistake of a user."""

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import NoReturn

_SETTING = "--config."


class Parser(argparse.ArgumentParser):
    """As argparse's own, which prints up to ten lines of usage before what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; `{self.prog} --help` explains the flags\n")


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str], *, takes_config: bool
) -> tuple[argparse.Namespace, list[str]]:
    """(flags, `--config.KEY=VALUE` arguments). Exits with code 2 and a line that names the first wrong argument.

    Args:
      takes_config: whether the command takes `--config.KEY=VALUE`.
    """
    known = [name for action in parser._actions for name in action.option_strings]  # argparse has no public list
    for name in _flags_of(argv):
        # Before argparse, which says that --config is missing where --confg was meant.
        if name.startswith(_SETTING):
            continue
        abbreviates = parser.allow_abbrev and sum(one.startswith(name) for one in known) == 1
        if name not in known and not abbreviates:
            near = did_you_mean(name, known)
            parser.error(
                f"unknown flag {name!r}{near}"
                + (f"; settings are given as {_SETTING}KEY=VALUE" if takes_config and not near else "")
            )
    flags, rest = parser.parse_known_args(argv)
    for argument in rest:
        if not argument.startswith(_SETTING):
            parser.error(f"unknown argument {argument!r}")
        if not takes_config:
            parser.error(f"unknown argument {argument!r}: this command has no settings")
        if "=" not in argument:
            parser.error(f"{argument!r} has no value: settings are given as {_SETTING}KEY=VALUE")
    return flags, rest


def add_mesh_flags(parser: argparse.ArgumentParser) -> None:
    """How a command without a config splits a model over devices; step/sharding.py makes the mesh."""
    group = parser.add_argument_group("several devices", "All devices share the rows of text.")
    group.add_argument("--fsdp", metavar="N", type=int, default=1, help="devices that split the parameters")
    group.add_argument("--tensor", metavar="N", type=int, default=1, help="devices that split heads and inner units")


def comma_separated(text: str) -> list[str]:
    """The words of a flag, without the spaces around them."""
    return [word.strip() for word in text.split(",")]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What stands in a message after a name that is not known; empty where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _flags_of(argv: Sequence[str]) -> list[str]:
    """The names of the flags among arguments, as argparse tells them from values."""
    before = argv[: argv.index("--")] if "--" in argv else argv
    names = [argument.partition("=")[0] for argument in before if re.match(r"--|-[a-zA-Z]", argument)]
    return [name for name in names if " " not in name]
