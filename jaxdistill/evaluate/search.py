"""Which layers a student should keep: subsets of a model's layers scored on held-out text, without cutting them out."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxdistill.evaluate.context import Context, labelled, token_sums
from jaxdistill.losses.functions import cross_entropy, forward_kl
from jaxdistill.losses.fused_head import Head
from jaxdistill.models.layer_drop import kept_mask
from jaxdistill.models.student import resolve_layers
from jaxdistill.step import sharding

EXHAUSTIVE = 256  # subsets that are all scored; where there are more, layers are taken out one by one
NAMED = ("every_other", "first:{}", "last:{}", "spread:{}")

Layers = tuple[int, ...]


class Score(NamedTuple):
    layers: Layers
    loss: float  # nats a masked token, or a next one
    kl: float  # KL(whole model || sub-network) at temperature 1, nats a token


def search_layers(context: Context, params: PyTree, *, count: int) -> tuple[Score, list[Score]]:
    """Scores the whole of context.student, and subsets of `count` of its layers, those closest to the whole first.

    All subsets where there are no more than EXHAUSTIVE. Else backward elimination: from the whole model, the layer
    whose loss costs least KL goes, until one too many is left; then every way to take out the last is scored, and the
    usual choices (NAMED) beside them.
    """
    score = make_scorer(context)
    whole = tuple(range(context.student.num_layers))
    if math.comb(len(whole), count) <= EXHAUSTIVE:
        subsets = set(itertools.combinations(whole, count))
    else:
        left = whole
        while len(left) > count + 1:
            left = min(score(params, _one_fewer(left)), key=lambda s: s.kl).layers
        subsets = set(_one_fewer(left)) | set(named(count, of=len(whole)))
    first, *scores = score(params, [whole, *sorted(subsets)])
    return first, sorted(scores, key=lambda s: s.kl)


def named(count: int, *, of: int) -> dict[Layers, str]:
    """The usual choices of `count` layers, and what they are called."""
    specs = [spec.format(count) for spec in NAMED]
    found = {spec: resolve_layers(spec, of=of) for spec in specs}
    return {layers: spec.split(":")[0] for spec, layers in reversed(found.items()) if len(layers) == count}


def make_scorer(context: Context) -> Callable[[PyTree, Sequence[Layers]], list[Score]]:
    """Returns score(params, subsets): held-out loss, and KL to the whole model, of each; compiled once for all."""
    model = context.student
    whole = jax.jit(lambda params, batch: labelled(context, model, params, batch))

    @jax.jit
    def sums(
        params: PyTree, kept: Bool[Array, "layers"], batch: Mapping[str, Array], teacher: Head
    ) -> dict[str, Array]:
        return token_sums(context, _score, labelled(context, model, params, batch, kept), teacher)

    def score(params: PyTree, subsets: Sequence[Layers]) -> list[Score]:
        totals, count = np.zeros((len(subsets), 2)), 0
        for host_batch in context.batches:
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


def _one_fewer(layers: Layers) -> list[Layers]:
    return [tuple(x for x in layers if x != out) for out in layers]
