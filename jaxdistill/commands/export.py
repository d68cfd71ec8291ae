"""`jaxdistill export`: writes the student of a run as a Hugging Face folder."""

import argparse
from pathlib import Path

HELP = "write the student of a run as a Hugging Face folder"
TAKES_CONFIG = False
LESS_MEMORY = "export on a machine with more memory"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the run")
    parser.add_argument("--step", type=int, help="step of the checkpoint; default: the last checkpoint")
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument("--to-pytorch", dest="to", action="store_const", const="pytorch", help="write model.safetensors")
    form.add_argument("--to-flax", dest="to", action="store_const", const="flax", help="write flax_model.msgpack")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; it must not exist")


def main(flags: argparse.Namespace, overrides: list[str]) -> None:
    from jaxdistill.run.export import export_run

    export_run(flags.workdir, flags.out, to=flags.to, report=print, step=flags.step)
