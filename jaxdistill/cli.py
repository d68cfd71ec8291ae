"""`jaxdistill train | prepare | init-student | evaluate | export | plan | generate`.

Imports of weight wait until a command runs.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxdistill import __version__, files, train


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["train"]:
        return train.main(argv[1:])
    parser = argparse.ArgumentParser(prog="jaxdistill", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("train", help="distil, or resume, one run", add_help=False)

    prepare = commands.add_parser("prepare", help="tokenise a recipe's text ahead of time", allow_abbrev=False)
    prepare.add_argument("--config", required=True, help="recipe; --config.key=value as for train")

    student = commands.add_parser("init-student", help="cut a student out of a teacher")
    student.add_argument("--teacher", required=True, help="folder or hub name")
    student.add_argument("--revision", default="", help="of the hub name")
    student.add_argument(
        "--layers",
        required=True,
        help="0,2,4 | a count, spread evenly | every_other | first:N | last:N | search:N, which needs --text; "
        "without :N half of the layers",
    )
    student.add_argument("--text", default="", help="lines that a search scores the candidate layers on")
    student.add_argument("--family", default="", help="distilbert: a DistilBERT out of a BERT; default the teacher's")
    student.add_argument("--reference-init", action="store_true", help="DistilBERT as the reference scripts made it")
    student.add_argument("--seed", type=int, default=0, help="of the transform that --reference-init draws")
    student.add_argument(
        "--allow-pickle", action="store_true", help="read pytorch_model.bin, with torch's weights_only"
    )
    student.add_argument("--out", required=True, type=Path, help="folder to write; must not exist")

    evaluate = commands.add_parser("evaluate", help="measure a run's student on held-out text", allow_abbrev=False)
    evaluate.add_argument("--workdir", required=True, type=Path)
    evaluate.add_argument("--step", type=int, help="checkpoint; default the last")
    evaluate.add_argument("--metrics", help="of perplexity,agreement,pseudo_perplexity,rouge; default the run's")
    evaluate.add_argument("--predictions", type=Path, help="with rouge: prompts, completions and references, as JSON")
    evaluate.add_argument("--json", type=Path, help="also write the figures here")
    evaluate.add_argument("--allow-pickle", action="store_true", help="for the teacher")

    export = commands.add_parser("export", help="write a run's student as a Hugging Face folder")
    export.add_argument("--workdir", required=True, type=Path)
    export.add_argument("--step", type=int, help="checkpoint; default the last")
    form = export.add_mutually_exclusive_group(required=True)
    form.add_argument("--to-pytorch", dest="to", action="store_const", const="pytorch", help="model.safetensors")
    form.add_argument("--to-flax", dest="to", action="store_const", const="flax", help="flax_model.msgpack")
    export.add_argument("--out", required=True, type=Path, help="folder to write; must not exist")

    plan = commands.add_parser("plan", help="what a step costs, before a machine is rented", allow_abbrev=False)
    plan.add_argument("--config", required=True, help="recipe; --config.key=value as for train")
    plan.add_argument(
        "--topology", default="", help="compile for a TPU slice such as v5e:2x4; default the devices here"
    )

    generate = commands.add_parser("generate", help="continue prompts with a causal model", allow_abbrev=False)
    generate.add_argument("--model", required=True, help="folder or hub name")
    generate.add_argument("--revision", default="", help="of the hub name")
    generate.add_argument("--input", type=Path, help='a prompt a line, or .jsonl with "prompt"; default standard input')
    generate.add_argument("--out", type=Path, help="write prompt, completion, tokens, stop here as JSON lines")
    generate.add_argument("--max-new-tokens", type=int, default=100)
    generate.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    generate.add_argument("--top-k", type=int, default=0, help="draw among the k likeliest; 0: all")
    generate.add_argument("--top-p", type=float, default=1.0, help="draw among the fewest with this probability")
    generate.add_argument(
        "--stop-repeats",
        type=int,
        nargs=2,
        metavar=("N", "TIMES"),
        default=(0, 0),
        help="end a text where its last N new tokens have stood in it TIMES times",
    )
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--batch-size", type=int, default=8, help="prompts at a time")
    generate.add_argument(
        "--allow-pickle", action="store_true", help="read pytorch_model.bin, with torch's weights_only"
    )

    flags, overrides = parser.parse_known_args(argv)
    if overrides and flags.command not in ("prepare", "evaluate", "plan"):
        parser.error(f"unknown argument {overrides[0]!r}")
    return train.guarded(lambda: COMMANDS[flags.command](flags, overrides))


def _prepare(flags: argparse.Namespace, overrides: list[str]) -> None:
    from jaxdistill import commands

    print(commands.prepare(flags.config, overrides))


def _init_student(flags: argparse.Namespace, overrides: list[str]) -> None:
    from jaxdistill import commands

    commands.init_student(
        teacher=flags.teacher,
        revision=flags.revision,
        layers=flags.layers,
        text=flags.text,
        family=flags.family,
        reference_init=flags.reference_init,
        seed=flags.seed,
        allow_pickle=flags.allow_pickle,
        out=flags.out,
    )


def _evaluate(flags: argparse.Namespace, overrides: list[str]) -> None:
    from jaxdistill import commands

    figures = commands.evaluate(
        flags.workdir,
        step=flags.step,
        metrics=flags.metrics.split(",") if flags.metrics else None,
        overrides=overrides,
        allow_pickle=flags.allow_pickle,
        predictions=flags.predictions,
    )
    if flags.json:
        with files.writing(flags.json):
            files.write_text(flags.json, json.dumps(figures, indent=2) + "\n")
    for name, value in figures.items():
        print(f"{name:20} {value:.6g}")


def _export(flags: argparse.Namespace, overrides: list[str]) -> None:
    from jaxdistill import loop

    loop.export_run(flags.workdir, flags.out, to=flags.to, tell=print, step=flags.step)


def _plan(flags: argparse.Namespace, overrides: list[str]) -> None:
    from jaxdistill.plan import plan

    plan(flags.config, overrides, topology=flags.topology)


def _generate(flags: argparse.Namespace, overrides: list[str]) -> None:
    from jaxdistill import commands
    from jaxdistill.generate import Decoding

    decoding = Decoding(
        max_new_tokens=flags.max_new_tokens,
        temperature=flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
        repeat_ngram=flags.stop_repeats[0],
        repeat_times=flags.stop_repeats[1],
    )
    commands.generate(
        model=flags.model,
        revision=flags.revision,
        allow_pickle=flags.allow_pickle,
        input=flags.input,
        out=flags.out,
        decoding=decoding,
        batch_size=flags.batch_size,
        seed=flags.seed,
    )


COMMANDS = {
    "prepare": _prepare,
    "init-student": _init_student,
    "evaluate": _evaluate,
    "export": _export,
    "plan": _plan,
    "generate": _generate,
}

if __name__ == "__main__":
    sys.exit(main())
