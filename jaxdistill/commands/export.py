"""`jaxdistill export`: writes a run's student as a Hugging Face folder."""

import argparse
from pathlib import Path

HELP = "write a run's student as a Hugging Face folder"
TAKES_CONFIG = False


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the run")
    parser.add_argument("--step", type=int, help="checkpoint; default the last")
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument("--to-pytorch", dest="to", action="store_const", const="pytorch", help="model.safetensors")
    form.add_argument("--to-flax", dest="to", action="store_const", const="flax", help="flax_model.msgpack")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; must not exist")


def main(flags: argparse.Namespace, overrides: list[str]) -> None:
    from jaxdistill.run.export import export_run

    export_run(flags.workdir, flags.out, to=flags.to, tell=print, step=flags.step)
