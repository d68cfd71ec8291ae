"""What an evaluator is built from, and the sums they share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxdistill import sharding
from jaxdistill.generate import Decoding
from jaxdistill.models import intercept, layer_drop
from jaxdistill.models.load import Model

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


def labelled_logits(
    context: Context,
    model: Model,
    params: PyTree,
    batch: Mapping[str, Array],
    kept: Bool[Array, "layers"] | None = None,
) -> tuple[Float[Array, "batch k vocab"], Int[Array, "batch k"], Bool[Array, "batch k"]]:
    """Logits, labels and validity at the masked positions, which alone go through the head; of causal models, at all.

    kept: the layers that run; None = all.
    """
    positions, labels, valid = None, batch["labels"], batch["label_mask"]
    if not model.family.causal:
        capacity = context.capacity(labels.shape[1])
        positions, valid = intercept.head_positions(valid, group=1, capacity=capacity)
        labels = intercept.gather_tokens(labels, positions)
    logits = intercept.apply(
        model,
        params,
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        segment_ids=batch.get("segment_ids"),
        positions=positions,
        interceptors=() if kept is None else (layer_drop.keep_layers(model.family, kept),),
    ).logits
    return logits.astype("float32"), labels, valid


def totals(context: Context, sums: Callable[..., Mapping[str, Array]], *params: PyTree) -> dict[str, float]:
    """Adds up a jitted function's sums over all held-out batches, in float64, exact for any batch size."""
    whole: dict[str, float] = {}
    for batch in context.batches:
        for name, value in jax.device_get(sums(*params, sharding.put_batch(dict(batch), context.mesh))).items():
            whole[name] = whole.get(name, 0.0) + float(value)
    return whole
