"""What the evaluators share: their inputs, the tokens that they measure, and sums over these tokens."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxdistill.console import counted
from jaxdistill.data.masking import masked_capacity
from jaxdistill.data.text import Text
from jaxdistill.losses.divergences import masked_sum
from jaxdistill.losses.fused_head import chunk_size
from jaxdistill.models import intercept
from jaxdistill.models.axes import row_devices
from jaxdistill.models.head import Head, logits, over_words
from jaxdistill.models.inputs import Inputs
from jaxdistill.models.model import Model
from jaxdistill.models.positions import gather_tokens, head_positions
from jaxdistill.models.scan import layer_interceptors
from jaxdistill.step import sharding

# (student_params, teacher_params) -> (name, value) of each figure
Evaluator = Callable[[PyTree, PyTree], Iterator[tuple[str, float]]]


class ScoredCompletion(TypedDict):
    """The completion of a held-out prompt, and the text that it was compared with."""

    prompt: str
    completion: str
    reference: str


class Context(NamedTuple):
    """What an evaluator is made from, besides its settings."""

    student: Model
    teacher: Model | None
    tokenizer: Any  # transformers.PreTrainedTokenizerFast
    text: Text  # evaluators read its held-out rows and its vocabulary
    batches: Sequence[Mapping[str, np.ndarray]]  # held-out rows; the masks are fixed, so that runs can be compared
    mesh: Mesh
    batch_size: int  # rows of a held-out batch, over all hosts
    mask_fraction: float  # the share of a row's tokens that is masked, for masked LMs
    keep_completions: Callable[[list[ScoredCompletion]], None] | None = None  # called after every evaluation


class MeasuredTokens(NamedTuple):
    """The tokens that are measured, before the head: the masked tokens of masked LMs, all tokens of causal LMs."""

    head: Head
    labels: Int[Array, "batch k"]
    valid: Bool[Array, "batch k"]


def measured_tokens(
    context: Context,
    model: Model,
    params: PyTree,
    batch: Mapping[str, Array],
    kept: Bool[Array, "layers"] | None = None,
) -> MeasuredTokens:
    """Runs a model up to its head. `kept` says which of its layers run; None = all."""
    positions, labels, valid = None, batch["labels"], batch["label_mask"]
    if not model.family.causal:
        # Held-out rows are masked one by one, so a group is one row.
        capacity = masked_capacity(fraction=context.mask_fraction, group=1, width=labels.shape[1])
        positions, valid = head_positions(valid, group=1, capacity=capacity)
        labels = gather_tokens(labels, positions)
    outputs = intercept.apply(
        model,
        params,
        Inputs(batch["input_ids"], batch["attention_mask"], batch.get("segment_ids")),
        positions=positions,
        interceptors=layer_interceptors(model, kept=kept),
        mesh=context.mesh,
    )
    return MeasuredTokens(intercept.head_of(model, params, outputs.features), labels, valid)


def token_sums(
    context: Context, figures: Callable[..., Mapping[str, Array]], student: MeasuredTokens, *other_heads: Head
) -> dict[str, Float[Array, ""]]:
    """Sums of figures over the valid tokens, and the `count` of these tokens.

    Logits are computed for a few tokens of every row at a time, so that there is no [batch, k, vocab] array. Each
    device does its own rows. Several heads are compared over the words that all of them have.

    Args:
      figures: (labels, the student's logits, the logits of each other head) -> values [batch, tokens] by name.
    """
    words = min(head.words for head in (student.head, *other_heads))
    heads = [over_words(head, words) for head in (student.head, *other_heads)]
    width = _piece_width(context, *student.labels.shape)

    def sums_of_piece(piece: Any) -> dict[str, Array]:
        features, labels, valid = piece
        all_logits = (
            logits(head._replace(features=x)).astype("float32") for head, x in zip(heads, features, strict=True)
        )
        return {name: masked_sum(value, valid) for name, value in figures(labels, *all_logits).items()}

    tokens = [head.features for head in heads], student.labels, student.valid
    sums = jax.lax.map(sums_of_piece, jax.tree.map(lambda x: _in_pieces(x, width), tokens))
    return {"count": student.valid.sum(dtype="float32"), **{name: x.sum() for name, x in sums.items()}}


def _piece_width(context: Context, rows: int, length: int) -> int:
    """How many tokens of each row go through the head at a time."""
    devices = row_devices(context.mesh)
    chunk = chunk_size(tokens=rows * length // devices, platform=context.mesh.devices.flat[0].platform)
    return min(max(chunk * devices // rows, 1), length)


def _in_pieces(x: Array, width: int) -> Array:
    """[batch, k ...] -> [pieces, batch, width ...]; tokens that fill up the last piece are 0, so not valid."""
    rows, length = x.shape[:2]
    pieces = -(-length // width)
    filled = jnp.pad(x, [(0, 0), (0, pieces * width - length), *[(0, 0)] * (x.ndim - 2)])
    return jnp.moveaxis(filled.reshape(rows, pieces, width, *x.shape[2:]), 1, 0)


def totals(context: Context, sums: Callable[..., Mapping[str, Array]], *params: PyTree) -> dict[str, float]:
    """Adds up the sums of a jitted function over all held-out batches, in float64, exact for any batch size."""
    total: dict[str, float] = {}
    for batch in counted(context.batches, "measuring", unit="batches"):
        for name, value in jax.device_get(sums(*params, sharding.put_batch(dict(batch), context.mesh))).items():
            total[name] = total.get(name, 0.0) + float(value)
    return total
