"""Pseudo-perplexity: every token masked in its turn (Salazar et al. 2020, eq. 4)."""

import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, PyTree

from jaxdistill.console import counted
from jaxdistill.evaluate.context import Context, Evaluator
from jaxdistill.knobs import Section, knob
from jaxdistill.losses.divergences import cross_entropy
from jaxdistill.models import intercept
from jaxdistill.models.inputs import Inputs
from jaxdistill.step import sharding


class PseudoPerplexityConfig(Section):
    """The knobs of pseudo_perplexity."""

    pseudo_rows: int = knob(
        32, "Rows that pseudo_perplexity reads; each token takes a forward pass.", ge=1, resumable=True
    )


def make_pseudo_perplexity(context: Context, settings: PseudoPerplexityConfig) -> Evaluator:
    """Yields pseudo_perplexity = exp(-(1/N) sum_t log q(x_t | all other tokens)) over the first `pseudo_rows` rows."""
    score = _make_scorer(context)
    copies = len(context.batches[0]["input_ids"])

    def evaluate(student_params: PyTree, teacher_params: PyTree) -> Iterator[tuple[str, float]]:
        nll, count = 0.0, 0
        rows = list(_rows(context, settings.pseudo_rows))
        for ids, attention_mask in counted(rows, "masking every token in its turn", unit="rows"):
            scored = np.flatnonzero(attention_mask & ~np.isin(ids, context.text.vocabulary.special))
            for positions in _batched(scored, copies):
                padded = np.resize(positions, copies)  # one compiled shape; the repeats are cut off again
                on_device = sharding.put_batch({"positions": padded}, context.mesh)["positions"]
                values = score(student_params, ids, attention_mask, on_device)
                nll += float(np.asarray(values, np.float64)[: len(positions)].sum())
            count += len(scored)
        yield "pseudo_perplexity", math.exp(min(nll / max(count, 1), 700.0))

    return evaluate


def _make_scorer(context: Context) -> Callable[[PyTree, np.ndarray, np.ndarray, Array], Array]:
    """Returns score(params, row, attention_mask, positions): -log q of the tokens at these positions of the row."""
    mask_id = context.text.vocabulary.mask
    assert mask_id is not None, "EVALUATORS says that this evaluator is for masked LMs"

    @jax.jit
    def score(
        params: PyTree,
        row: Int[Array, "length"],
        attention_mask: Bool[Array, "length"],
        positions: Int[Array, "copies"],
    ) -> Float[Array, "copies"]:
        copies = jnp.broadcast_to(row, (positions.size, row.size))
        masked = jnp.where(jnp.arange(row.size)[None, :] == positions[:, None], mask_id, copies)
        outputs = intercept.apply(
            context.student,
            params,
            Inputs(masked, jnp.broadcast_to(attention_mask, copies.shape)),
            positions=positions[:, None],
        )
        return cross_entropy(outputs.logits[:, 0], row[positions])

    return score


def _rows(context: Context, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(token ids, attention mask) of the first held-out rows, unmasked: the labels are the original ids."""
    for batch in context.batches:
        original = np.where(batch["label_mask"], batch["labels"], batch["input_ids"])
        yield from zip(original[:count], batch["attention_mask"][:count], strict=True)
        count -= len(original)
        if count <= 0:
            return


def _batched(values: Integer[np.ndarray, "n"], size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(values), size):
        yield values[start : start + size]
