"""Which rows make a batch, and how they become arrays of a few static shapes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, Integer

from jaxdistill.data.settings import DataConfig
from jaxdistill.data.store import TokenStore
from jaxdistill.errors import UserError

EMPTY = -1
"""Row id of a slot that holds no row."""

HostBatch = dict[str, np.ndarray]
"""Arrays of one host by name, [rows, width] each."""

MakeBatch = Callable[[int, Int64[np.ndarray, "batch"], int], HostBatch]
"""(step, row ids, width in tokens) -> the batch of these rows."""


@dataclass(frozen=True)
class Plan:
    """The batches of one epoch: row ids (EMPTY = no row) and the static width of each batch, in tokens."""

    ids: Int64[np.ndarray, "steps batch"]
    widths: Int64[np.ndarray, "steps"]


def buckets_of(data: DataConfig) -> tuple[int, ...]:
    """The widths that batches may have, in tokens."""
    return (data.max_length,) if data.packed else data.buckets or default_buckets(data.max_length)


def default_buckets(max_length: int) -> tuple[int, ...]:
    """An eighth, a quarter, a half and the whole of max_length, in multiples of 8.

    Halving keeps padding below half of any batch with four compilations; 128 gives (16, 32, 64, 128).
    """
    widths = {min(max_length, -(-max_length // part // 8) * 8) for part in (8, 4, 2)}
    return tuple(sorted(widths | {max_length}))


def plan_epoch(
    lengths: Integer[np.ndarray, "rows"],
    *,
    batch_size: int,
    buckets: tuple[int, ...],
    seed: int,
    epoch: int,
    shuffle: bool = True,
) -> Plan:
    """Batches of rows of similar length, as the length-grouped sampler of DistilBERT draws them.

    Rows come in random order and join the bucket of the narrowest width that holds them; a full bucket becomes a batch,
    in order of completion. The rows left over are strung together from narrow to wide and cut into batches of the width
    of their widest row; EMPTY fills the last batch. Each row comes exactly once, in ceil(rows / batch_size) batches.

    Args:
      seed, epoch: decide together on the order of the rows.
      shuffle: False takes the rows in their order in the store.

    Raises:
      UserError: a row is longer than the widest bucket.
    """
    widths = np.array(sorted(buckets), np.int64)
    if len(lengths) and (longest := int(lengths.max())) > widths[-1]:
        raise UserError(
            f"a row of {longest} tokens does not fit the widest bucket of {widths[-1]}; "
            "prepare the data with that max_length, or add a wider bucket"
        )
    rows = len(lengths)
    order = np.random.default_rng((seed, epoch)).permutation(rows) if shuffle else np.arange(rows)
    group = np.searchsorted(widths, lengths[order])
    # Stable: rows stay in drawing order within a bucket. `place` is the position of a row in that order.
    place = np.argsort(group, kind="stable")
    sizes = np.bincount(group, minlength=len(widths))
    rank = np.arange(rows) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    full = rank < np.repeat(sizes // batch_size * batch_size, sizes)

    batches = place[full].reshape(-1, batch_size)
    batches = batches[np.argsort(batches[:, -1])]
    rest = place[~full]
    filled = np.full(-(-len(rest) // batch_size) * batch_size, EMPTY, np.int64)
    filled[: len(rest)] = rest
    places = np.concatenate([batches, filled.reshape(-1, batch_size)])

    real = places != EMPTY
    # An EMPTY slot reads some row here, and is masked right after.
    ids = np.where(real, order[places] if rows else EMPTY, EMPTY)
    widest = np.where(real, group[places] if rows else 0, 0).max(axis=1, initial=0)
    return Plan(ids=ids, widths=widths[widest])


def collate(rows: Sequence[Integer[np.ndarray, "_"]], *, width: int, pad: int) -> HostBatch:
    """Right-pads rows of at most `width` tokens: input_ids int32 and attention_mask bool, [batch, width]."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    attention_mask = np.arange(width) < lengths[:, None]
    input_ids = np.full((len(rows), width), pad, np.int32)
    input_ids[attention_mask] = np.concatenate(rows)
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def read_rows(store: TokenStore, ids: Integer[np.ndarray, "batch"], *, width: int, pad: int) -> HostBatch:
    """The rows `ids` of a store, padded by `collate`; a slot that is EMPTY is all padding."""
    empty = np.empty(0, store.tokens.dtype)
    return collate([empty if row == EMPTY else store[int(row)] for row in ids], width=width, pad=pad)
