"""The student of a run as a Hugging Face folder."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jaxdistill.export.card import Card, model_card
from jaxdistill.export.export import export
from jaxdistill.run import folder as folders


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
        base_model=student.config["teacher"]["name"],
        license=student.config["export"]["license"],
        recipe=student.config,
        results=student.figures,
        causal=student.model.family.causal,
    )
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
