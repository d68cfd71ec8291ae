"""How many micro-batches an update has, where the settings leave that to the devices: the fewest that fit."""

from collections.abc import Callable
from typing import Any

import jax

from jaxdistill.config import Config
from jaxdistill.data.batching import HostBatch
from jaxdistill.errors import UserError
from jaxdistill.losses.term import Objective
from jaxdistill.models.axes import row_devices
from jaxdistill.models.pair import Pair
from jaxdistill.run.training import make_training
from jaxdistill.step.sharding import Meshes

USED = 0.95  # of a device's memory; the rest is for what the runtime and the next batch take


def with_accumulation(
    config: Config,
    pair: Pair,
    objective: Objective,
    meshes: Meshes,
    batch: Callable[[], HostBatch],
    *,
    steps: int,
    report: Callable[[str], None],
) -> Config:
    """The config with a number of micro-batches in the place of 0.

    Args:
      batch: gives any batch of training.
    """
    if config.train.accumulation:
        return config
    limit = _memory_of(meshes.student.devices.flat[0])

    def peak(accumulation: int) -> int:
        changed = config.changed(train={"accumulation": accumulation})
        return _peak(changed, pair, objective, meshes, batch(), steps=steps)

    chosen = fewest(possible(config, meshes), peak, limit=None if meshes.separate else limit)
    rows = config.train.batch_size // chosen // row_devices(meshes.student)
    why = "the fewest that fit" if limit and not meshes.separate else "as the memory of a device is not known here"
    report(f"config.train.accumulation=0: {chosen} micro-batch(es) of {rows} rows a device, {why}")
    return config.changed(train={"accumulation": chosen})


def possible(config: Config, meshes: Meshes) -> list[int]:
    """The numbers of micro-batches whose groups of rows divide over the devices, the fewest first."""
    groups = config.train.batch_size // config.mask.group
    sizes = [row_devices(mesh) for mesh in meshes]
    return [n for n in range(1, groups + 1) if all(groups % (n * size) == 0 for size in sizes)]


def fewest(choices: list[int], peak: Callable[[int], int], *, limit: int | None) -> int:
    """The first of the choices whose peak fits, each of which is compiled to know it.

    Args:
      limit: bytes of a device; None = not known, and the first choice is taken.

    Raises:
      UserError: none fits.
    """
    if limit is None:
        return choices[0]
    for accumulation in choices:
        if peak(accumulation) <= USED * limit:
            return accumulation
    raise UserError(
        f"config.train.accumulation=0: not even {choices[-1]} micro-batches fit into the {limit:,} bytes of a device; "
        "raise config.mesh.fsdp or tensor, or set config.student.remat=full"
    )


def _memory_of(device: Any) -> int | None:
    return (device.memory_stats() or {}).get("bytes_limit")


def _peak(config: Config, pair: Pair, objective: Objective, meshes: Meshes, batch: HostBatch, *, steps: int) -> int:
    """Bytes on a device while an update of the longest rows runs; the state is donated."""
    training = make_training(config, pair, objective, meshes, steps=steps)
    length = batch["input_ids"].shape[1]

    def longest(x: Any) -> jax.ShapeDtypeStruct:
        shape = (*x.shape[:1], config.data.max_length, *x.shape[2:]) if x.shape[1:2] == (length,) else x.shape
        return jax.ShapeDtypeStruct(shape, x.dtype)

    state = jax.eval_shape(training.init, pair.student_params)
    key = jax.eval_shape(lambda: jax.random.key(0))
    step: Any = training.step
    try:
        rows = {name: longest(x) for name, x in batch.items()}
        program = step.lower(state, pair.params_of_teachers, rows, key).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return 2**63  # the compiler itself refuses what cannot fit
    memory = program.memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes
