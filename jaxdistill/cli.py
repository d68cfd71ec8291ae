"""The entry point `jaxdistill COMMAND`: `train`, and a file in commands/ for every other command."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from jaxdistill import __version__, processes, train
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
TOGETHER = ("evaluate", "export", "generate", "init-student")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that is named in `argv` (default: the program's arguments), and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["train"]:
        return train.main(argv[1:])
    parser = argparse.ArgumentParser(
        prog="jaxdistill", description="Distils large transformer language models into small ones."
    )
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
            processes.add_flags(own)
    parser.set_defaults(parsers={**parsers.choices, "train": train.make_parser()})  # for `completion`
    flags, overrides = parser.parse_known_args(argv)
    command = COMMANDS[flags.command]
    if overrides and not command.TAKES_CONFIG:
        parser.error(f"unknown argument {overrides[0]!r}")

    def run() -> None:
        with interruptible(f"interrupted; {command.INTERRUPTED}"):
            _name_paths(flags)
            if flags.command in TOGETHER:
                processes.join(processes.cluster_of(flags))
            command.main(flags, overrides)
            processes.wait("end")

    return train.guarded(run, less_memory=command.LESS_MEMORY, interrupted=command.INTERRUPTED)


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
