"""Checkpoints by the names that a user gives them: a step, the last one, or the best one."""

from pathlib import Path

from jaxdistill.errors import UserError
from jaxdistill.run import checkpoint
from jaxdistill.run import folder as folders


def best_line(workdir: Path, figure: str) -> str:
    """The sentence that names the best checkpoint of a run; "" where there is none."""
    if not (found := checkpoint.best_of(workdir, figure)):
        return ""
    step, value = found
    return f"the best checkpoint is that of step {step}, with {figure} {value:.4g} (evaluate and export: --step best)"


def step_named(workdir: Path, name: str) -> int | None:
    """The step of a checkpoint that a user names: a number, `best`, or `last`, which is None: the last whole one.

    Raises:
      UserError: the name is none of these, or the run has no best checkpoint.
    """
    if name == "last":
        return None
    if name != "best":
        if name.isascii() and name.isdigit():
            return int(name)
        raise UserError(f"--step {name} is no step: give a number, best or last")
    config = folders.read_config(workdir)
    if config is None:
        raise UserError(f"{workdir} is no run folder: it has no config.json")
    figure = config["checkpoint"]["best"]
    if found := checkpoint.best_of(workdir, figure):
        return found[0]
    raise UserError(
        f"--step best: no checkpoint of {workdir} has a value of config.checkpoint.best={figure!r}; name a step"
    )
