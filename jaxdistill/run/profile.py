"""A trace of a few steps, for xprof: what each device and each thread of the host did, and when."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax

from jaxdistill.config import steps_to_profile
from jaxdistill.files import writing

FOLDER = "profile"


class Profiler:
    """Traces the steps that config.log.profile names, into a run folder; every process those of its own devices."""

    def __init__(self, steps: str, workdir: Path, report: Callable[[str], None]):
        self.steps = steps_to_profile(steps) if steps else range(0)
        self.folder, self.report, self.is_tracing = workdir / FOLDER, report, False

    def step(self, at: int) -> AbstractContextManager[Any]:
        """The context in which step `at` is dispatched."""
        if self.steps and at == self.steps[0]:
            with writing(self.folder):
                jax.profiler.start_trace(str(self.folder))
            self.is_tracing = True
        return jax.profiler.StepTraceAnnotation("train", step_num=at) if self.is_tracing else nullcontext()

    def after(self, at: int, metrics: Any) -> None:
        """Ends the trace after its last step, which is waited for."""
        if self.is_tracing and at == self.steps[-1]:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """Writes the trace, also of a run that ends earlier than it."""
        if self.is_tracing:
            self.is_tracing = False
            with writing(self.folder):
                jax.profiler.stop_trace()
            self.report(f"a trace of the steps is in {self.folder}; to see it: xprof --logdir {self.folder}")
