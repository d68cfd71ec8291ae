"""`jaxdistill prepare`: tokenises the text of a recipe ahead of time, and prints the folder for `data.prepared`."""

import argparse

from jaxdistill.console import LOADING, say, taking

HELP = "tokenise the text of a recipe ahead of time"
TAKES_CONFIG = True
LESS_MEMORY = "lower config.data.max_document_bytes"
INTERRUPTED = "no text was left half prepared; the same command begins again"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="recipe; --config.KEY=VALUE works as for train")


def main(flags: argparse.Namespace, overrides: list[str]) -> None:
    with taking(LOADING):
        from jaxdistill import recipe
        from jaxdistill.jobs.prepare import prepare

    print(prepare(recipe.read(flags.config, overrides), report=say))
