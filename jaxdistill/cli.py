"""The entry point `jaxdistill COMMAND`: `train`, and a file in commands/ for every other command."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from jaxdistill import __version__, cluster, processes, train
from jaxdistill.arguments import Parser, did_you_mean, parse
from jaxdistill.commands import (
    cache,
    completion,
    doctor,
    evaluate,
    export,
    generate,
    init_student,
    neighbours,
    plan,
    prepare,
    recipes,
    report,
    settings,
)
from jaxdistill.console import named
from jaxdistill.files import named_path
from jaxdistill.run.stop import interruptible

# A command is a file with HELP, TAKES_CONFIG (whether it accepts --config.KEY=VALUE), LESS_MEMORY (which values to
# change where memory runs out), INTERRUPTED (what Ctrl-C leaves behind), add_flags and main.
COMMANDS: dict[str, ModuleType] = {
    "prepare": prepare,
    "cache": cache,
    "init-student": init_student,
    "evaluate": evaluate,
    "export": export,
    "plan": plan,
    "generate": generate,
    "neighbours": neighbours,
    "recipes": recipes,
    "settings": settings,
    "doctor": doctor,
    "completion": completion,
    "report": report,
}

# Commands that several processes can run together; `train` is another one.
TOGETHER = ("cache", "evaluate", "export", "generate", "init-student")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that is named in `argv` (default: the program's arguments), and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["train"]:
        return train.main(argv[1:])
    parser, parsers = make_parsers()
    name = argv[0] if argv else ""
    if name.startswith("-"):
        parse(parser, argv, takes_config=False)  # --help and --version end here
    if name not in COMMANDS:
        wrong = f"unknown command {name!r}{did_you_mean(name, parsers)}" if name else "name a command, such as train"
        parser.error(wrong)
    command = COMMANDS[name]
    if name not in TOGETHER and (flag := cluster.flag_in(argv)):
        parsers[name].error(f"{flag} is for several processes, and {name} is run by one; start it once, without it")
    flags, overrides = parse(parsers[name], argv[1:], takes_config=command.TAKES_CONFIG)

    def run() -> None:
        with interruptible(f"interrupted; {command.INTERRUPTED}"):
            _name_paths(flags)
            if name in TOGETHER:
                processes.join(cluster.cluster_of(flags))
                _check_alike(flags, overrides)
            command.main(flags, overrides)
            processes.wait("end")

    return train.guarded(run, less_memory=command.LESS_MEMORY, interrupted=command.INTERRUPTED)


def make_parsers() -> tuple[Parser, Mapping[str, argparse.ArgumentParser]]:
    """The parser of the program, and that of each command by name."""
    parser = Parser(prog="jaxdistill", description="Distils large transformer language models into small ones.")
    parser.add_argument("--version", action="version", version=__version__)
    parsers = parser.add_subparsers(dest="command", required=True)
    parsers.add_parser("train", help="distil a student, or resume a run", add_help=False)
    for name, command in COMMANDS.items():
        own = parsers.add_parser(
            name,
            help=command.HELP,
            description=f"{command.HELP[0].upper()}{command.HELP[1:]}.",
            epilog=train.CONFIG_HELP if command.TAKES_CONFIG else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=not command.TAKES_CONFIG,
        )
        command.add_flags(own)
        if name in TOGETHER:
            cluster.add_flags(own)
    all_of_them = {**parsers.choices, "train": train.make_parser()}
    parsers.choices["completion"].set_defaults(parsers=all_of_them)
    return parser, all_of_them


def _check_alike(flags: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Checks that all processes were started with the same command and packages.

    Raises:
      UserError: in all processes; names what differs.
    """
    given = {f"--{name.replace('_', '-')}": named(str(value)) for name, value in vars(flags).items()}
    values = {name: given[name] for name in given if name not in cluster.FLAGS} | {"settings": " ".join(overrides)}
    advice = "start all processes with the same command and the same packages"
    processes.check_same("flags", {**processes.versions(), **values}, advice=advice)


def _name_paths(flags: argparse.Namespace) -> None:
    """Replaces ~ in all flags that are paths, which a shell does not do in --out=~/student.

    Raises:
      UserError: no file can have such a name.
    """
    for name, value in vars(flags).items():
        if isinstance(value, Path):
            setattr(flags, name, named_path(str(value), key=f"--{name.replace('_', '-')}"))


if __name__ == "__main__":
    sys.exit(main())
