"""Orbax checkpoints of a run: the student, the optimizer, and the run's own notes; never the teacher.

Every checkpoint carries a fingerprint of its arrays: orbax finds a truncated file, but takes a flipped bit in the
array data for good weights (docs/decisions.md).
"""

import functools
import gc
import hashlib
import itertools
import json
import logging
import math
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import Array, PyTree, UInt32
from orbax.checkpoint import checkpoint_managers as policies

from jaxdistill.errors import UserError

FOLDER = "checkpoints"


def open_manager(
    workdir: Path, *, keep: int = 1, best: str = "", keep_steps: Collection[int] = (), read_only: bool = False
) -> ocp.CheckpointManager:
    """Opens `<workdir>/checkpoints`, saving asynchronously.

    Args:
      keep: how many of the last stay.
      best: the metric, lower is better, whose best checkpoint stays as well; "" = none.
      keep_steps: steps that stay whatever comes.
    """
    _hush()
    stay = [policies.LatestN(keep), policies.CustomSteps(steps=list(keep_steps))]
    directory = (workdir / FOLDER).absolute()
    if best:
        stay.append(_Best(directory, best))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(stay),
        cleanup_tmp_directories=not read_only,  # what a killed run left half-written
        create=not read_only,
        lightweight_initialize=True,  # reads no metadata, so that a damaged file is met in `restore` and nowhere else
    )
    return ocp.CheckpointManager(directory, options=options)


@functools.cache
def _hush() -> None:
    """Keeps off the terminal, from now on, the pages that orbax and tensorstore log beside the one error they raise.

    For good, because tasks that nobody awaits tell of themselves when they are collected, at the latest at exit. What
    the error means is said here.
    """
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    logging.getLogger("asyncio").addFilter(lambda record: "never retrieved" not in record.getMessage())
    hook = sys.unraisablehook
    # What is still under way in tensorstore's threads when orbax gives up ends on orbax's closed loop.
    sys.unraisablehook = lambda what: None if "Event loop is closed" in str(what.exc_value) else hook(what)


class _Best:
    """Orbax preservation policy: the one checkpoint of the lowest figure, of earlier processes too.

    Orbax's own BestN forgets, when a run is resumed, what was measured before.
    """

    def __init__(self, directory: Path, name: str):
        self.directory, self.name = directory, name

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        figures = [self._figure(info) for info in checkpoints]
        best = min(figures, default=math.inf)
        return [best < math.inf and i == figures.index(best) for i in range(len(figures))]

    def _figure(self, info: Any) -> float:
        metrics = info.metrics
        if metrics is None:  # saved by an earlier process, or not measured
            try:
                notes = self.directory / str(info.step) / "notes" / "metadata"
                metrics = json.loads(notes.read_bytes())["metrics"]
            except (OSError, ValueError, KeyError, TypeError):  # still being written, or damaged: never the best
                metrics = {}
        value = metrics.get(self.name, math.inf)
        return value if math.isfinite(value) else math.inf


@jax.jit
def fingerprint(tree: PyTree) -> UInt32[Array, "leaves"]:
    """One number a leaf: sum_i (2i + 1) bits_i mod 2^32; any single flipped bit changes it, on any sharding."""

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
    """Starts writing `items` (name -> tree of arrays) and the JSON `notes`; returns before it is on disk.

    Raises:
      UserError: an earlier write found the disk full; earlier checkpoints are untouched.
    """
    prints = {name: fingerprint(tree).tolist() for name, tree in items.items()}
    arrays = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    notes = {**notes, "metrics": metrics or {}, "fingerprints": prints}
    record = ocp.args.JsonSave({**notes, "digest": _digest(notes)})
    with _disk_full_is_said(manager):
        manager.save(step, args=ocp.args.Composite(**arrays, notes=record), metrics=metrics, force=True)


def finish(manager: ocp.CheckpointManager) -> None:
    """Waits for what is being written.

    Raises:
      UserError: the disk is full.
    """
    with _disk_full_is_said(manager):
        manager.wait_until_finished()


@contextmanager
def _disk_full_is_said(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Orbax wraps ENOSPC in errors of many types; its words are what they share."""
    try:
        yield
    except Exception as error:
        chain: BaseException | None = error
        while chain is not None:
            if "No space left" in str(chain) or "RESOURCE_EXHAUSTED" in str(chain):
                last = max(manager.all_steps(), default=None)
                raise UserError(
                    f"the disk of {manager.directory} is full; the last whole checkpoint is "
                    f"{'none' if last is None else f'step {last}'}. Make room and run the same command again"
                ) from error
            chain = chain.__cause__ or chain.__context__
        raise


def restore(
    manager: ocp.CheckpointManager,
    templates: dict[str, PyTree],
    *,
    tell: Callable[[str], None],
    step: int | None = None,
    read_only: bool = False,
) -> tuple[int, dict[str, PyTree], dict[str, Any]] | None:
    """Reads the newest checkpoint that is whole, or the one of `step`: (step, items, notes); None where there is none.

    A damaged one is said, set aside as `damaged-<step>` (unless read_only), and the one before is taken.

    Args:
      templates: item -> tree of arrays or ShapeDtypeStructs with shardings; only these items are read.

    Raises:
      UserError: there are checkpoints and none of them can be read.
    """
    steps = sorted(manager.all_steps(), reverse=True) if step is None else [step]
    for tried, candidate in enumerate(steps):
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
            found = _read(manager, candidate, templates)
            if isinstance(found, str):
                gc.collect()  # now, as a coroutine that is left warns when it is collected
        if not isinstance(found, str):
            if not read_only:
                # Only now that one is good: where none is, all stay in place, and the next start says so again.
                _set_aside(manager, steps[:tried])
            return candidate, *found
        more = "; falling back to the one before" if steps[tried + 1 :] else ""
        tell(f"checkpoint {candidate} is damaged ({found}){more}")
    if steps:
        raise UserError(f"no checkpoint in {manager.directory} can be read; take a copy of it, or another --workdir")
    return None


def _read(
    manager: ocp.CheckpointManager, step: int, templates: dict[str, PyTree]
) -> tuple[dict[str, PyTree], dict[str, Any]] | str:
    """(items, notes), or why they cannot be had."""
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
    except Exception as e:  # orbax and tensorstore raise their own, ValueError, OSError and plain Exception
        return (str(e).splitlines() or [type(e).__name__])[0][:120]
    return items, notes


def _set_aside(manager: ocp.CheckpointManager, steps: Sequence[int]) -> None:
    """Out of the way of the step's next save, and kept for whoever wants to look."""
    for step in steps:
        names = (f"damaged-{step}" + (f"-{n}" if n else "") for n in itertools.count())
        free = next(name for name in names if not (manager.directory / name).exists())
        (manager.directory / str(step)).rename(manager.directory / free)
    if steps:
        manager.reload()
