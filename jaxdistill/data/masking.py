"""The masked-LM draw of DistilBERT: over whole groups of rows, rare tokens first.

DistilBERT draws the masked positions over its flattened batch, with weights that smooth token counts (Sanh et al. 2019
after the XLM code). Here a group of rows stands for that batch. Each group has random numbers of its own, so hosts and
accumulation may split a batch between groups, and the number of masked positions in a group has a static bound.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int64, Integer

from jaxdistill.data.batching import HostBatch, MakeBatch, read_rows
from jaxdistill.data.settings import MaskConfig
from jaxdistill.data.store import TokenStore
from jaxdistill.data.vocabulary import Vocabulary
from jaxdistill.errors import UserError


class MaskDraw(NamedTuple):
    """How masked positions are drawn and replaced: everything but the random numbers."""

    mask: MaskConfig
    vocabulary: Vocabulary
    weights: Float[np.ndarray, "vocab"]  # see `smoothing_weights`


def make_mask_draw(mask: MaskConfig, vocabulary: Vocabulary, token_counts: Integer[np.ndarray, "vocab"]) -> MaskDraw:
    """The MaskDraw of these settings for a text.

    Args:
      token_counts: how often each id stands in the text, for the smoothing.

    Raises:
      UserError: no mask token, token counts of another vocabulary, or a smoothing with which frequent tokens could not
        be drawn.
    """
    if vocabulary.mask is None:
        raise UserError("the tokenizer has no mask token; masked-LM distillation needs one")
    if len(token_counts) != vocabulary.size:
        raise UserError(
            f"{len(token_counts)} token counts for a tokenizer of {vocabulary.size} ids; count with the same tokenizer"
        )
    weights = smoothing_weights(token_counts, smoothing=mask.smoothing, special=vocabulary.special)
    drawn = np.delete(np.arange(vocabulary.size), list(vocabulary.special))
    if len(drawn) and (smallest := weights[drawn].min()) < np.finfo(np.float64).tiny:
        raise UserError(
            f"config.mask.smoothing={mask.smoothing:g} is too large for this text: the weight of its most frequent "
            f"token, which it has {token_counts[drawn].max():,} times, is {smallest:g}, so the token is never masked; "
            "lower the smoothing (the DistilBERT scripts use 0.7)"
        )
    return MaskDraw(mask, vocabulary, weights)


def smoothing_weights(
    counts: Integer[np.ndarray, "vocab"], *, smoothing: float, special: Iterable[int]
) -> Float[np.ndarray, "vocab"]:
    """max(count, 1) ** -smoothing, and 0 for special tokens.

    The DistilBERT scripts smooth with 0.7; 0 draws all tokens alike.
    """
    weights = np.maximum(counts, 1).astype(np.float64) ** -smoothing
    weights[list(special)] = 0.0
    return weights


def masked_capacity(*, fraction: float, group: int, width: int) -> int:
    """The most positions that are masked in a group of `group` rows: a static bound, reached without padding."""
    return math.ceil(fraction * group * width)


def group_masking(store: TokenStore, draw: MaskDraw, *, seed: int, first_group: int) -> MakeBatch:
    """Makes the batches of training, as `mask_batch`."""

    def make(step: int, ids: Int64[np.ndarray, "batch"], width: int) -> HostBatch:
        batch = read_rows(store, ids, width=width, pad=draw.vocabulary.pad)
        return mask_batch(batch, draw, seed=seed, step=step, first_group=first_group)

    return make


def content_masking(store: TokenStore, draw: MaskDraw, *, epoch_steps: int) -> MakeBatch:
    """Makes the batches of training with masks that are a function of a row's tokens, mask.seed and the epoch.

    After mask.epochs epochs the same masks come again. Each row is masked by itself, so a *row* has at most
    masked_capacity(fraction=…, group=1, width=…) masked positions.

    Args:
      epoch_steps: batches of an epoch.
    """

    def make(step: int, ids: Int64[np.ndarray, "batch"], width: int) -> HostBatch:
        batch = read_rows(store, ids, width=width, pad=draw.vocabulary.pad)
        epoch = step // epoch_steps % draw.mask.epochs
        rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        return mask_groups(batch, draw, keys=[(draw.mask.seed, epoch, _content(ids[real])) for ids, real in rows])

    return make


def _content(ids: Integer[np.ndarray, "length"]) -> int:
    """A number that stands for these ids."""
    return int.from_bytes(hashlib.sha256(ids.astype("<i4").tobytes()).digest()[:16], "little")


def row_masking(store: TokenStore, draw: MaskDraw, *, seed: int) -> MakeBatch:
    """Makes the batches of an evaluation, in which each row is masked by itself.

    The random numbers depend on the seed and the number of the row in the store: two runs see the same masked
    positions, whatever their batch sizes, buckets, hosts and training seeds. So mask.group is not used, and a *row* has
    at most masked_capacity(fraction=…, group=1, width=…) masked positions.
    """

    def make(step: int, ids: Int64[np.ndarray, "batch"], width: int) -> HostBatch:
        batch = read_rows(store, ids, width=width, pad=draw.vocabulary.pad)
        # + 1: EMPTY is -1, and keys are not negative
        return mask_groups(batch, draw, keys=[(seed, int(row) + 1) for row in ids])

    return make


def mask_batch(batch: HostBatch, draw: MaskDraw, *, seed: int, step: int, first_group: int) -> HostBatch:
    """Masks each group of mask.group consecutive rows; see `mask_groups`.

    The random numbers of a group depend on the seed, the step and the index of the group in the batch of all hosts.

    Args:
      first_group: index of this host's first group in the batch of all hosts.
    """
    rows, group = len(batch["input_ids"]), draw.mask.group
    assert rows % group == 0, (rows, group)
    return mask_groups(batch, draw, keys=[(seed, step, first_group + i) for i in range(rows // group)])


def mask_groups(batch: HostBatch, draw: MaskDraw, *, keys: Sequence[tuple[int, ...]]) -> HostBatch:
    """Masks a share mask.fraction, rounded up, of the real tokens of each of len(keys) groups of consecutive rows.

    Args:
      batch: input_ids and attention_mask, [batch, width]; the arrays are not changed.
      keys: non-negative integers that seed the random numbers of each group.

    Returns:
      The batch with replaced input_ids, labels (int32, the original ids everywhere) and label_mask (bool: the masked
      positions), [batch, width]. Padding changes nothing: random numbers are drawn for real tokens only.
    """
    labels, attention_mask = batch["input_ids"], batch["attention_mask"]
    real = np.flatnonzero(attention_mask)
    tokens = labels.reshape(-1)[real]
    weights = draw.weights[tokens]
    ends = np.cumsum(attention_mask.reshape(len(keys), -1).sum(axis=1))

    chosen, replacements = [], []
    for key, start, end in zip(keys, [0, *ends[:-1]], ends, strict=True):
        rng = np.random.default_rng(key)
        places = start + _draw(rng, weights[start:end], math.ceil(draw.mask.fraction * int(end - start)))
        chosen.append(places)
        replacements.append(_replace(rng, tokens[places], draw))
    positions = real[np.concatenate(chosen)]

    input_ids = labels.copy()
    input_ids.reshape(-1)[positions] = np.concatenate(replacements)
    label_mask = np.zeros(labels.shape, bool)
    label_mask.reshape(-1)[positions] = True
    return {**batch, "input_ids": input_ids, "labels": labels, "label_mask": label_mask}


def _draw(rng: np.random.Generator, weights: Float[np.ndarray, "n"], count: int) -> Integer[np.ndarray, "count"]:
    """Positions drawn one after another without replacement, each with probability ~ weight among those left.

    The `count` smallest of Exponential(1) / weight are such a draw (Efraimidis and Spirakis 2006); -log of that
    quotient is the Gumbel-top-k trick. Fewer than `count` come back only where fewer have a weight above 0.
    """
    candidates = np.flatnonzero(weights)
    times = rng.standard_exponential(len(candidates)) / weights[candidates]
    if count < len(candidates):
        # Sorted, because the order that argpartition leaves differs between CPUs.
        candidates = candidates[np.sort(np.argpartition(times, count)[:count])]
    return candidates


def _replace(rng: np.random.Generator, tokens: Integer[np.ndarray, "n"], draw: MaskDraw) -> Integer[np.ndarray, "n"]:
    vocabulary = draw.vocabulary
    assert vocabulary.mask is not None, "make_mask_draw refuses such a vocabulary"
    uniform = rng.random(len(tokens)) * sum(draw.mask.replace)
    random_ids = rng.integers(0, vocabulary.size, len(tokens))
    to_mask, keep, _ = draw.mask.replace
    return np.where(uniform < to_mask, vocabulary.mask, np.where(uniform < to_mask + keep, tokens, random_ids))
