"""Figures of a run's checkpoint."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from jaxdistill import recipe
from jaxdistill.data import text as texts
from jaxdistill.errors import UserError
from jaxdistill.evaluate import EVALUATORS
from jaxdistill.evaluate.context import ScoredCompletion
from jaxdistill.evaluate.evaluator import check_finite, make_context, make_evaluator
from jaxdistill.files import write_text, writing
from jaxdistill.models.model import build_model_for
from jaxdistill.models.pair import Pair
from jaxdistill.run import folder as folders
from jaxdistill.run.assemble import held_out_of
from jaxdistill.run.models import check_model, in_dtype, load_teacher
from jaxdistill.run.training import check_evaluation
from jaxdistill.step import sharding


def evaluate(
    workdir: Path,
    *,
    step: int | None,
    metrics: Sequence[str] | None,
    overrides: Sequence[str],
    allow_pickle: bool,
    report: Callable[[str], None],
    predictions: Path | None = None,
) -> dict[str, float]:
    """Measures a checkpoint on the run's held-out text, or on the text that `--config.data...` names instead.

    Args:
      step: of the checkpoint; None = the last.
      metrics: None = those of the run.
      overrides: `--config.KEY=VALUE` flags.
      predictions: file for the completions of rouge: JSON, [{"prompt", "completion", "reference"}, ...].

    Raises:
      UserError: what does not fit.
    """
    for name in metrics or ():
        if name not in EVALUATORS:
            raise UserError(f"--metrics holds {name!r}; there are {', '.join(EVALUATORS)}")
    recorded = folders.read_config(workdir)
    if recorded is None:
        raise UserError(f"{workdir} is no run folder: it has no config.json")
    config = recipe.recorded(recorded, overrides)
    config = config.changed(evaluate={"metrics": tuple(metrics or config.evaluate.metrics)})
    if not config.teacher.name and "agreement" in (metrics or ()):
        raise UserError("--metrics holds agreement, and this run has no teacher to agree with")
    if predictions is not None and "rouge" not in config.evaluate.metrics:
        raise UserError("--predictions keeps the completions of rouge; add rouge to --metrics")
    student = folders.load_student(workdir, step=step, report=report)
    check_model(config, student.model, "student")
    source = texts.open_text(config.data)
    teacher, teacher_params = load_teacher(config, allow_pickle=allow_pickle)
    # In the data types of the run, so that its own figures come out again.
    teacher_params = in_dtype(teacher_params, config.teacher.dtype)
    model = build_model_for(student.model.config, config.student)
    pair = Pair(model, student.params, teacher, teacher_params, student.tokenizer, None)
    text = texts.prepare_text(config.data, source, student.tokenizer, causal=model.family.causal, report=report)
    mesh = sharding.make_mesh(data=-1, fsdp=1)
    check_evaluation(config, mesh)

    def keep_completions(records: list[ScoredCompletion]) -> None:
        if predictions is not None:
            with writing(predictions):
                write_text(predictions, json.dumps(records, indent=2, ensure_ascii=False) + "\n")

    held_out = held_out_of(config, text)
    context = make_context(
        config.evaluate, config.mask, pair, text, held_out, mesh=mesh, keep_completions=keep_completions
    )
    measure = make_evaluator(config.evaluate, context)
    everywhere = sharding.replicated(mesh)
    figures = dict(measure(jax.device_put(student.params, everywhere), jax.device_put(teacher_params, everywhere)))
    check_finite(figures, of=lambda: f"{workdir}, step {student.step}")
    return figures
