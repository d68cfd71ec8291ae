"""Pseudo-perplexity: every token masked in its turn (Salazar et al. 2020, eq. 4)."""

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree

from jaxdistill.evaluate.context import Context, Evaluator
from jaxdistill.losses.functions import cross_entropy
from jaxdistill.models import intercept
from jaxdistill.step import sharding


def make_pseudo_perplexity(context: Context) -> Evaluator:
    """Yields pseudo_perplexity = exp(-(1/N) sum_t log q(x_t | all other tokens)) over the first `pseudo_rows` rows."""

    mask_id = context.mask_id
    assert mask_id is not None  # EVALUATORS says that this is for masked LMs

    @jax.jit
    def score(
        params: PyTree,
        row: Int[Array, "length"],
        attention_mask: Bool[Array, "length"],
        positions: Int[Array, "copies"],
    ) -> Array:
        copies = jnp.broadcast_to(row, (positions.size, row.size))
        masked = jnp.where(jnp.arange(row.size)[None, :] == positions[:, None], mask_id, copies)
        outputs = intercept.apply(
            context.student,
            params,
            input_ids=masked,
            attention_mask=jnp.broadcast_to(attention_mask, copies.shape),
            positions=positions[:, None],
        )
        return cross_entropy(outputs.logits[:, 0], row[positions])

    def evaluate(student_params: PyTree, teacher_params: PyTree) -> Iterator[tuple[str, float]]:
        nll, count = 0.0, 0
        for ids, mask in _rows(context):
            scored = np.flatnonzero(mask & ~np.isin(ids, context.special_ids))
            copies = len(next(iter(context.batches))["input_ids"])
            for start in range(0, len(scored), copies):
                some = scored[start : start + copies]
                padded = np.resize(some, copies)  # one compiled shape; the repeats are cut off again
                values = score(student_params, ids, mask, sharding.put_batch({"p": padded}, context.mesh)["p"])
                nll += float(np.asarray(values, np.float64)[: len(some)].sum())
            count += len(scored)
        yield "pseudo_perplexity", math.exp(min(nll / max(count, 1), 700.0))

    return evaluate


def _rows(context: Context) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The first rows of the held-out text, unmasked: the labels are the original ids."""
    left = context.pseudo_rows
    for batch in context.batches:
        original = np.where(batch["label_mask"], batch["labels"], batch["input_ids"])
        yield from zip(original[:left], batch["attention_mask"][:left], strict=True)
        left -= len(original)
        if left <= 0:
            return
