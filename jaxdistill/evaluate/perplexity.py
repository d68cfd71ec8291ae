"""Perplexity of the student, and of its sub-networks: on fixed masks for masked LMs, per token for causal LMs."""

import math
from collections.abc import Iterator, Mapping

import jax
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxdistill.errors import UserError
from jaxdistill.evaluate.context import Context, Evaluator, measured_tokens, token_sums, totals
from jaxdistill.knobs import Section, knob
from jaxdistill.losses.divergences import cross_entropy
from jaxdistill.models.layer_choice import resolve_layers
from jaxdistill.models.layer_drop import kept_mask
from jaxdistill.models.model import Model


class PerplexityConfig(Section):
    """The knobs of perplexity."""

    pruned: tuple[str, ...] = knob(
        (),
        "Sub-networks that are measured as well, each named as in student.layers: ('every_other', 'first:2', '0,3').",
        resumable=True,
    )


def make_perplexity(context: Context, settings: PerplexityConfig) -> Evaluator:
    """Yields the loss in nats, perplexity = exp(loss) and the accuracy.

    They are named mlm_loss, perplexity and mlm_accuracy for masked LMs, means over the masked tokens; and clm_loss,
    perplexity and clm_accuracy for causal LMs, means over the tokens to be predicted.

    Loss and perplexity of every sub-network in `settings.pruned` follow, named as `mlm_loss/every_other`: those of the
    student that this cut would give now, without further training.
    """
    task = "clm" if context.student.family.causal else "mlm"
    pruned = pruned_layers(settings, context.student)

    @jax.jit
    def sums(params: PyTree, kept: Bool[Array, "layers"] | None, batch: Mapping[str, Array]) -> dict[str, Array]:
        return token_sums(context, _score, measured_tokens(context, context.student, params, batch, kept))

    def evaluate(student_params: PyTree, teacher_params: PyTree) -> Iterator[tuple[str, float]]:
        total = totals(context, sums, student_params, None)
        count = max(total["count"], 1.0)
        yield from _figures(task, total["nll"] / count)
        yield f"{task}_accuracy", total["right"] / count
        for name, layers in pruned.items():
            part = totals(context, sums, student_params, kept_mask(layers, of=context.student.num_layers))
            yield from _figures(task, part["nll"] / count, f"/{name}")

    return evaluate


def pruned_layers(settings: PerplexityConfig, model: Model) -> dict[str, tuple[int, ...]]:
    """The layers of every sub-network that is measured, by its specification in `settings.pruned`.

    Raises:
      UserError: a specification names layers that the model does not have.
    """
    try:
        return {spec: resolve_layers(spec, of=model.num_layers, period=model.period) for spec in settings.pruned}
    except UserError as e:
        raise UserError(f"config.evaluate.pruned, of the student's {model.num_layers} layers: {e}") from None


def _score(
    labels: Int[Array, "batch tokens"], logits: Float[Array, "batch tokens vocab"]
) -> dict[str, Float[Array, "batch tokens"]]:
    return {
        "nll": cross_entropy(logits, labels),
        "right": (logits.argmax(axis=-1) == labels).astype("float32"),
    }


def _figures(task: str, loss: float, suffix: str = "") -> Iterator[tuple[str, float]]:
    yield f"{task}_loss{suffix}", loss
    yield f"perplexity{suffix}", math.exp(min(loss, 700.0))  # above e^709 a float64 overflows
