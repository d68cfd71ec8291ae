"""`jaxdistill evaluate`: measures the student of a run on held-out text."""

import argparse
import json
from pathlib import Path

from jaxdistill import files

HELP = "measure the student of a run on held-out text"
TAKES_CONFIG = True
LESS_MEMORY = "lower config.evaluate.batch_size"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the run")
    parser.add_argument("--step", type=int, help="step of the checkpoint; default: the last checkpoint")
    parser.add_argument(
        "--metrics", help="some of perplexity,agreement,pseudo_perplexity,rouge; default: as in the run"
    )
    parser.add_argument(
        "--predictions", type=Path, help="with rouge: write prompts, completions and references to this JSON file"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this JSON file")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read the teacher's pytorch_model.bin, with torch's weights_only"
    )


def main(flags: argparse.Namespace, overrides: list[str]) -> None:
    from jaxdistill.run.measure import evaluate

    figures = evaluate(
        flags.workdir,
        step=flags.step,
        metrics=flags.metrics.split(",") if flags.metrics else None,
        overrides=overrides,
        allow_pickle=flags.allow_pickle,
        report=print,
        predictions=flags.predictions,
    )
    if flags.json:
        with files.writing(flags.json):
            files.write_text(flags.json, json.dumps(figures, indent=2) + "\n")
    for name, value in figures.items():
        print(f"{name:20} {value:.6g}")
