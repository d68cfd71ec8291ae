"""Which layers a student should keep: subsets of a model's layers, scored on held-out text without cutting them out."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxdistill.console import counted
from jaxdistill.evaluate.context import Context, measured_tokens, token_sums
from jaxdistill.losses.divergences import cross_entropy, forward_kl
from jaxdistill.models.head import Head
from jaxdistill.models.layer_choice import resolve_layers
from jaxdistill.models.layer_drop import kept_mask
from jaxdistill.step import sharding

EXHAUSTIVE = 256  # where there are no more subsets than this, all are scored; else layers are dropped one by one
USUAL = ("every_other", "first:{}", "last:{}", "spread:{}")

Layers = tuple[int, ...]


class Score(NamedTuple):
    """How a sub-network does on held-out text."""

    layers: Layers
    loss: float  # nats a masked token, or a token to be predicted
    kl: float  # KL(whole model || sub-network) at temperature 1, nats a token


def search_layers(
    context: Context, params: PyTree, *, count: int, choices: Sequence[Layers] | None = None
) -> tuple[Score, list[Score]]:
    """Scores the whole of context.student, and subsets of `count` of its layers, those closest to the whole first.

    All subsets are scored where there are no more than EXHAUSTIVE. Where there are more, the search goes backward: from
    the whole model, the layer that costs the least KL is dropped, again and again, until one layer too many is left.
    Then every way to drop the last one is scored, and beside these subsets the usual choices (USUAL).

    Args:
      choices: the only subsets that are scored, where not every subset makes a student of its own; None = all.
    """
    score = make_scorer(context)
    whole = tuple(range(context.student.num_layers))
    if choices is not None:
        subsets = set(choices)
    elif math.comb(len(whole), count) <= EXHAUSTIVE:
        subsets = set(itertools.combinations(whole, count))
    else:
        left = whole
        while len(left) > count + 1:
            left = min(score(params, _without_one(left)), key=lambda s: s.kl).layers
        subsets = set(_without_one(left)) | set(usual_choices(count, of=len(whole)))
    first, *scores = score(params, [whole, *sorted(subsets)])
    return first, sorted(scores, key=lambda s: s.kl)


def usual_choices(count: int, *, of: int) -> dict[Layers, str]:
    """The usual choices of `count` out of `of` layers, and their names."""
    specs = [spec.format(count) for spec in USUAL]
    found = {spec: resolve_layers(spec, of=of) for spec in specs}
    return {layers: spec.split(":")[0] for spec, layers in reversed(found.items()) if len(layers) == count}


def make_scorer(context: Context) -> Callable[[PyTree, Sequence[Layers]], list[Score]]:
    """Returns score(params, subsets): held-out loss, and KL to the whole model, of each; compiled once for all."""
    model = context.student
    whole = jax.jit(lambda params, batch: measured_tokens(context, model, params, batch))

    @jax.jit
    def sums(
        params: PyTree, kept: Bool[Array, "layers"], batch: Mapping[str, Array], teacher: Head
    ) -> dict[str, Array]:
        return token_sums(context, _score, measured_tokens(context, model, params, batch, kept), teacher)

    def score(params: PyTree, subsets: Sequence[Layers]) -> list[Score]:
        totals, count = np.zeros((len(subsets), 2)), 0
        for host_batch in counted(context.batches, f"scoring {len(subsets):,} choices of layers", unit="batches"):
            batch = sharding.put_batch(dict(host_batch), context.mesh)
            teacher = whole(params, batch)  # once a batch, whatever the number of subsets
            count += int(teacher.valid.sum())
            for i, layers in enumerate(subsets):
                found = jax.device_get(sums(params, kept_mask(layers, of=model.num_layers), batch, teacher.head))
                totals[i] += found["nll"], found["kl"]
        means = totals / max(count, 1)
        return [Score(layers, float(nll), float(kl)) for layers, (nll, kl) in zip(subsets, means, strict=True)]

    return score


def _score(
    labels: Int[Array, "batch tokens"],
    logits: Float[Array, "batch tokens vocab"],
    teacher: Float[Array, "batch tokens vocab"],
) -> dict[str, Float[Array, "batch tokens"]]:
    return {"nll": cross_entropy(logits, labels), "kl": forward_kl(logits, teacher, temperature=1.0)}


def _without_one(layers: Layers) -> list[Layers]:
    return [tuple(x for x in layers if x != dropped) for dropped in layers]
