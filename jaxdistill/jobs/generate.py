"""The model that continues prompts: the student of a run, or any model of a folder or of the hub."""

from collections.abc import Callable
from pathlib import Path

from jax.sharding import Mesh

from jaxdistill.errors import UserError
from jaxdistill.models import hub
from jaxdistill.models.axes import TENSOR
from jaxdistill.models.model import build_model
from jaxdistill.models.partition import check_heads
from jaxdistill.run import folder as folders
from jaxdistill.run.best import step_named
from jaxdistill.sampling.write import Writer, writer_of


def writer_named(
    name: str,
    *,
    step: str,
    revision: str,
    allow_pickle: bool,
    report: Callable[[str], None],
    mesh: Mesh | None = None,
) -> Writer:
    """The model that a user names.

    Args:
      step: of the checkpoint of a run, as `step_named` takes it.
      mesh: as for `writer_of`.

    Raises:
      UserError: it cannot be read, or a step is named and there is no run.
    """
    if mesh is not None and mesh.shape[TENSOR] > 1:
        folder = Path(name) / "student" if hub.is_run(name) else hub.resolve(name, revision=revision, weights=False)
        check_heads(build_model(hub.load_config(folder)), mesh.shape[TENSOR], "model", prefix="--")
    if hub.is_run(name):
        student = folders.load_student(Path(name), step=step_named(Path(name), step), report=report, mesh=mesh)
        return Writer(student.model, student.tokenizer, lambda: student.params)
    if step != "last":
        raise UserError(f"--step {step} is of a run folder, and {name} is none; leave it out")
    return writer_of(name, revision=revision, allow_pickle=allow_pickle, mesh=mesh)
