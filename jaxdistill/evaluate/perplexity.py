"""Masked-LM perplexity of the student, and of its sub-networks, on fixed masks."""

import math
from collections.abc import Iterator, Mapping

import jax
from jaxtyping import Array, Bool, PyTree

from jaxdistill.evaluate.context import Context, Evaluator, masked_logits, totals
from jaxdistill.losses import cross_entropy, masked_sum
from jaxdistill.models.layer_drop import kept_mask


def make_perplexity(context: Context) -> Evaluator:
    """Yields mlm_loss (nats a masked token), perplexity = exp(mlm_loss) and mlm_accuracy.

    Then the first two of every sub-network in context.pruned, as `mlm_loss/every_other`: what it would be worth if it
    were cut out now.
    """

    @jax.jit
    def sums(params: PyTree, kept: Bool[Array, "layers"] | None, batch: Mapping[str, Array]) -> dict[str, Array]:
        logits, labels, valid = masked_logits(context, context.student, params, batch, kept)
        return {
            "nll": masked_sum(cross_entropy(logits, labels), valid),
            "right": masked_sum((logits.argmax(axis=-1) == labels).astype("float32"), valid),
            "count": valid.sum(dtype="float32"),
        }

    def evaluate(student_params: PyTree, teacher_params: PyTree) -> Iterator[tuple[str, float]]:
        whole = totals(context, sums, student_params, None)
        count = max(whole["count"], 1.0)
        yield from _figures(whole["nll"] / count)
        yield "mlm_accuracy", whole["right"] / count
        for name, layers in context.pruned.items():
            part = totals(context, sums, student_params, kept_mask(layers, of=context.student.num_layers))
            yield from _figures(part["nll"] / count, f"/{name}")

    return evaluate


def _figures(loss: float, of: str = "") -> Iterator[tuple[str, float]]:
    yield f"mlm_loss{of}", loss
    yield f"perplexity{of}", math.exp(min(loss, 700.0))  # e^700 is the last float64 holds
