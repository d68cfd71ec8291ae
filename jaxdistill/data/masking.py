"""The masked-LM draw of DistilBERT: over whole groups of rows, rare tokens first.

DistilBERT draws the masked positions over its flattened batch, with weights that smooth token counts (Sanh et
al. 2019 after the XLM code). A group of rows stands for that batch here: each group has random numbers of its
own, so hosts and accumulation may split a batch between groups, and the number of masked positions a group
has a static bound.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float, Integer

from jaxdistill.data.tokenize import Vocabulary

Batch = dict[str, np.ndarray]


def smoothing_weights(
    counts: Integer[np.ndarray, "vocab"], *, smoothing: float, special: Iterable[int]
) -> Float[np.ndarray, "vocab"]:
    """max(count, 1) ** -smoothing, and 0 for special tokens. The reference smooths with 0.7; 0 is the plain
    draw."""
    weights = np.maximum(counts, 1).astype(np.float64) ** -smoothing
    weights[list(special)] = 0.0
    return weights


def masked_capacity(*, fraction: float, group: int, width: int) -> int:
    """The most positions that are masked in one group: a static bound, reached when no position is
    padding."""
    return math.ceil(fraction * group * width)


def mask_batch(
    batch: Batch,
    *,
    vocabulary: Vocabulary,
    weights: Float[np.ndarray, "vocab"],
    fraction: float,
    replace: tuple[float, float, float],
    group: int,
    seed: int,
    step: int,
    first_group: int = 0,
) -> Batch:
    """Masks each group of `group` consecutive rows with random numbers keyed on (seed, step, first_group +
    its index).

    Args:
      batch: input_ids and attention_mask, [batch, width]; left as they are.
      weights: of `smoothing_weights`.
      fraction: of the real tokens of a group that is masked, rounded up.
      replace: probabilities that a masked position becomes the mask token, stays, becomes a random token.
      first_group: index of the first group here within the batch of all hosts.

    Returns:
      The batch with replaced input_ids, labels (int32, the original ids everywhere) and label_mask (bool:
      where they count), [batch, width]. Padding changes nothing: the numbers are drawn for real tokens only.
    """
    rows = len(batch["input_ids"])
    assert rows % group == 0, (rows, group)
    keys = [(seed, step, first_group + index) for index in range(rows // group)]
    return mask_groups(batch, keys=keys, vocabulary=vocabulary, weights=weights, fraction=fraction, replace=replace)


def mask_groups(
    batch: Batch,
    *,
    keys: Sequence[tuple[int, ...]],
    vocabulary: Vocabulary,
    weights: Float[np.ndarray, "vocab"],
    fraction: float,
    replace: tuple[float, float, float],
) -> Batch:
    """`mask_batch` with a key, of non-negative integers, for each of len(keys) groups of equally many
    rows."""
    labels, attention_mask = batch["input_ids"], batch["attention_mask"]
    real = np.flatnonzero(attention_mask)
    tokens = labels.reshape(-1)[real]
    token_weights = weights[tokens]
    ends = np.cumsum(attention_mask.reshape(len(keys), -1).sum(axis=1))

    chosen, replacements = [], []
    for key, start, end in zip(keys, [0, *ends[:-1]], ends, strict=True):
        rng = np.random.default_rng(key)
        where = start + _draw(rng, token_weights[start:end], math.ceil(fraction * int(end - start)))
        chosen.append(where)
        replacements.append(_replace(rng, tokens[where], vocabulary, replace))
    positions = real[np.concatenate(chosen)]

    input_ids = labels.copy()
    input_ids.reshape(-1)[positions] = np.concatenate(replacements)
    label_mask = np.zeros(labels.shape, bool)
    label_mask.reshape(-1)[positions] = True
    return {**batch, "input_ids": input_ids, "labels": labels, "label_mask": label_mask}


def _draw(rng: np.random.Generator, weights: Float[np.ndarray, "n"], count: int) -> Integer[np.ndarray, "count"]:
    """Positions drawn one after the other without replacement, each with probability ~ weight among those
    left.

    The `count` smallest of Exponential(1) / weight are such a draw (Efraimidis and Spirakis 2006); -log of it
    is the Gumbel-top-k trick. Fewer than `count` come back only where fewer have a weight above 0.
    """
    candidates = np.flatnonzero(weights)
    times = rng.standard_exponential(len(candidates)) / weights[candidates]
    if count < len(candidates):
        # Sorted, because which order argpartition leaves differs between CPUs.
        candidates = candidates[np.sort(np.argpartition(times, count)[:count])]
    return candidates


def _replace(
    rng: np.random.Generator,
    tokens: Integer[np.ndarray, "n"],
    vocabulary: Vocabulary,
    replace: tuple[float, float, float],
) -> Integer[np.ndarray, "n"]:
    assert vocabulary.mask is not None
    uniform = rng.random(len(tokens)) * sum(replace)
    random_ids = rng.integers(0, vocabulary.size, len(tokens))
    to_mask, keep, _ = replace
    return np.where(uniform < to_mask, vocabulary.mask, np.where(uniform < to_mask + keep, tokens, random_ids))
