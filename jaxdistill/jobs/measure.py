"""Figures of a run's checkpoint, or of any model, on the same held-out text with the same masks."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from jax.sharding import Mesh
from jaxtyping import PyTree

from jaxdistill import processes, recipe
from jaxdistill.config import Config
from jaxdistill.data import text as texts
from jaxdistill.errors import UserError
from jaxdistill.evaluate import EVALUATORS
from jaxdistill.evaluate.context import ScoredCompletion
from jaxdistill.evaluate.evaluator import check_finite, make_context, make_evaluator
from jaxdistill.files import write_text, writing
from jaxdistill.models.model import Model, build_model_for
from jaxdistill.models.pair import Pair
from jaxdistill.models.settings import HOW_MADE, StudentConfig
from jaxdistill.run import folder as folders
from jaxdistill.run import importance
from jaxdistill.run.assemble import held_out_of
from jaxdistill.run.fit import check_model
from jaxdistill.run.models import in_memory, pair_with
from jaxdistill.run.teachers import load_teacher
from jaxdistill.run.training import check_evaluation
from jaxdistill.step import sharding
from jaxdistill.step.sharding import Meshes

Report = Callable[[str], None]


def config_of_run(workdir: Path, overrides: Sequence[str]) -> Config:
    """The config of a run, with `--config.KEY=VALUE` flags.

    Raises:
      UserError: `workdir` is no run folder; a flag that does not fit.
    """
    recorded = folders.read_config(workdir)
    if recorded is None:
        raise UserError(f"{workdir} is no run folder: it has no config.json")
    return recipe.recorded(recorded, overrides)


def evaluate(
    workdir: Path,
    *,
    step: int | None,
    metrics: Sequence[str] | None,
    overrides: Sequence[str],
    allow_pickle: bool,
    report: Report,
    predictions: Path | None = None,
) -> dict[str, float]:
    """Measures a checkpoint on the run's held-out text, or on the text that `--config.data...` names instead.

    The teacher's own figures follow the student's. Where `metrics` names none that compares the two, a teacher that
    cannot be read is left out.

    Args:
      step: of the checkpoint; None = the last.
      metrics: None = those of the run.
      overrides: `--config.KEY=VALUE` flags.
      predictions: file for the completions of rouge: JSON, [{"prompt", "completion", "reference"}, ...].

    Raises:
      UserError: what does not fit.
    """
    return evaluate_run(
        workdir,
        config_of_run(workdir, overrides),
        step=step,
        metrics=metrics,
        allow_pickle=allow_pickle,
        report=report,
        predictions=predictions,
    )


def evaluate_run(
    workdir: Path,
    config: Config,
    *,
    step: int | None,
    metrics: Sequence[str] | None,
    allow_pickle: bool,
    report: Report,
    predictions: Path | None = None,
) -> dict[str, float]:
    """As `evaluate`, with the config of the run, of which values may have been changed."""
    config = _with_metrics(config, metrics, predictions)
    mesh = sharding.mesh_here(config.mesh)
    student = folders.load_student(workdir, step=step, report=report, mesh=mesh)
    check_model(config, student.model, "student")
    config, teacher, teacher_params = _teacher(config, metrics, allow_pickle=allow_pickle, report=report)
    model = build_model_for(student.model.config, config.student)
    pair = Pair(model, student.params, teacher, teacher_params, student.tokenizer, None)
    # In the data types of the run, so that its own figures come out again.
    pair = in_memory(pair, config.teacher.dtype, Meshes(mesh, mesh))
    name = f"{workdir}, step {student.step}"
    return _measure(config, pair, mesh, name=name, allow_pickle=allow_pickle, predictions=predictions, report=report)


def evaluate_model(
    name: str,
    config: Config,
    *,
    revision: str,
    metrics: Sequence[str] | None,
    allow_pickle: bool,
    report: Report,
    predictions: Path | None = None,
) -> dict[str, float]:
    """Measures any model on the held-out text of a config, with the masks that a run of this config is measured on.

    Args:
      name: folder, run folder or hub name of the model.
      revision: of a hub name.
      metrics, predictions: as in `evaluate`.

    Raises:
      UserError: what does not fit.
    """
    as_it_is = {key: getattr(StudentConfig(), key) for key in HOW_MADE}
    return evaluate_config(
        config.changed(student={**as_it_is, "name": name, "revision": revision}),
        name,
        metrics=metrics,
        allow_pickle=allow_pickle,
        report=report,
        predictions=predictions,
    )


def evaluate_config(
    config: Config,
    name: str,
    *,
    metrics: Sequence[str] | None,
    allow_pickle: bool,
    report: Report,
    predictions: Path | None = None,
) -> dict[str, float]:
    """Measures the student that a run of a config would begin with, on its held-out text.

    Args:
      name: of the student, for messages.
      metrics, predictions: as in `evaluate`.

    Raises:
      UserError: what does not fit.
    """
    config = _with_metrics(config, metrics, predictions)
    config, teacher, teacher_params = _teacher(config, metrics, allow_pickle=allow_pickle, report=report)
    mesh = sharding.mesh_here(config.mesh)
    pair = pair_with(
        config,
        teacher,
        teacher_params,
        allow_pickle=allow_pickle,
        report=report,
        missing="error",
        meshes=Meshes(mesh, mesh),
    )
    return _measure(config, pair, mesh, name=name, allow_pickle=allow_pickle, predictions=predictions, report=report)


def _with_metrics(config: Config, metrics: Sequence[str] | None, predictions: Path | None) -> Config:
    for name in metrics or ():
        if name not in EVALUATORS:
            raise UserError(f"--metrics holds {name!r}; there are {', '.join(EVALUATORS)}")
    config = config.changed(evaluate={"metrics": tuple(metrics or config.evaluate.metrics)})
    if not config.teacher.name and "agreement" in (metrics or ()):
        raise UserError("--metrics holds agreement, and this run has no teacher to agree with")
    if predictions is not None and "rouge" not in config.evaluate.metrics:
        raise UserError("--predictions keeps the completions of rouge; add rouge to --metrics")
    return config


def _teacher(
    config: Config, metrics: Sequence[str] | None, *, allow_pickle: bool, report: Report
) -> tuple[Config, Model | None, PyTree]:
    """(config, teacher, its parameters); a config without a teacher where no metric that was asked for needs one."""
    try:
        return config, *load_teacher(config, allow_pickle=allow_pickle)
    except UserError as error:
        if not metrics or any(EVALUATORS[name].needs_teacher for name in metrics):
            alone = ",".join(name for name in config.evaluate.metrics if not EVALUATORS[name].needs_teacher)
            hint = f"; --metrics {alone} measures without the teacher" if alone else ""
            raise UserError(f"{error}{hint}") from error
        report(f"without the teacher's own figures: {error}")
        return config.changed(teacher={"name": "", "revision": ""}), None, {}


def _measure(
    config: Config,
    pair: Pair,
    mesh: Mesh,
    *,
    name: str,
    allow_pickle: bool,
    predictions: Path | None,
    report: Report,
) -> dict[str, float]:
    sources = texts.open_text(config.data)
    text = texts.prepare_text(config.data, sources, pair.tokenizer, causal=pair.student.family.causal, report=report)
    check_evaluation(config, mesh)
    pair = importance.with_student(config, pair, text, Meshes(mesh, mesh), allow_pickle=allow_pickle)

    def keep_completions(records: list[ScoredCompletion]) -> None:
        if predictions is not None and processes.is_first():
            with writing(predictions):
                write_text(predictions, json.dumps(records, indent=2, ensure_ascii=False) + "\n")

    held_out = held_out_of(config, text)
    context = make_context(
        config.evaluate, config.mask, pair, text, held_out, mesh=mesh, keep_completions=keep_completions
    )
    measure = make_evaluator(config.evaluate, context)
    figures = dict(measure(pair.student_params, pair.teacher_params))
    check_finite(figures, of=lambda: name)
    return figures
