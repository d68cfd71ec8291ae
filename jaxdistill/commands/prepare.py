"""`jaxdistill prepare`: tokenises a recipe's text ahead of time and prints the folder for `data.prepared`."""

import argparse

HELP = "tokenise a recipe's text ahead of time"
TAKES_CONFIG = True


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="recipe; --config.KEY=VALUE as for train")


def main(flags: argparse.Namespace, overrides: list[str]) -> None:
    from jaxdistill import recipe
    from jaxdistill.run.prepare import prepare

    print(prepare(recipe.read(flags.config, overrides), tell=print))
