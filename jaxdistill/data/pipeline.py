"""Batches of training as a pure function of (seed, step), read ahead by grain; and fixed batches of an evaluation."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxdistill.data.batching import HostBatch, MakeBatch, Plan, buckets_of, plan_epoch
from jaxdistill.data.settings import DataConfig
from jaxdistill.data.store import TokenStore
from jaxdistill.errors import UserError


class Hosts(NamedTuple):
    """Which of several processes this one is: each reads its own rows of every batch."""

    index: int
    count: int

    def own_rows(self, batch_size: int, *, group: int) -> slice:
        """This host's rows of a batch, in whole groups of `group` rows.

        Raises:
          UserError: the batch does not divide.
        """
        if batch_size % (self.count * group):
            raise UserError(
                f"a batch of {batch_size} rows does not divide into {self.count} hosts with groups of {group} rows"
            )
        rows = batch_size // self.count
        return slice(self.index * rows, (self.index + 1) * rows)


class Schedule(NamedTuple):
    """How many training batches there are, and in which order rows come."""

    batch_size: int  # rows of a batch, over all hosts
    steps: int  # batches in all; epochs * steps_per_epoch(...) for whole epochs
    limit_batches: int  # largest number of batches in an epoch, each of which has an order of its own; 0 = all rows
    seed: int


@runtime_checkable
class BatchIterator(Protocol):
    """A grain iterator over batches: its state is a position, as a dictionary of JSON values."""

    def __iter__(self) -> Iterator[HostBatch]: ...

    def __next__(self) -> HostBatch: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Batches(Sequence[HostBatch]):
    """`batches[step]`, made when it is asked for."""

    make: Callable[[int], HostBatch]
    steps: int

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> HostBatch:  # type: ignore[override] - no slices
        if not 0 <= step < self.steps:
            raise IndexError(step)
        return self.make(step)


def steps_per_epoch(store: TokenStore, *, batch_size: int, limit_batches: int) -> int:
    """Batches that show each row once, but at most `limit_batches` where that is not 0."""
    steps = -(-len(store) // batch_size)
    return min(steps, limit_batches or steps)


def shuffled_batches(
    make_batch: MakeBatch, store: TokenStore, data: DataConfig, schedule: Schedule, own_rows: slice
) -> BatchIterator:
    """The batches of a training run, epoch after epoch.

    Step s is a function of (seed, s) alone, so the state of the iterator is a position, and the batch of all hosts
    together does not depend on their number.

    Args:
      data: its threads read data.prefetch batches ahead; with 0 threads batches are made when they are asked for.
      own_rows: the rows of a batch that are this host's.
    """
    import grain

    epoch_steps = steps_per_epoch(store, batch_size=schedule.batch_size, limit_batches=schedule.limit_batches)
    size, buckets = schedule.batch_size, buckets_of(data)
    plan_of = _keep_latest(
        lambda epoch: plan_epoch(store.lengths, batch_size=size, buckets=buckets, seed=schedule.seed, epoch=epoch)
    )

    def make(step: int) -> HostBatch:
        epoch, index = divmod(step, epoch_steps)
        plan = plan_of(epoch)
        return make_batch(step, plan.ids[index, own_rows], int(plan.widths[index]))

    options = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=max(data.prefetch, data.threads))
    return iter(grain.MapDataset.source(Batches(make, schedule.steps)).to_iter_dataset(options))


def _keep_latest(plan_of: Callable[[int], Plan]) -> Callable[[int], Plan]:
    """Keeps the last two plans: reading ahead crosses from one epoch into the next, in several threads."""
    plans: dict[int, Plan] = {}
    lock = threading.Lock()

    def get(epoch: int) -> Plan:
        with lock:
            if epoch not in plans:
                plans[epoch] = plan_of(epoch)
                for old in sorted(plans, key=lambda other: abs(other - epoch))[2:]:
                    del plans[old]
            return plans[epoch]

    return get


def batches_in_order(
    make_batch: MakeBatch, store: TokenStore, data: DataConfig, *, batch_size: int, limit: int, own_rows: slice
) -> Batches:
    """The whole store once, without shuffling; at most `limit` batches, 0 = all."""
    plan = plan_epoch(store.lengths, batch_size=batch_size, buckets=buckets_of(data), seed=0, epoch=0, shuffle=False)

    def make(step: int) -> HostBatch:
        return make_batch(step, plan.ids[step, own_rows], int(plan.widths[step]))

    return Batches(make, min(len(plan.widths), limit or len(plan.widths)))
