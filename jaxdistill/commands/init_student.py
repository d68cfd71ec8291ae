"""`jaxdistill init-student`: cuts a student out of a teacher, or searches for the layers to keep, without training."""

import argparse
from pathlib import Path

HELP = "cut a student out of a teacher"
TAKES_CONFIG = False


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", required=True, help="folder or hub name")
    parser.add_argument("--revision", default="", help="branch, tag or commit of the hub name")
    parser.add_argument(
        "--layers",
        required=True,
        help="0,2,4 | a count, spread evenly | every_other | first:N | last:N | search:N, which needs --text; "
        "without :N half of the layers",
    )
    parser.add_argument("--text", default="", help="file whose lines score the candidate layers of a search")
    parser.add_argument("--family", default="", help="distilbert: a DistilBERT out of a BERT; default the teacher's")
    parser.add_argument("--reference-init", action="store_true", help="DistilBERT as the reference scripts made it")
    parser.add_argument("--seed", type=int, default=0, help="seed of the transform that --reference-init draws")
    parser.add_argument("--allow-pickle", action="store_true", help="read pytorch_model.bin, with torch's weights_only")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; must not exist")


def main(flags: argparse.Namespace, overrides: list[str]) -> None:
    from jaxdistill.run.cut import Cut, init_student

    cut = Cut(
        teacher=flags.teacher,
        layers=flags.layers,
        revision=flags.revision,
        text=flags.text,
        family=flags.family,
        reference_init=flags.reference_init,
        seed=flags.seed,
    )
    init_student(cut, flags.out, allow_pickle=flags.allow_pickle, tell=print)
