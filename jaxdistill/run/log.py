"""Figures of a run while it trains: read one step late, so that the devices are never waited for."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax

from jaxdistill.config import Config
from jaxdistill.data.text import Text
from jaxdistill.errors import NotFiniteError
from jaxdistill.models.model import in_millions
from jaxdistill.models.pair import OF_TEACHER, Pair
from jaxdistill.run import writers
from jaxdistill.run.closing import Closing
from jaxdistill.run.utilisation import Rates
from jaxdistill.step.sharding import Meshes
from jaxdistill.step.state import Metrics

Report = Callable[[str], None]


class Log:
    """Figures of a step and of the window before it: put when the step is dispatched, read one step later."""

    def __init__(
        self,
        write: writers.Write,
        schedule: optax.Schedule,
        *,
        last_good: Callable[[int], str],
        rates: Rates | None = None,
    ):
        """last_good: names the last good checkpoint where the parameters of a step give a loss that is not finite.

        rates: gives figures of speed beside tokens/s.
        """
        self.write, self.schedule, self.last_good, self.rates = write, schedule, last_good, rates
        self.pending: tuple[int, Metrics, int, int, float] | None = None
        self.tokens, self.rows, self.waited = 0, 0, 0.0  # since the last put
        self.since = time.perf_counter()  # the last read

    def restart(self) -> None:
        """Leaves all time until now out of tokens/s: compilation, evaluations, checkpoints."""
        self.tokens, self.rows, self.waited, self.since = 0, 0, 0.0, time.perf_counter()

    def next(self, batches: Iterator[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The next batch; the time that it takes is logged as input_wait."""
        began = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - began
        lengths = batch["attention_mask"].sum(axis=1)
        self.tokens += int(lengths.sum()) * jax.process_count()
        self.rows += int(np.count_nonzero(lengths)) * jax.process_count()
        return batch

    def put(self, at: int, metrics: Metrics) -> None:
        """Keeps the metrics of step `at`, which may still be running."""
        self.pending = (at, metrics, self.tokens, self.rows, self.waited)
        self.tokens, self.rows, self.waited = 0, 0, 0.0

    def read(self) -> None:
        """Waits for the pending metrics and writes them.

        Raises:
          NotFiniteError: of the loss or the gradient.
        """
        if self.pending is None:
            return
        (at, metrics, tokens, rows, waited), self.pending = self.pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        seconds, self.since = time.perf_counter() - self.since, time.perf_counter()
        norm = values.pop("grad_norm")
        if not (math.isfinite(values["loss"]) and math.isfinite(norm)):
            raise NotFiniteError(
                f"loss is {values['loss']} and the gradient's norm {norm} at step {at}; {self.last_good(at - 1)}. "
                "The same command with a lower --config.optim.learning_rate or --config.optim.clip goes on from there, "
                "and with another --workdir it starts afresh"
            )
        figures = {
            "loss": values.pop("loss"),
            **values,
            "grad_norm": norm,
            "learning_rate": float(np.asarray(self.schedule(at - 1))),
        }
        if tokens:  # not where the clock began after the step itself, as for the first
            figures |= {"tokens_per_s": tokens / seconds, "input_wait": waited / seconds}
            figures |= self.rates(tokens / seconds, tokens / rows) if self.rates else {}
        self.write(at, "train", figures)


class Outlets(NamedTuple):
    """Where a run tells of itself; nowhere, in processes after the first."""

    write: writers.Write  # figures, wherever the config asks for
    show: writers.ShowTable  # texts, wherever the config asks for and they can be seen
    report: Report  # a line for the user


def open_writers(config: Config, workdir: Path, *, start: int, total: int, closing: Closing) -> Outlets:
    """Opens all that the config asks for.

    Args:
      start: steps that were trained before.
      total: steps of the whole run.
      closing: closes the writers.
    """
    if jax.process_index() != 0:
        return Outlets(lambda step, kind, figures: None, lambda step, name, table: None, lambda line: None)
    into_file, close = writers.jsonl(workdir / "metrics.jsonl", resume_at=start)
    closing.callback(close)
    trackers: list[writers.Tracker] = []
    if config.log.tensorboard:
        trackers.append(writers.tensorboard(workdir / "tensorboard"))
    for project, open_tracker in ((config.log.wandb, writers.wandb), (config.log.trackio, writers.trackio)):
        if project:
            trackers.append(open_tracker(workdir, project=project, config=config.model_dump()))
    on_screen, stop, report = writers.progress(total=total, start=start)
    for close in (*(tracker.close for tracker in trackers), stop):
        closing.callback(close)

    def show(step: int, name: str, table: writers.Table) -> None:
        for tracker in trackers:
            tracker.show(step, name, table)

    return Outlets(writers.both(into_file, *(tracker.write for tracker in trackers), on_screen), show, report)


def describe(config: Config, pair: Pair, text: Text, meshes: Meshes, *, steps: int, per_epoch: int) -> str:
    """The line at the start of a run: models, devices, text, steps."""
    teacher = ""
    if pair.teacher is not None:
        params = (pair.teacher_params, *pair.others_params)
        each = [f"{one.config.model_type} {in_millions(x)}" for one, x in zip(pair.teachers, params, strict=True)]
        teacher = f"teacher{'s' * bool(pair.others)} {', '.join(each)} -> "
    if pair.cached is not None:
        answers = f"{'their' if pair.mix else 'its'} answers from {', '.join(config.teacher.caches)}"
        teacher = f"teacher{'s' * bool(pair.mix)} {pair.cached.model.config.model_type}, {answers} -> "
    student = f"student {pair.student.config.model_type} {in_millions(pair.student_params)}"
    layers = f" (layers {','.join(map(str, pair.layers))})" if pair.layers else ""
    shapes = {role: dict(mesh.shape) for role, mesh in meshes._asdict().items()}
    shape = shapes if meshes.separate else shapes["student"]
    return (
        f"{teacher}{student}{layers} | {jax.device_count()} {jax.devices()[0].platform} device(s), "
        f"mesh {json.dumps(shape)} "
        f"| {text.train.lengths.sum():,} tokens an epoch in {len(text.train):,} rows "
        f"| {steps} steps of {config.train.batch_size} rows, {per_epoch} an epoch"
    )


def beside_teacher(figures: Mapping[str, float]) -> writers.Table:
    """The figures of an evaluation as a table, the teacher's own beside the student's."""
    own = [name for name in figures if not name.startswith(OF_TEACHER)]
    rows = [
        (name, *(f"{figures[key]:.4g}" if key in figures else "" for key in (name, f"{OF_TEACHER}{name}")))
        for name in own
    ]
    return writers.Table(("figure", "student", "teacher"), rows)
