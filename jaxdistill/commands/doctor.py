"""`jaxdistill doctor`: what is installed and usable here, and what the losses of a recipe ask of the student."""

import argparse

from jaxdistill.console import LOADING, show, taking
from jaxdistill.errors import UserError

HELP = "show what is installed and usable, and the gradients of a recipe's losses"
TAKES_CONFIG = True
LESS_MEMORY = "set a larger config.train.accumulation: the gradients are of one micro-batch"
INTERRUPTED = "nothing was changed"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", default="", help="recipe whose losses are measured, as for train; default: the machine alone"
    )
    parser.add_argument("--batches", type=int, default=4, help="batches of the recipe's text; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--allow-pickle", action="store_true", help="read pytorch_model.bin, with torch's weights_only")


def main(flags: argparse.Namespace, overrides: list[str]) -> None:
    with taking(LOADING):
        from jaxdistill import recipe
        from jaxdistill.jobs.doctor import examine
        from jaxdistill.jobs.gradients import gradients

    if flags.config:
        config = recipe.read(flags.config, overrides)
        measured = gradients(config, batches=flags.batches, allow_pickle=flags.allow_pickle)
        show(measured.lines(), measured.results(), as_json=flags.json)
        return
    if overrides:
        raise UserError(f"{overrides[0]} is of a recipe; name one with --config")
    findings = []
    for one in examine():
        findings.append(one)
        if not flags.json:
            mark = {"ok": " ", "note": "~", "fix": "!"}[one.verdict]
            print(f"{mark} {one.what:19} {one.found}{f' ({one.advice})' if one.advice else ''}", flush=True)
    if flags.json:
        show((), [one._asdict() for one in findings], as_json=True)
    if wrong := [one.what for one in findings if one.verdict == "fix"]:
        raise UserError(f"{len(wrong)} to fix: {', '.join(dict.fromkeys(wrong))}; the lines that begin with ! say how")
