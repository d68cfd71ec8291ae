"""`jaxdistill export`: writes the student of a run as a Hugging Face folder."""

import argparse
from pathlib import Path

from jaxdistill.console import LOADING, say, show, taking

HELP = "write the student of a run as a Hugging Face folder"
TAKES_CONFIG = False
LESS_MEMORY = "export on a machine with more memory"
INTERRUPTED = "no folder was written"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the run")
    parser.add_argument("--step", default="last", help="checkpoint: a step, best or last; default: %(default)s")
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument("--to-pytorch", dest="to", action="store_const", const="pytorch", help="write model.safetensors")
    form.add_argument("--to-flax", dest="to", action="store_const", const="flax", help="write flax_model.msgpack")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; it must not exist")
    parser.add_argument("--json", action="store_true", help="print step, folder and figures as JSON")


def main(flags: argparse.Namespace, overrides: list[str]) -> None:
    with taking(LOADING):
        from jaxdistill.run.best import step_named
        from jaxdistill.run.export import export_run

    step = step_named(flags.workdir, flags.step)
    exported = export_run(flags.workdir, flags.out, to=flags.to, report=say, step=step)
    values = {"step": exported.step, "folder": str(exported.out), "figures": exported.figures}
    show([str(exported)], values, as_json=flags.json)
