"""The student of a run as a Hugging Face folder."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from jaxdistill.console import taking
from jaxdistill.export.card import Card, Results, model_card, without_folders
from jaxdistill.export.export import export
from jaxdistill.export.push import Target, check_access, check_target, files_of, push
from jaxdistill.run import folder as folders
from jaxdistill.run.origin import read_origin
from jaxdistill.run.records import read_records


class Exported(NamedTuple):
    """A checkpoint that was written as a Hugging Face folder."""

    workdir: Path
    step: int
    out: Path
    to: str  # the format
    figures: dict[str, float]  # of the evaluation after this step; empty where there was none

    def __str__(self) -> str:
        return f"exported step {self.step} of {self.workdir} to {self.out} ({self.to}); its logits are the checkpoint's"


def export_run(
    workdir: Path, out: Path, *, to: str, report: Callable[[str], None], step: int | None = None, name: str = ""
) -> Exported:
    """Writes a run's student as a Hugging Face folder and proves that it reads back the same.

    Args:
      to: one of export.folder.FORMATS.
      step: of the checkpoint; None = the last.
      name: of the model on its card; "" = that of the folder.

    Raises:
      UserError: there is no such checkpoint, or the folder cannot be written or reads back differently.
    """
    student = folders.load_student(workdir, step=step, report=report)
    card = Card(
        name=name or out.name,
        origin=read_origin(workdir, student.config),
        license=student.config["export"]["license"],
        recipe=student.config,
        results=Results(student.figures, _step_of_figures(workdir, student), held_out_text(student.config)),
        step=student.step,
        causal=student.model.family.causal,
    )
    with taking(f"writing {out} and reading it back"):
        export(
            model=student.model,
            params=student.params,
            tokenizer=student.tokenizer,
            out=out,
            to=to,
            card=model_card(card),
            probe=student.probe,
        )
    return Exported(workdir, student.step, out, to, student.figures)


class Pushed(NamedTuple):
    """An exported folder on the hub, or what would be there."""

    exported: Exported
    target: Target
    address: str  # "" where nothing was sent
    files: list[tuple[str, int]]  # name, bytes

    def lines(self) -> Iterator[str]:
        how = "private" if self.target.private else "public"
        yield f"{'would send' if not self.address else 'sent'} to {self.target.name} ({how}, if it is new):"
        yield from (f"  {name:28} {size:>14,} bytes" for name, size in self.files)
        if self.address:
            yield self.address


def push_run(
    workdir: Path,
    target: Target,
    *,
    out: Path | None,
    to: str,
    step: int | None,
    dry_run: bool,
    report: Callable[[str], None],
) -> Pushed:
    """Exports a run's student as `export_run` does, and sends the folder to the hub.

    Args:
      out: the folder, which is then kept; None = a temporary one.
      dry_run: exports and sends nothing.

    Raises:
      UserError: a name that is none, no access, or as `export_run`; all that can be known before is, before it exports.
    """
    check_target(target)
    if not dry_run:
        report(f"pushing to {target.name} as {check_access(target)}")
    with ExitStack() as stack:
        if out is None:
            out = Path(stack.enter_context(TemporaryDirectory())) / target.name.split("/")[1]
        exported = export_run(workdir, out, to=to, report=report, step=step, name=target.name)
        files = list(files_of(out))
        if dry_run:
            return Pushed(exported, target, "", files)
        with taking(f"sending {sum(size for _, size in files):,} bytes to {target.name}"):
            return Pushed(exported, target, push(out, target), files)


def _step_of_figures(workdir: Path, student: folders.Student) -> int | None:
    """The step of the evaluation whose figures a checkpoint has, which may lie before it; None where no record is."""
    wanted = {"kind": "eval", **student.figures}
    for record in reversed(read_records(workdir)):
        if record["step"] <= student.step and wanted.items() <= record.items():
            return record["step"]
    return None


def held_out_text(config: Mapping[str, Any]) -> str:
    """The held-out text of a run, for people."""
    data, evaluate = config["data"], config["evaluate"]
    path = without_folders(data["path"] or data["prepared"])
    if data["eval_path"]:
        text = f"`{without_folders(data['eval_path'])}`"
    elif data["eval_split"]:
        text = f"the split `{data['eval_split']}` of `{path}`"
    else:
        text = f"the {100 * data['eval_fraction']:.3g} % of `{path}` that were held out"
    batches = evaluate["batches"]
    return f"at most {batches * evaluate['batch_size']:,} rows of {text}" if batches else f"all rows of {text}"
