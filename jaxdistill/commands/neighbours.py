"""`jaxdistill neighbours`: the nearest words of some words, in the models of a run or in any models."""

import argparse
from pathlib import Path

from jaxdistill.arguments import comma_separated
from jaxdistill.console import LOADING, say, show, taking
from jaxdistill.errors import UserError

HELP = "show the nearest words of some words, in teacher, student and a base model"
TAKES_CONFIG = False
LESS_MEMORY = "compare fewer models at a time"
INTERRUPTED = "nothing was changed"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, help="folder of a run: compares its teacher and its student")
    parser.add_argument("--step", default="last", help="with --run: a step, best or last; default: %(default)s")
    parser.add_argument("--base", default="", help="with --run: a third model, such as what the teacher was made from")
    parser.add_argument(
        "--model", action="append", default=[], help="folder, run folder or hub name; may be given several times"
    )
    parser.add_argument("--words", required=True, type=comma_separated, help="words, separated by commas")
    parser.add_argument("--top", type=int, default=5, help="words to show for each word; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print words and cosines as JSON")
    parser.add_argument("--allow-pickle", action="store_true", help="read pytorch_model.bin, with torch's weights_only")


def main(flags: argparse.Namespace, overrides: list[str]) -> None:
    _check(flags)
    with taking(LOADING):
        from jaxdistill.jobs.neighbours import compare_neighbours, models_of_run

    models = models_of_run(flags.run, flags.base) if flags.run else {name: name for name in flags.model}
    table = compare_neighbours(
        models,
        flags.words,
        top=flags.top,
        step=flags.step,
        allow_pickle=flags.allow_pickle,
        report=say,
    )
    show(table.lines(), table.values(), as_json=flags.json)


def _check(flags: argparse.Namespace) -> None:
    """Checks that the flags say which models to compare."""
    if bool(flags.run) == bool(flags.model):
        raise UserError("give the models to compare: either --run RUN, or --model MODEL once or several times")
    if flags.model and (flags.base or flags.step != "last"):
        raise UserError("--base and --step are of --run; with --model, name every model by a --model of its own")
