"""Perplexity of the student, and of its sub-networks: of masked LMs on fixed masks, of causal ones a token."""

import math
from collections.abc import Iterator, Mapping

import jax
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxdistill.evaluate.context import Context, Evaluator, labelled, token_sums, totals
from jaxdistill.losses.functions import cross_entropy
from jaxdistill.models.layer_drop import kept_mask


def make_perplexity(context: Context) -> Evaluator:
    """Yields mlm_loss (nats a masked token), perplexity = exp(mlm_loss) and mlm_accuracy; or clm_loss (nats a token
    to be predicted), perplexity and clm_accuracy.

    Then the first two of every sub-network in context.pruned, as `mlm_loss/every_other`: what it would be worth if it
    were cut out now.
    """

    task = "clm" if context.student.family.causal else "mlm"

    @jax.jit
    def sums(params: PyTree, kept: Bool[Array, "layers"] | None, batch: Mapping[str, Array]) -> dict[str, Array]:
        return token_sums(context, _score, labelled(context, context.student, params, batch, kept))

    def evaluate(student_params: PyTree, teacher_params: PyTree) -> Iterator[tuple[str, float]]:
        whole = totals(context, sums, student_params, None)
        count = max(whole["count"], 1.0)
        yield from _figures(task, whole["nll"] / count)
        yield f"{task}_accuracy", whole["right"] / count
        for name, layers in context.pruned.items():
            part = totals(context, sums, student_params, kept_mask(layers, of=context.student.num_layers))
            yield from _figures(task, part["nll"] / count, f"/{name}")

    return evaluate


def _score(
    labels: Int[Array, "batch tokens"], logits: Float[Array, "batch tokens vocab"]
) -> dict[str, Float[Array, "batch tokens"]]:
    return {
        "nll": cross_entropy(logits, labels),
        "right": (logits.argmax(axis=-1) == labels).astype("float32"),
    }


def _figures(task: str, loss: float, of: str = "") -> Iterator[tuple[str, float]]:
    yield f"{task}_loss{of}", loss
    yield f"perplexity{of}", math.exp(min(loss, 700.0))  # e^700 is the last float64 holds
