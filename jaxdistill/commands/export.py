"""`jaxdistill export`: writes the student of a run as a Hugging Face folder."""

import argparse

from jaxdistill import processes
from jaxdistill.console import LOADING, say, show, taking
from jaxdistill.errors import UserError
from jaxdistill.run import mirror

HELP = "write the student of a run as a Hugging Face folder, and send it to the hub"
TAKES_CONFIG = False
LESS_MEMORY = "export on a machine with more memory"
INTERRUPTED = "no folder was written"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, type=mirror.folder, help="folder of the run")
    parser.add_argument("--step", default="last", help="checkpoint: a step, best or last; default: %(default)s")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--to-pytorch", dest="to", action="store_const", const="pytorch", help="write model.safetensors")
    form.add_argument("--to-flax", dest="to", action="store_const", const="flax", help="write flax_model.msgpack")
    parser.add_argument("--out", type=mirror.folder, help="folder to write; it must not exist")
    parser.add_argument(
        "--push",
        metavar="USER/NAME",
        help="send the folder to this repository of the hub, with the token of `hf auth login` or HF_TOKEN; a new one "
        "is private, and without --out the folder is not kept here",
    )
    parser.add_argument("--public", action="store_true", help="with --push: a new repository is public")
    parser.add_argument("--dry-run", action="store_true", help="with --push: show what would go, and send nothing")
    parser.add_argument("--json", action="store_true", help="print step, folder and figures as JSON")


def main(flags: argparse.Namespace, overrides: list[str]) -> None:
    _check(flags)
    if not processes.is_first():  # a folder is written by one, which reads the checkpoint by itself
        return
    with taking(LOADING):
        from jaxdistill.export.push import Target
        from jaxdistill.run.best import step_named
        from jaxdistill.run.export import export_run, push_run

    mirror.fetch(flags.workdir)
    if flags.out:
        mirror.check_empty(flags.out)
    step = step_named(flags.workdir, flags.step)
    if flags.push:
        target = Target(flags.push, private=not flags.public)
        pushed = push_run(
            flags.workdir, target, out=flags.out, to=flags.to or "pytorch", step=step, dry_run=flags.dry_run, report=say
        )
        if flags.out:
            mirror.send(flags.out)
        values = {"step": pushed.exported.step, "address": pushed.address, "files": dict(pushed.files)}
        show(pushed.lines(), values | {"figures": pushed.exported.figures}, as_json=flags.json)
        return
    exported = export_run(flags.workdir, flags.out, to=flags.to, report=say, step=step)
    mirror.send(flags.out)
    values = {"step": exported.step, "folder": str(exported.out), "figures": exported.figures}
    show([str(exported)], values, as_json=flags.json)


def _check(flags: argparse.Namespace) -> None:
    """Checks that the flags say where the folder goes, and in which form."""
    if not flags.push and (flags.public or flags.dry_run):
        raise UserError("--public and --dry-run are of --push USER/NAME; give it, or leave them out")
    if not flags.push and not flags.out:
        raise UserError("give --out DIR, a folder to write, or --push USER/NAME, a repository of the hub, or both")
    if not flags.push and not flags.to:
        raise UserError("give the format of the weights: --to-pytorch or --to-flax")
