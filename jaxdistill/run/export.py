"""The student of a run as a Hugging Face folder."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxdistill.console import taking
from jaxdistill.export.card import Card, Results, model_card, without_folders
from jaxdistill.export.export import export
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
    workdir: Path, out: Path, *, to: str, report: Callable[[str], None], step: int | None = None
) -> Exported:
    """Writes a run's student as a Hugging Face folder and proves that it reads back the same.

    Args:
      to: one of export.folder.FORMATS.
      step: of the checkpoint; None = the last.

    Raises:
      UserError: there is no such checkpoint, or the folder cannot be written or reads back differently.
    """
    student = folders.load_student(workdir, step=step, report=report)
    card = Card(
        name=out.name,
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
