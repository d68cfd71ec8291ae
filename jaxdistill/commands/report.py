"""`jaxdistill report`: one page about runs, to read and to pass on."""

import argparse
import shlex
from pathlib import Path

from jaxdistill import files
from jaxdistill.arguments import comma_separated
from jaxdistill.console import LOADING, say, show, taking
from jaxdistill.errors import UserError

HELP = "write one page about runs: curves, teacher and students side by side, examples"
TAKES_CONFIG = True
LESS_MEMORY = "lower config.evaluate.batch_size, or leave the models out with --curves-only"
INTERRUPTED = "no page was written; --curves-only takes a second"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="folders of runs; all are measured on the held-out text of the first, beside its teacher",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("report.html"),
        help="HTML file; Markdown is written beside it (default: %(default)s)",
    )
    parser.add_argument("--step", default="last", help="checkpoint: a step, best or last; default: %(default)s")
    parser.add_argument(
        "--words",
        type=comma_separated,
        default=(),
        help="words, separated by commas, whose nearest words to show; default: frequent words of the held-out text",
    )
    parser.add_argument("--curves-only", action="store_true", help="load no model: curves and settings alone")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read the teacher's pytorch_model.bin, with torch's weights_only"
    )


def main(flags: argparse.Namespace, overrides: list[str]) -> None:
    if flags.out.suffix not in (".html", ".htm"):
        raise UserError(f"--out {flags.out} names no .html file; Markdown is written beside it as {flags.out}.md")
    if flags.out.is_dir():
        raise UserError(f"--out {flags.out} is a folder; name a file")
    if flags.curves_only and overrides:
        raise UserError(f"{overrides[0]} changes what models are measured on, and --curves-only measures none")
    if flags.curves_only and flags.words:
        raise UserError("--words asks models for nearest words, and --curves-only reads none; leave one of them out")
    with taking(LOADING):
        from jaxdistill.jobs.report import make_report
        from jaxdistill.report.markdown import markdown
        from jaxdistill.report.page import page

    report = make_report(
        flags.runs,
        command=_command(flags, overrides),
        step=flags.step,
        curves_only=flags.curves_only,
        words=flags.words,
        overrides=overrides,
        allow_pickle=flags.allow_pickle,
        say=say,
    )
    beside = flags.out.with_suffix(".md")
    for path, text in ((flags.out, page(report)), (beside, markdown(report))):
        with files.writing(path):
            files.write_text(path, text)
    show([f"wrote {flags.out} and {beside}"], None, as_json=False)


def _command(flags: argparse.Namespace, overrides: list[str]) -> str:
    """The command that writes the same page, without the folders of this machine."""
    runs = [run.name if run.is_absolute() else str(run) for run in flags.runs]
    pairs = [override.partition("=") for override in overrides]
    values = [f"{key}={Path(value).name if value.startswith('/') else value}" for key, _, value in pairs]
    options = [*(["--step", flags.step] if flags.step != "last" else []), *["--curves-only"] * flags.curves_only]
    options += ["--words", ",".join(flags.words)] if flags.words else []
    return shlex.join(["jaxdistill", "report", *runs, "--out", flags.out.name, *options, *values])
