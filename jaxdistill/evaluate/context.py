"""What an evaluator is built from, and the sums they share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxdistill.losses.functions import masked_sum
from jaxdistill.losses.fused_head import Head, chunk_size, logits
from jaxdistill.models import intercept, layer_drop
from jaxdistill.models.model import Model
from jaxdistill.sampling.generate import Decoding
from jaxdistill.step import sharding

# (student_params, teacher_params) -> figures
Evaluator = Callable[[PyTree, PyTree], Iterator[tuple[str, float]]]


class Completions(NamedTuple):
    """Held-out prompts, what should come after them, and how the models are asked."""

    prompts: Sequence[str]
    prompt_ids: Sequence[Sequence[int]]
    references: Sequence[str]
    decoding: Decoding
    batch_size: int
    tokenizer: Any
    take: Callable[[list[dict[str, str]]], None] | None = None  # gets what was written, after every evaluation


class Context(NamedTuple):
    student: Model
    teacher: Model | None
    batches: Sequence[Mapping[str, np.ndarray]]  # held-out rows, of masked LMs with fixed masks: two runs compare
    mesh: Mesh
    capacity: Callable[[int], int]  # length -> the most masked positions a row has
    mask_id: int | None  # of masked LMs
    special_ids: tuple[int, ...]
    pseudo_rows: int
    pruned: Mapping[str, tuple[int, ...]]  # sub-networks of the student to measure too: name -> its layers
    completions: Completions | None = None  # for rouge


class Labelled(NamedTuple):
    """The tokens that are measured, before the head: of masked LMs the masked ones, of causal ones all."""

    head: Head
    labels: Int[Array, "batch k"]
    valid: Bool[Array, "batch k"]


def labelled(
    context: Context,
    model: Model,
    params: PyTree,
    batch: Mapping[str, Array],
    kept: Bool[Array, "layers"] | None = None,
) -> Labelled:
    """kept: the layers that run; None = all."""
    positions, labels, valid = None, batch["labels"], batch["label_mask"]
    if not model.family.causal:
        capacity = context.capacity(labels.shape[1])
        positions, valid = intercept.head_positions(valid, group=1, capacity=capacity)
        labels = intercept.gather_tokens(labels, positions)
    outputs = intercept.apply(
        model,
        params,
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        segment_ids=batch.get("segment_ids"),
        positions=positions,
        interceptors=() if kept is None else (layer_drop.keep_layers(model.family, kept),),
    )
    return Labelled(intercept.head_of(model, params, outputs), labels, valid)


def token_sums(
    context: Context, figures: Callable[..., Mapping[str, Array]], student: Labelled, *others: Head
) -> dict[str, Float[Array, ""]]:
    """Sums over the valid tokens, their `count`, and of figures(labels, the student's logits, others' ...).

    By a few tokens of every row at a time, so that there is no [batch, k, vocab] array; each device does its own rows.
    """
    rows, length = student.labels.shape
    chunk = chunk_size(tokens=rows * length // context.mesh.size, platform=context.mesh.devices.flat[0].platform)
    width = min(max(chunk * context.mesh.size // rows, 1), length)
    pieces = -(-length // width)
    heads = (student.head, *others)

    def cut(x: Array) -> Array:
        """[batch, k ...] -> [pieces, batch, width ...]; what is filled in is 0 and not valid."""
        filled = jnp.pad(x, [(0, 0), (0, pieces * width - length), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(filled.reshape(rows, pieces, width, *x.shape[2:]), 1, 0)

    def one(piece: Any) -> dict[str, Array]:
        features, labels, valid = piece
        made = (logits(head._replace(features=x)).astype("float32") for head, x in zip(heads, features, strict=True))
        return {name: masked_sum(value, valid) for name, value in figures(labels, *made).items()}

    parts = jax.lax.map(one, jax.tree.map(cut, ([head.features for head in heads], student.labels, student.valid)))
    return {"count": student.valid.sum(dtype="float32"), **{name: x.sum() for name, x in parts.items()}}


def totals(context: Context, sums: Callable[..., Mapping[str, Array]], *params: PyTree) -> dict[str, float]:
    """Adds up a jitted function's sums over all held-out batches, in float64, exact for any batch size."""
    whole: dict[str, float] = {}
    for batch in context.batches:
        for name, value in jax.device_get(sums(*params, sharding.put_batch(dict(batch), context.mesh))).items():
            whole[name] = whole.get(name, 0.0) + float(value)
    return whole
