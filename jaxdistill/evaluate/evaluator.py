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
from jaxdistill.models.pair import Pair


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

    Raises:
      UserError: a figure cannot be measured on these models or this text.
    """
    rows = [EVALUATORS[name] for name in settings.metrics]
    evaluators = [row.make(context, settings) for row in rows if context.teacher or not row.needs_teacher]

    def evaluate(student_params: PyTree, teacher_params: PyTree) -> Iterator[tuple[str, float]]:
        for evaluator in evaluators:
            yield from evaluator(student_params, teacher_params)

    return evaluate


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
