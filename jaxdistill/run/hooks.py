"""What a Python program adds to a run beside its settings: losses of its own, and functions that are called."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from jaxdistill.losses.objective import NO_LOSSES, OwnLoss
from jaxdistill.run.writers import Write


def _ignore(step: int, kind: str, figures: Mapping[str, float]) -> None:
    """For a run that nobody watches."""


class Hooks(NamedTuple):
    """What a program adds to a run; a run from the command line has none of it."""

    losses: Mapping[str, OwnLoss] = NO_LOSSES
    on_record: Write = _ignore  # called with every record of metrics.jsonl, in every process
    on_checkpoint: Callable[[int], None] | None = None  # called with the step once its checkpoint is whole

    @property
    def said_of_losses(self) -> str:
        """The program's losses as a checkpoint records them: a run goes on with the same names and weights alone."""
        return ", ".join(f"{name} x {loss.weight:g}" for name, loss in sorted(self.losses.items()))
