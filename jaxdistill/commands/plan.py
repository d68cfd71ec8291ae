"""`jaxdistill plan`: what a training step costs on devices here, or on a TPU slice that is not here."""

import argparse

HELP = "what a step costs, before a machine is rented"
TAKES_CONFIG = True


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="recipe; --config.KEY=VALUE as for train")
    parser.add_argument(
        "--topology", default="", help="compile for a TPU slice such as v5e:2x4; default the devices here"
    )


def main(flags: argparse.Namespace, overrides: list[str]) -> None:
    from jaxdistill.cost.plan import plan

    plan(flags.config, overrides, topology=flags.topology)
