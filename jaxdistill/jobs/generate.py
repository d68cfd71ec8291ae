"""The model that continues prompts: the student of a run, or any model of a folder or of the hub."""

from collections.abc import Callable
from pathlib import Path

from jaxdistill.errors import UserError
from jaxdistill.models import hub
from jaxdistill.run import folder as folders
from jaxdistill.run.best import step_named
from jaxdistill.sampling.write import Writer, writer_of


def writer_named(name: str, *, step: str, revision: str, allow_pickle: bool, report: Callable[[str], None]) -> Writer:
    """The model that a user names.

    Args:
      step: of the checkpoint of a run, as `step_named` takes it.

    Raises:
      UserError: it cannot be read, or a step is named and there is no run.
    """
    if hub.is_run(name):
        student = folders.load_student(Path(name), step=step_named(Path(name), step), report=report)
        return Writer(student.model, student.tokenizer, lambda: student.params)
    if step != "last":
        raise UserError(f"--step {step} is of a run folder, and {name} is none; leave it out")
    return writer_of(name, revision=revision, allow_pickle=allow_pickle)
