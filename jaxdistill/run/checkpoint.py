"""Orbax checkpoints of a run: the student, the optimizer state and the run's own notes; never the teacher.

Every checkpoint carries a fingerprint of its arrays: orbax notices a truncated file, but reads a flipped bit in the
array data as good weights (docs/decisions.md).
"""

import errno
import functools
import gc
import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import Array, PyTree, UInt32
from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint.options import MultiprocessingOptions

from jaxdistill import processes
from jaxdistill.console import taking
from jaxdistill.errors import UserError
from jaxdistill.files import os_error, refusal
from jaxdistill.run import mirror

FOLDER = mirror.CHECKPOINTS


def folder_of(workdir: Path) -> Any:
    """Where the checkpoints of a run are: in its folder, or at the address that the folder mirrors."""
    return mirror.place_of_checkpoints(workdir)


def open_manager(
    workdir: Path, *, keep: int = 1, best: str = "", keep_steps: Collection[int] = (), read_only: bool = False
) -> ocp.CheckpointManager:
    """Opens `<workdir>/checkpoints`, saving asynchronously.

    Args:
      keep: number of most recent checkpoints that are kept.
      best: a metric, lower being better; the checkpoint with the lowest value is kept as well; "" = none.
      keep_steps: steps whose checkpoints are always kept.
    """
    _hide_library_logs()
    _write_small_arrays_whole()
    kept = [policies.LatestN(keep), policies.CustomSteps(steps=list(keep_steps))]
    directory = folder_of(workdir)
    if best:
        kept.append(_Best(directory, best))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(kept),
        cleanup_tmp_directories=not read_only,  # what a killed run left half-written
        create=not read_only,
        lightweight_initialize=True,  # reads no metadata, so that a damaged file raises in `restore` alone
        multiprocessing_options=_of_this_process() if read_only else MultiprocessingOptions(),
    )
    return ocp.CheckpointManager(directory, options=options)


def _of_this_process() -> MultiprocessingOptions:
    """Options of a manager that waits for no other process: each reads whole arrays, and nobody writes."""
    if jax.process_count() == 1:
        return MultiprocessingOptions()
    own = jax.process_index()
    return MultiprocessingOptions(primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process{own}")


@functools.cache
def _hide_library_logs() -> None:
    """Hides the pages that orbax and tensorstore log beside an error that they raise; this file reports the error.

    For the rest of the process, because a task that nobody awaits logs its error when it is collected, at the latest
    at exit.
    """
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    logging.getLogger("asyncio").addFilter(lambda record: "never retrieved" not in record.getMessage())
    hook = sys.unraisablehook
    # Work still under way in tensorstore's threads when orbax gives up fails on orbax's closed event loop.
    sys.unraisablehook = lambda what: None if "Event loop is closed" in str(what.exc_value) else hook(what)


# Bytes of the part of an array, which several devices hold alike, that each of them writes; a smaller array is written
# by one device.
_LEAST_PART = 2**20


@functools.cache
def _write_small_arrays_whole() -> None:
    """Keeps orbax from cutting each array into a part for every device that holds a copy.

    The parts of large arrays leave their devices at the same time. For the many small arrays of a model, making the
    parts takes most of the time for which a save keeps the next step waiting (benchmarks/save.py).
    """
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_LEAST_PART)
    ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)


class _Best:
    """Orbax preservation policy: keeps the checkpoint with the lowest figure, of earlier processes too.

    When a run is resumed, orbax's own BestN forgets the figures that were measured before.
    """

    def __init__(self, directory: Any, name: str):
        self.directory, self.name = directory, name

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        figures = [self._figure(info) for info in checkpoints]
        best = min(figures, default=math.inf)
        return [best < math.inf and i == figures.index(best) for i in range(len(figures))]

    def _figure(self, info: Any) -> float:
        metrics = info.metrics
        if metrics is None:  # saved by an earlier process, or not measured
            metrics = _notes(self.directory / str(info.step)).get("metrics", {})
        value = metrics.get(self.name, math.inf)
        return value if math.isfinite(value) else math.inf


def steps_in(workdir: Path) -> list[int]:
    """The steps of all checkpoints, whole or damaged, the newest first, without opening them."""
    names = [path.name for path in folder_of(workdir).glob("*")]
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def remove_torn(workdir: Path, *, is_gone: bool = False) -> None:
    """Removes what a save that failed has half-written, and the folder of checkpoints where that was all.

    Args:
      is_gone: whether the folder in which the run trained is not there any more. A save that was under way then has
        made it anew, and its checkpoint, without a config, is of no use.
    """
    folder = folder_of(workdir)
    if folder.parent != workdir.absolute():  # at an address, where orbax removes them when it is opened
        return
    is_all = is_gone and workdir.is_dir() and os.listdir(workdir) == [FOLDER]
    for torn in folder.glob("[0-9]*" if is_all else "*.orbax-checkpoint-tmp*"):
        shutil.rmtree(torn, ignore_errors=True)
    with suppress(OSError):  # it is not empty, or not there
        folder.rmdir()


def last_notes(workdir: Path) -> dict[str, Any]:
    """The notes of the newest checkpoint whose notes are whole, without a look at arrays; {} where there are none."""
    found = (_notes(folder_of(workdir) / str(step)) for step in steps_in(workdir))
    return next(filter(None, found), {})


def best_of(workdir: Path, figure: str) -> tuple[int, float] | None:
    """(step, value) of the checkpoint with the lowest value of a figure; None where none has a value of it."""
    notes = {step: _notes(folder_of(workdir) / str(step)) for step in reversed(steps_in(workdir))}
    values = {step: found["metrics"].get(figure, math.inf) for step, found in notes.items() if found}
    finite = {step: value for step, value in values.items() if math.isfinite(value)}
    return min(finite.items(), key=lambda item: item[1], default=None)


def _notes(folder: Any) -> dict[str, Any]:
    """The notes of a checkpoint; {} where they are still being written, or are damaged."""
    try:
        notes = json.loads((folder / "notes" / "metadata").read_bytes())
        return notes if notes.pop("digest") == _digest(notes) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


@jax.jit
def fingerprint(tree: PyTree) -> UInt32[Array, "leaves"]:
    """One number for each leaf: sum_i (2i + 1) bits_i mod 2^32. Any single flipped bit changes the number, and the
    sharding of the leaf does not."""

    def one(x: Array) -> Array:
        width = x.dtype.itemsize * 8
        bits = jax.lax.bitcast_convert_type(x, f"uint{width}").astype(jnp.uint32)
        index = jnp.zeros(x.shape, jnp.uint32)
        for axis, stride in enumerate(math.prod(x.shape[i + 1 :]) for i in range(x.ndim)):
            index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)

    return jnp.stack([one(x) for x in jax.tree.leaves(tree)])


def _digest(notes: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(notes, sort_keys=True).encode()).hexdigest()


def save(
    manager: ocp.CheckpointManager,
    step: int,
    items: dict[str, PyTree],
    *,
    notes: dict[str, Any],
    metrics: dict[str, float] | None,
) -> None:
    """Starts writing `items` (name -> tree of arrays) and the JSON `notes`; returns before they are on disk.

    Raises:
      UserError: the disk refused this write or an earlier one; earlier checkpoints are untouched.
    """
    prints = {name: fingerprint(tree).tolist() for name, tree in items.items()}
    arrays = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    notes = {**notes, "metrics": metrics or {}, "fingerprints": prints}
    record = ocp.args.JsonSave({**notes, "digest": _digest(notes)})
    with _writing(manager):
        manager.save(step, args=ocp.args.Composite(**arrays, notes=record), metrics=metrics, force=True)


def finish(manager: ocp.CheckpointManager) -> None:
    """Waits until all checkpoints are written.

    Raises:
      UserError: the disk refused.
    """
    with _writing(manager):
        manager.wait_until_finished()


def close(manager: ocp.CheckpointManager) -> None:
    """Closes the manager; what it was still writing is waited for.

    Raises:
      UserError: as `finish`.
    """
    with _writing(manager):
        manager.close()


@contextmanager
def _writing(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Raises UserError where the disk refuses. Orbax wraps its error in errors of many types, and reports it late."""
    try:
        yield
    except Exception as error:
        reason = next(filter(None, map(refusal, _with_causes(error))), "")
        if not reason:
            raise
        last = max(manager.all_steps(), default=None)
        full = os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT)
        what = f"the disk of {manager.directory} is full" if reason in full else f"cannot write {manager.directory}"
        raise UserError(
            f"{what} ({reason}); the last whole checkpoint is {'none' if last is None else f'step {last}'}. "
            "Make room, or raise the limit, and run the same command again"
        ) from error


def restore(
    manager: ocp.CheckpointManager,
    templates: dict[str, PyTree],
    *,
    report: Callable[[str], None],
    step: int | None = None,
    read_only: bool = False,
) -> tuple[int, dict[str, PyTree], dict[str, Any]] | None:
    """Reads the newest whole checkpoint, or that of `step`: (step, items, notes); None where there is no checkpoint.

    A damaged checkpoint is reported, renamed `damaged-<step>` (unless read_only), and the one before is read.

    Args:
      templates: item -> tree of arrays or ShapeDtypeStructs with shardings; only these items are read.

    Raises:
      UserError: there are checkpoints and none of them can be read.
    """
    steps = sorted(manager.all_steps(), reverse=True) if step is None else [step]
    for tried, candidate in enumerate(steps):
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
            with taking(f"reading the checkpoint of step {candidate}"):
                found = _read(manager, candidate, templates)
            if isinstance(found, str):
                gc.collect()  # now, while warnings are ignored: an abandoned coroutine warns when it is collected
        if not isinstance(found, str):
            if not read_only:
                # Only once a good one is found: where there is none, all stay in place for the next start to report.
                _set_aside(manager, steps[:tried])
            return candidate, *found
        more = "; falling back to the one before" if steps[tried + 1 :] else ""
        report(f"checkpoint {candidate} is damaged ({found}){more}")
    if steps:
        raise UserError(f"no checkpoint in {manager.directory} can be read; take a copy of it, or another --workdir")
    return None


def _read(
    manager: ocp.CheckpointManager, step: int, templates: dict[str, PyTree]
) -> tuple[dict[str, PyTree], dict[str, Any]] | str:
    """(items, notes), or the reason why they cannot be read."""
    args = {
        name: ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, tree))
        for name, tree in templates.items()
    }
    try:
        found = manager.restore(step, args=ocp.args.Composite(**args, notes=ocp.args.JsonRestore()))
        items, notes = {name: found[name] for name in templates}, found["notes"]
        if notes.pop("digest", None) != _digest(notes):
            return "its notes are not those that were saved"
        for name, tree in items.items():
            if fingerprint(tree).tolist() != notes["fingerprints"][name]:
                return f"the arrays of {name!r} are not those that were saved"
    except (MemoryError, jax.errors.JaxRuntimeError):  # of this machine, and not of the files
        raise
    except Exception as e:  # orbax and tensorstore raise their own, ValueError, OSError and plain Exception
        if reason := _passing(e):
            raise UserError(
                f"checkpoint {step} in {manager.directory} cannot be read now ({reason}), and may be whole: it stays "
                "as it is; look after the disk or the mount, and run the same command again"
            ) from e
        return (str(e).splitlines() or [type(e).__name__])[0][:120]
    return items, notes


# What the operating system answers where a file of a checkpoint is missing or is something else: the checkpoint is
# damaged. Any other answer (an error of the device or the network, a permission) says nothing about the files.
_DAMAGED = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


def _passing(error: BaseException) -> str:
    """The operating system's message for a read that may succeed another time; "" where the files are damaged."""
    numbers = map(os_error, _with_causes(error))
    return next((os.strerror(number) for number in numbers if number and number not in _DAMAGED), "")


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """The error and those that it came from: orbax wraps an error of the disk in errors of its own."""
    chain: BaseException | None = error
    while chain is not None:
        yield chain
        chain = chain.__cause__ or chain.__context__


def _set_aside(manager: ocp.CheckpointManager, steps: Sequence[int]) -> None:
    """Renames damaged checkpoints, so that their steps can be saved again and the files can still be inspected."""
    for step in steps if processes.is_first() else ():
        names = (f"damaged-{step}" + (f"-{n}" if n else "") for n in itertools.count())
        free = next(name for name in names if not (manager.directory / name).exists())
        (manager.directory / str(step)).rename(manager.directory / free)
    if steps:
        processes.wait("set-aside")
        manager.reload()
