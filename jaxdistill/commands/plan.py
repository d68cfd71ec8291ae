"""`jaxdistill plan`: what a training step costs, on the devices here or on a TPU slice that need not be present."""

import argparse
import json

from jaxdistill.console import LOADING, taking

HELP = "show what a training step costs, before a machine is rented"
TAKES_CONFIG = True
LESS_MEMORY = "plan for a larger slice, or lower config.train.batch_size"
INTERRUPTED = "nothing was changed"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="recipe; --config.KEY=VALUE works as for train")
    parser.add_argument(
        "--topology", default="", help="compile for a TPU slice such as v5e:2x4; default: the devices here"
    )
    parser.add_argument(
        "--whole", action="store_true", help="compile all layers of deep models; default: few of them, and a line"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, in bytes, seconds and numbers")


def main(flags: argparse.Namespace, overrides: list[str]) -> None:
    with taking(LOADING):
        from jaxdistill.cost.plan import plan

    values = {}
    for line, figures in plan(flags.config, overrides, topology=flags.topology, whole=flags.whole):
        values |= figures
        if not flags.json:
            print(line, flush=True)
    if flags.json:
        print(json.dumps(values, indent=2))
