"""`jaxdistill evaluate`: measures the student of a run, or any other model, on held-out text."""

import argparse
import json
from pathlib import Path

from jaxdistill import files, processes
from jaxdistill.console import LOADING, say, show, taking
from jaxdistill.errors import UserError
from jaxdistill.run import mirror

HELP = "measure the student of a run, or any model, on held-out text"
TAKES_CONFIG = True
LESS_MEMORY = "lower config.evaluate.batch_size"
INTERRUPTED = "nothing was changed; --metrics with fewer names takes less time"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", type=mirror.folder, help="folder of the run")
    parser.add_argument("--step", default="last", help="checkpoint: a step, best or last; default: %(default)s")
    parser.add_argument(
        "--model",
        help="measure this model instead: a folder, a run folder or a name on the hub, on the text and the masks of "
        "the run in --workdir or of the recipe in --config",
    )
    parser.add_argument("--revision", default="", help="of --model: branch, tag or commit on the hub")
    parser.add_argument("--config", default="", help="with --model: recipe; --config.KEY=VALUE works as for train")
    parser.add_argument(
        "--metrics", help="some of perplexity,agreement,pseudo_perplexity,rouge; default: as in the run"
    )
    parser.add_argument(
        "--predictions", type=Path, help="with rouge: write prompts, completions and references to this JSON file"
    )
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="print the figures as JSON, or write them to FILE too"
    )
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read the teacher's pytorch_model.bin, with torch's weights_only"
    )


def main(flags: argparse.Namespace, overrides: list[str]) -> None:
    _check(flags)
    with taking(LOADING):
        from jaxdistill import recipe
        from jaxdistill.jobs import measure
        from jaxdistill.run.best import step_named

    if flags.workdir:
        mirror.fetch(flags.workdir)
    common = {
        "metrics": flags.metrics.split(",") if flags.metrics else None,
        "allow_pickle": flags.allow_pickle,
        "report": say,
        "predictions": flags.predictions,
    }
    if flags.model:
        config = (
            recipe.read(flags.config, overrides) if flags.config else measure.config_of_run(flags.workdir, overrides)
        )
        figures = measure.evaluate_model(flags.model, config, revision=flags.revision, **common)
    else:
        step = step_named(flags.workdir, flags.step)
        figures = measure.evaluate(flags.workdir, step=step, overrides=overrides, **common)
    if flags.json not in (None, "-") and processes.is_first():
        path = Path(flags.json)
        with files.writing(path):
            files.write_text(path, json.dumps(figures, indent=2) + "\n")
    lines = (f"{name:20} {value:.6g}" for name, value in figures.items())
    show(lines, figures, as_json=flags.json == "-")


def _check(flags: argparse.Namespace) -> None:
    """Checks that the flags say what to measure, and on what."""
    if flags.model:
        if bool(flags.workdir) == bool(flags.config):
            raise UserError("--model is measured on the text of a run or of a recipe: give --workdir or --config")
        if flags.step != "last":
            raise UserError(f"--step {flags.step} is of the run in --workdir, and --model is measured; leave one out")
    elif not flags.workdir or flags.config or flags.revision:
        raise UserError("--workdir RUN measures the student of a run; --model FOLDER --config RECIPE any other model")
