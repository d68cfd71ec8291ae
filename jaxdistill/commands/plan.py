"""`jaxdistill plan`: what a training step costs, on the devices here or on a TPU slice that need not be present."""

import argparse

HELP = "show what a training step costs, before a machine is rented"
TAKES_CONFIG = True
LESS_MEMORY = "plan for a larger slice, or lower config.train.batch_size"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="recipe; --config.KEY=VALUE works as for train")
    parser.add_argument(
        "--topology", default="", help="compile for a TPU slice such as v5e:2x4; default: the devices here"
    )


def main(flags: argparse.Namespace, overrides: list[str]) -> None:
    from jaxdistill.cost.plan import plan

    for line in plan(flags.config, overrides, topology=flags.topology):
        print(line)
