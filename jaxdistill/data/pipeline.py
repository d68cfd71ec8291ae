"""Masked batches as a pure function of (seed, step), carried by grain; and fixed ones for evaluation."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Integer

from jaxdistill.data.batching import EMPTY, Plan, collate, plan_epoch
from jaxdistill.data.masking import Batch, mask_batch, mask_groups, smoothing_weights
from jaxdistill.data.settings import MaskConfig
from jaxdistill.data.tokenize import TokenStore, Vocabulary
from jaxdistill.errors import UserError


@dataclass(frozen=True)
class Batches(Sequence):
    """`batches[step]`, made when it is asked for."""

    make: Callable[[int], Batch]
    steps: int

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:  # type: ignore[override] - no slices
        if not 0 <= step < self.steps:
            raise IndexError(step)
        return self.make(step)


def steps_per_epoch(store: TokenStore, *, batch_size: int, limit_batches: int) -> int:
    """Batches that show each row once, but at most `limit_batches` where that is not 0."""
    steps = -(-len(store) // batch_size)
    return min(steps, limit_batches or steps)


def train_batches(
    store: TokenStore,
    *,
    vocabulary: Vocabulary,
    batch_size: int,
    buckets: tuple[int, ...],
    mask: MaskConfig,
    token_counts: Integer[np.ndarray, "vocab"],
    seed: int,
    steps: int,
    host: int,
    hosts: int,
    threads: int,
    prefetch: int,
    limit_batches: int = 0,
) -> Any:
    """A grain iterator over this host's part of `steps` training batches.

    Step s is a function of (seed, s) alone, so the state (`get_state`, `set_state`: JSON) is a position, and
    the batch of all hosts together does not depend on how many there are.

    Args:
      batch_size: rows of a batch, of all hosts.
      buckets: static widths, see `batching.plan_epoch`.
      token_counts: of the corpus, for smoothing.
      steps: batches in all; epochs * steps_per_epoch(...) for whole epochs.
      threads: that read ahead; 0 = none, batches are then made when they are asked for.
      prefetch: batches read ahead.
      limit_batches: of an epoch, at most; the next epoch then begins, in an order of its own. 0 = all.

    Yields:
      input_ids, labels (int32), attention_mask, label_mask (bool), [batch_size / hosts, width].

    Raises:
      UserError: batch, hosts and group do not divide, no mask token, token counts of another vocabulary.
    """
    weights = _weights(vocabulary, mask, token_counts)
    rows = rows_of_host(batch_size, hosts, mask.group)

    def masked(step: int, ids: Integer[np.ndarray, "batch"], width: int) -> Batch:
        return mask_batch(
            read(store, ids, width=width, pad=vocabulary.pad),
            vocabulary=vocabulary,
            weights=weights,
            fraction=mask.fraction,
            replace=mask.replace,
            group=mask.group,
            seed=seed,
            step=step,
            first_group=host * rows // mask.group,
        )

    return planned(
        masked,
        store,
        batch_size=batch_size,
        buckets=buckets,
        seed=seed,
        steps=steps,
        hosts=slice(host * rows, (host + 1) * rows),
        threads=threads,
        prefetch=prefetch,
        limit_batches=limit_batches,
    )


def planned(
    make_rows: Callable[[int, Integer[np.ndarray, "batch"], int], Batch],
    store: TokenStore,
    *,
    batch_size: int,
    buckets: tuple[int, ...],
    seed: int,
    steps: int,
    hosts: slice,
    threads: int,
    prefetch: int,
    limit_batches: int,
) -> Any:
    """A grain iterator over make_rows(step, ids of rows, width), epoch after epoch.

    Args:
      hosts: the rows of a batch that are this host's.
    """
    import grain

    epoch_steps = steps_per_epoch(store, batch_size=batch_size, limit_batches=limit_batches)
    plan_of = _latest(
        lambda epoch: plan_epoch(store.lengths, batch_size=batch_size, buckets=buckets, seed=seed, epoch=epoch)
    )

    def make(step: int) -> Batch:
        epoch, index = divmod(step, epoch_steps)
        plan: Plan = plan_of(epoch)
        return make_rows(step, plan.ids[index, hosts], int(plan.widths[index]))

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads))
    return iter(grain.MapDataset.source(Batches(make, steps)).to_iter_dataset(options))


def eval_batches(
    store: TokenStore,
    *,
    vocabulary: Vocabulary,
    batch_size: int,
    buckets: tuple[int, ...],
    mask: MaskConfig,
    token_counts: Integer[np.ndarray, "vocab"],
    seed: int,
    limit: int,
    host: int,
    hosts: int,
) -> Batches:
    """This host's part of each held-out batch, with masks that never change.

    A row is masked by itself, with random numbers keyed on (seed, its number in the store): whatever the
    batch size, buckets, hosts or training seed, two runs see the same masked positions. So mask.group is not
    used, and a *row* has at most masked_capacity(fraction=…, group=1, width=…) masked positions.

    Args:
      seed: of the masks; keep it fixed between runs that are compared.
      limit: batches at most; 0 = all.

    Raises:
      UserError: as `train_batches`.
    """
    weights = _weights(vocabulary, mask, token_counts)
    rows = rows_of_host(batch_size, hosts, 1)

    def masked(ids: Integer[np.ndarray, "batch"], width: int) -> Batch:
        return mask_groups(
            read(store, ids, width=width, pad=vocabulary.pad),
            keys=[(seed, int(row) + 1) for row in ids],  # + 1: EMPTY is -1 and keys are not negative
            vocabulary=vocabulary,
            weights=weights,
            fraction=mask.fraction,
            replace=mask.replace,
        )

    here = slice(host * rows, (host + 1) * rows)
    return in_order(masked, store, batch_size=batch_size, buckets=buckets, hosts=here, limit=limit)


def in_order(
    make_rows: Callable[[Integer[np.ndarray, "batch"], int], Batch],
    store: TokenStore,
    *,
    batch_size: int,
    buckets: tuple[int, ...],
    hosts: slice,
    limit: int,
) -> Batches:
    """make_rows(ids of rows, width) over the whole store once, without shuffling."""
    plan = plan_epoch(store.lengths, batch_size=batch_size, buckets=buckets, seed=0, epoch=0, shuffle=False)

    def make(step: int) -> Batch:
        return make_rows(plan.ids[step, hosts], int(plan.widths[step]))

    return Batches(make, min(len(plan.widths), limit or len(plan.widths)))


def _weights(vocabulary: Vocabulary, mask: MaskConfig, token_counts: Integer[np.ndarray, "vocab"]) -> np.ndarray:
    if vocabulary.mask is None:
        raise UserError("the tokenizer has no mask token; masked-LM distillation needs one")
    if len(token_counts) != vocabulary.size:
        raise UserError(
            f"{len(token_counts)} token counts for a tokenizer of {vocabulary.size} ids; count with the same tokenizer"
        )
    return smoothing_weights(token_counts, smoothing=mask.smoothing, special=vocabulary.special)


def rows_of_host(batch_size: int, hosts: int, group: int) -> int:
    if batch_size % (hosts * group):
        raise UserError(f"a batch of {batch_size} rows does not divide into {hosts} hosts with groups of {group} rows")
    return batch_size // hosts


def _latest(plan: Callable[[int], Plan]) -> Callable[[int], Plan]:
    """Keeps the last two plans: reading ahead crosses from one epoch into the next, in several threads."""
    plans: dict[int, Plan] = {}
    lock = threading.Lock()

    def get(epoch: int) -> Plan:
        with lock:
            if epoch not in plans:
                plans[epoch] = plan(epoch)
                for old in sorted(plans, key=lambda other: abs(other - epoch))[2:]:
                    del plans[old]
            return plans[epoch]

    return get


def read(store: TokenStore, ids: Integer[np.ndarray, "batch"], *, width: int, pad: int) -> Batch:
    empty = store.tokens[:0]
    return collate([empty if row == EMPTY else store[int(row)] for row in ids], width=width, pad=pad)
