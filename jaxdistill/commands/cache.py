"""`jaxdistill cache`: runs the teacher once over a recipe's text, and keeps its answers for `teacher.cache`."""

import argparse
from pathlib import Path

from jaxdistill.console import LOADING, say, show, taking

HELP = "run the teacher once over the text, and keep its answers for teacher.cache"
TAKES_CONFIG = True
LESS_MEMORY = "lower config.train.batch_size, or raise config.train.accumulation or config.mesh.fsdp"
INTERRUPTED = "the answers so far are kept; the same command goes on with the rest"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="recipe; its section `cache` says what is kept")
    parser.add_argument("--out", required=True, type=Path, help="folder of the cache; one that is there is added to")
    parser.add_argument("--allow-pickle", action="store_true", help="read pytorch_model.bin, with torch's weights_only")
    parser.add_argument("--json", action="store_true", help="print folder, numbers and bytes as JSON")


def main(flags: argparse.Namespace, overrides: list[str]) -> None:
    with taking(LOADING):
        from jaxdistill import recipe
        from jaxdistill.jobs.cache import make_cache

    made = make_cache(recipe.read(flags.config, overrides), flags.out, allow_pickle=flags.allow_pickle, report=say)
    show(made.lines(), made.values(), as_json=flags.json)
