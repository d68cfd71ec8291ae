"""All figures that a run measures, as one function of the parameters."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from jaxdistill.data.settings import MaskConfig
from jaxdistill.data.text import Text
from jaxdistill.errors import NotFiniteError
from jaxdistill.evaluate import EVALUATORS
from jaxdistill.evaluate.context import Context, Evaluator, ScoredCompletion
from jaxdistill.evaluate.settings import EvaluateConfig
from jaxdistill.models.pair import OF_TEACHER, Pair


def make_context(
    settings: EvaluateConfig,
    mask: MaskConfig,
    pair: Pair,
    text: Text,
    batches: Sequence[Mapping[str, np.ndarray]],
    *,
    mesh: Mesh,
    keep_completions: Callable[[list[ScoredCompletion]], None] | None = None,
) -> Context:
    """The input of every evaluator, without the parameters of `pair`.

    Args:
      batches: held-out batches, from data.text.held_out_batches.
      keep_completions: called with the completions that rouge scored, after every evaluation.
    """
    return Context(
        student=pair.student,
        teacher=pair.teacher,
        tokenizer=pair.tokenizer,
        text=text,
        batches=batches,
        mesh=mesh,
        batch_size=settings.batch_size,
        mask_fraction=mask.fraction,
        keep_completions=keep_completions,
    )


def make_evaluator(settings: EvaluateConfig, context: Context) -> Evaluator:
    """The evaluators of settings.metrics as one evaluator, without those whose teacher is missing; each compiles once.

    The teacher's own figures follow the student's, as teacher_perplexity and so on. The teacher does not change, so
    they are measured once.

    Raises:
      UserError: a figure cannot be measured on these models or this text.
    """
    rows = [EVALUATORS[name] for name in settings.metrics]
    evaluators = [row.make(context, settings) for row in rows if context.teacher or not row.needs_teacher]
    of_teacher = _evaluators_of_teacher(settings, context)
    figures: dict[str, float] = {}

    def evaluate(student_params: PyTree, teacher_params: PyTree) -> Iterator[tuple[str, float]]:
        for evaluator in evaluators:
            yield from evaluator(student_params, teacher_params)
        if not figures:
            for evaluator in of_teacher:
                figures.update({f"{OF_TEACHER}{name}": value for name, value in evaluator(teacher_params, None)})
        yield from figures.items()

    return evaluate


def _evaluators_of_teacher(settings: EvaluateConfig, context: Context) -> list[Evaluator]:
    """The evaluators of what a model does by itself, with the teacher in the place of the student."""
    if context.teacher is None:
        return []
    alone = context._replace(student=context.teacher, teacher=None, keep_completions=None)
    whole = settings.model_copy(update={"pruned": ()})
    # Prompts and completions fit the student; a teacher with fewer positions writes none.
    fits = context.teacher.max_length >= context.student.max_length
    rows = [EVALUATORS[name] for name in settings.metrics if fits or name != "rouge"]
    return [row.make(alone, whole) for row in rows if not row.needs_teacher]


def check_finite(figures: Mapping[str, float], *, of: Callable[[], str]) -> None:
    """Checks that every figure is a number.

    Args:
      of: says what was measured, for the message: "step 20; the last good checkpoint is that of step 10".

    Raises:
      NotFiniteError: names the first figure that is not.
    """
    for name, value in figures.items():
        if not math.isfinite(value):
            raise NotFiniteError(
                f"{name} is {value} in the evaluation of {of()}. A model's parameters, or what it computes from them, "
                "are not finite: check its weights, compute in float32, or lower config.optim.learning_rate"
            )
