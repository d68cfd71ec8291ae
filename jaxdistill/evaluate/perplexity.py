"""Masked-LM perplexity of the student on fixed masks."""

import math
from collections.abc import Iterator, Mapping

import jax
from jaxtyping import Array, PyTree

from jaxdistill.evaluate.context import Context, Evaluator, masked_logits, totals
from jaxdistill.losses import cross_entropy, masked_sum


def make_perplexity(context: Context) -> Evaluator:
    """Yields mlm_loss (nats a masked token), perplexity = exp(mlm_loss) and mlm_accuracy."""

    @jax.jit
    def sums(params: PyTree, batch: Mapping[str, Array]) -> dict[str, Array]:
        logits, labels, valid = masked_logits(context, context.student, params, batch)
        return {
            "nll": masked_sum(cross_entropy(logits, labels), valid),
            "right": masked_sum((logits.argmax(axis=-1) == labels).astype("float32"), valid),
            "count": valid.sum(dtype="float32"),
        }

    def evaluate(student_params: PyTree, teacher_params: PyTree) -> Iterator[tuple[str, float]]:
        whole = totals(context, sums, student_params)
        count = max(whole["count"], 1.0)
        yield "mlm_loss", whole["nll"] / count
        yield "perplexity", math.exp(min(whole["nll"] / count, 700.0))  # e^700 is the last float64 holds
        yield "mlm_accuracy", whole["right"] / count

    return evaluate
