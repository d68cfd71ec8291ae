"""What follows a training step: a record, an evaluation, a checkpoint, the end of the run."""

import time
from typing import NamedTuple

import numpy as np

from jaxdistill.config import Config
from jaxdistill.run.stop import Stop
from jaxdistill.step.across_processes import Agreement


class Actions(NamedTuple):
    """What follows a step."""

    log: bool
    evaluate: bool
    save: bool
    stop: bool


class Due:
    """Decides what follows each step, from the settings, the clock and the signals that arrived."""

    def __init__(self, config: Config, stop: Stop, *, steps: int, per_epoch: int):
        self.stop, self.steps = stop, steps
        self.log_every = config.log.every
        self.evaluate_every = config.evaluate.every or per_epoch
        self.save_every = config.checkpoint.every or per_epoch
        self.seconds = 60 * config.checkpoint.minutes
        # A sample is not saved, so a checkpoint lies between two of them.
        self.whole = config.policy.reuse if config.losses_on_samples else 1
        self.agreement = Agreement()
        self.restart()

    def restart(self) -> None:
        """Counts the time to the next checkpoint from now: one was saved."""
        self.since = time.monotonic()
        self.agreement.forget(np.array([False, True]))  # not that the run is to stop, however often it is saved

    def after(self, at: int) -> Actions:
        """What follows step `at`."""
        is_last = at == self.steps
        stops, overdue = self._unplanned(at)
        evaluate = at % self.evaluate_every == 0 or is_last
        save = at % self.save_every == 0 or is_last or stops or overdue
        return Actions(at % self.log_every == 0 or evaluate or save, evaluate, save, stops)

    def _unplanned(self, at: int) -> tuple[bool, bool]:
        """(whether the run is to stop, whether the last checkpoint is too long ago)."""
        overdue = bool(self.seconds) and time.monotonic() - self.since > self.seconds
        # In every step, and so in every process, whatever this one wants.
        stops, overdue = self.agreement.ask(np.array([bool(self.stop.asked), overdue]))
        return (False, False) if at % self.whole else (bool(stops), bool(overdue))
