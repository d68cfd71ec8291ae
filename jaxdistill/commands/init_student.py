"""`jaxdistill init-student`: cuts a student out of a teacher without training, with a search for its layers."""

import argparse
from pathlib import Path

from jaxdistill.arguments import add_mesh_flags
from jaxdistill.console import LOADING, say, show, taking

HELP = "cut a student out of a teacher, without training"
TAKES_CONFIG = False
LESS_MEMORY = "raise --fsdp or --tensor where there are several devices, or use a machine with more memory"
INTERRUPTED = "no folder was written"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", required=True, help="folder, or name on the Hugging Face hub")
    parser.add_argument("--revision", default="", help="branch, tag or commit on the hub")
    parser.add_argument(
        "--layers",
        default="",
        help="layers to keep: 0,2,4 | a count, spread evenly | every_other | first:N | last:N | search:N, which needs "
        "--text; without :N, half of the layers; default: all, where other sizes are given",
    )
    parser.add_argument("--width", type=int, default=0, help="channels to keep, those with the largest activations")
    parser.add_argument("--inner", type=int, default=0, help="units of each MLP to keep, by the same measure")
    parser.add_argument("--heads", type=int, default=0, help="heads of each layer to keep, by the same measure")
    parser.add_argument(
        "--text", default="", help="text file on which layers are searched and sizes are chosen; one text a line"
    )
    parser.add_argument(
        "--family", default="", help="distilbert cuts a DistilBERT out of a BERT; default: the teacher's"
    )
    parser.add_argument(
        "--reference-init", action="store_true", help="initialise a DistilBERT as its reference scripts do"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the transform that --reference-init draws")
    parser.add_argument("--allow-pickle", action="store_true", help="read pytorch_model.bin, with torch's weights_only")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; it must not exist")
    add_mesh_flags(parser)
    parser.add_argument("--json", action="store_true", help="print layers, folder and scores as JSON")


def main(flags: argparse.Namespace, overrides: list[str]) -> None:
    with taking(LOADING):
        from jaxdistill.jobs.cut import Cut, init_student
        from jaxdistill.step.sharding import mesh_of_flags

    cut = Cut(
        teacher=flags.teacher,
        layers=flags.layers,
        revision=flags.revision,
        text=flags.text,
        family=flags.family,
        reference_init=flags.reference_init,
        seed=flags.seed,
        width=flags.width,
        inner=flags.inner,
        heads=flags.heads,
    )
    mesh = mesh_of_flags(fsdp=flags.fsdp, tensor=flags.tensor)
    made = init_student(cut, flags.out, allow_pickle=flags.allow_pickle, report=say, mesh=mesh)
    show(made.lines(), made.values(), as_json=flags.json)
