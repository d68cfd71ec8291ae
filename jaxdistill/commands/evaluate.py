"""`jaxdistill evaluate`: measures a checkpoint of a run on held-out text."""

import argparse
import json
from pathlib import Path

from jaxdistill import files

HELP = "measure a run's student on held-out text"
TAKES_CONFIG = True


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the run")
    parser.add_argument("--step", type=int, help="checkpoint; default the last")
    parser.add_argument("--metrics", help="of perplexity,agreement,pseudo_perplexity,rouge; default the run's")
    parser.add_argument("--predictions", type=Path, help="with rouge: prompts, completions and references, as JSON")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--allow-pickle", action="store_true", help="for the teacher")


def main(flags: argparse.Namespace, overrides: list[str]) -> None:
    from jaxdistill.run.measure import evaluate

    figures = evaluate(
        flags.workdir,
        step=flags.step,
        metrics=flags.metrics.split(",") if flags.metrics else None,
        overrides=overrides,
        allow_pickle=flags.allow_pickle,
        tell=print,
        predictions=flags.predictions,
    )
    if flags.json:
        with files.writing(flags.json):
            files.write_text(flags.json, json.dumps(figures, indent=2) + "\n")
    for name, value in figures.items():
        print(f"{name:20} {value:.6g}")
