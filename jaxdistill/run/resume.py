"""Whether the run in a folder goes on with a config. What settings lead to is compared, not how they are spelt.

A setting that names text or a model may change where the same content lies in another place. The number of steps may
change where no step that was trained depends on it. Every checkpoint records the content that was trained on.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxdistill import config as configs
from jaxdistill.config import Config
from jaxdistill.data.store import content_of
from jaxdistill.data.text import Text
from jaxdistill.errors import UserError
from jaxdistill.export.folder import FORMATS
from jaxdistill.files import write_text, writing
from jaxdistill.models import hub
from jaxdistill.models.model import Model
from jaxdistill.models.pair import Pair
from jaxdistill.run import checkpoint, teacher_cache
from jaxdistill.run import folder as folders
from jaxdistill.step.across_processes import on_host
from jaxdistill.step.settings import MeshConfig

_OTHERS = "list of further teachers"
# What a run depends on -> the settings that say where it lies.
_NAMED_BY: dict[str, tuple[str, ...]] = {
    "tokenizer": ("tokenizer.name", "tokenizer.revision"),
    "teacher": ("teacher.name", "teacher.revision"),
    _OTHERS: ("teacher.also",),
    "teacher cache": ("teacher.cache",),
    "student": ("student.name", "student.revision"),
    "held-out text": ("data.eval_path", "data.eval_split"),
    "token counts": ("data.token_counts",),
}
OWN_LOSSES = "own losses"  # of a Python program: their names and weights, as it is they that no setting says
# Settings with which trained steps depend on the number of all steps -> whether a config uses them so.
_BY_LENGTH: dict[str, Callable[[Config], bool]] = {
    "optim.schedule": lambda c: c.optim.schedule != "constant",
    "loss.end": lambda c: bool(c.loss.end),
    "student.layer_drop_schedule": lambda c: c.student.layer_drop > 0 and c.student.layer_drop_schedule == "linear",
}
# What may be another value after a loss that was not finite.
_REMEDIES = ("optim.learning_rate", "optim.clip")

_ROUNDING = "the mathematics is the same, and sums may round otherwise"
# How the same updates are computed -> what differs from there on.
_HOW = dict.fromkeys(
    (
        *(f"mesh.{name}" for name in MeshConfig.model_fields),
        *(f"{role}.{name}" for role in ("teacher", "student") for name in ("attention", "devices")),
        "student.remat",
        "teacher.scan",
    ),
    _ROUNDING,
) | dict.fromkeys(("train.accumulation", "student.scan"), f"{_ROUNDING}; dropout draws other numbers")

_NOT_FINITE = ".not-finite.json"  # in a run folder whose last process stopped for a figure that is not finite


def began_with(config: Config, workdir: Path) -> dict[str, Any] | None:
    """The config that the run in `workdir` has had until now, as JSON; None where there is no run yet.

    Raises:
      UserError: the folder holds a run whose config differs in more than may change.
    """
    recorded = folders.read_config(workdir)
    if recorded is None:
        return None
    may = _REMEDIES if (workdir / _NOT_FINITE).exists() else ()
    if different := [row for row in configs.differences(recorded, config) if row[0] not in may]:
        was = ", ".join(f"config.{key}={old!r}" for key, old, _ in different)
        now = ", ".join(repr(new) for *_, new in different)
        raise UserError(
            f"--workdir {workdir} holds a run with {was}, and now {'it is' if len(different) == 1 else 'they are'} "
            f"{now}; name another --workdir, or repeat the config to resume"
        )
    before, after = configs.recorded_values(recorded), configs.values_of(config)
    key = "train.steps" if after["train.steps"] else "train.epochs"
    # Steps and epochs can be compared once the text is known.
    in_one_unit = bool(before["train.steps"]) == bool(after["train.steps"])
    if in_one_unit and before[key] != after[key]:
        _check_schedule(config, workdir, f"config.{key}={before[key]}", after[key])
    return recorded


def mark_not_finite(workdir: Path, error: UserError) -> None:
    """Notes that the run stopped for a figure that is not finite, so that `began_with` accepts the remedies."""
    if workdir.is_dir():
        with suppress(OSError):  # which must not bury the error itself
            write_text(workdir / _NOT_FINITE, json.dumps({"error": str(error)}))


def forget_not_finite(workdir: Path) -> None:
    """Takes the note of `mark_not_finite` back: the run goes on, or begins anew, with what the config says now."""
    with writing(workdir):
        (workdir / _NOT_FINITE).unlink(missing_ok=True)


def finished(config: Config, workdir: Path, recorded: dict[str, Any] | None) -> folders.Student | None:
    """The student of a run that has trained all steps of this config and whose last checkpoint is whole; else None."""
    if recorded is None:
        return None
    before = configs.recorded_values(recorded)
    steps = before["train.steps"] or checkpoint.last_notes(workdir).get("steps")
    if steps not in checkpoint.steps_in(workdir) or (config.train.steps, config.train.epochs) != (
        before["train.steps"],
        before["train.epochs"],
    ):
        return None
    try:
        student = folders.load_student(workdir, report=lambda line: None)
    except UserError:  # training goes on from an earlier checkpoint, or says what is wrong
        return None
    return student if student.step == steps else None


def content(config: Config, pair: Pair, text: Text) -> dict[str, str]:
    """A digest of each thing that the run depends on and that its settings name by a place; "" where there is none."""
    named = bool(config.data.eval_path or config.data.eval_split)
    first, others = config.teacher, zip(config.teacher.also, pair.others, pair.others_params, strict=True)
    # A run with one teacher has no record of others, as its checkpoints had none before there were several.
    of_others = [_of_teacher(name, "", model, params) for name, model, params in others]
    of_first = pair.teacher and _of_teacher(first.name, first.revision, pair.teacher, pair.teacher_params)
    return {
        "text": content_of(text.train),
        "held-out text": content_of(text.held_out) if named else "",
        "token counts": _digest(text.token_counts) if config.data.token_counts else "",
        "tokenizer": _hash([dataclasses.asdict(text.vocabulary), sorted(pair.tokenizer.get_vocab().items())]),
        "teacher": "" if of_first is None else _hash(of_first),
        "student": _digest(pair.student_params) if config.student.name else "",
        "teacher cache": _hash(teacher_cache.content_of(config)) if pair.cached else "",
    } | ({_OTHERS: _hash(of_others)} if of_others else {})


def check_content(
    config: Config, workdir: Path, recorded: dict[str, Any] | None, text: Text, now: dict[str, str]
) -> None:
    """Checks that a run goes on with what it was trained on, before arrays of a checkpoint are read.

    Args:
      recorded: the config of the run until now, as JSON.
      now: of `content`.

    Raises:
      UserError: names what is not the same.
    """
    notes = checkpoint.last_notes(workdir)
    if recorded is None or not notes:  # nothing was trained yet
        return
    then = notes.get("content", {})  # checkpoints of 0.1.0 have no record but the name of the text
    name = text.path.name
    # A name in the cache is a hash; other folders may be called anything.
    same_name = notes["text"] == name and not (then and config.data.prepared)
    if then.get("text") != now["text"] and not same_name:
        raise UserError(
            f"the text or the tokenizer is not the one that {workdir} was begun with (prepared as {text.path}, "
            f"then as {notes['text']}); put it back, or name another --workdir"
        )
    if then.get(OWN_LOSSES) != now.get(OWN_LOSSES):
        raise UserError(
            f"{workdir} was begun with {_said_of(then)}, and now there is {_said_of(now)}; go on from the Python "
            "program that began it, or name another --workdir"
        )
    before, after = configs.recorded_values(recorded), configs.values_of(config)
    for what, keys in _NAMED_BY.items():
        old, new = _places(before, keys), _places(after, keys)
        # A student that was begun from a run goes on, also where that run has been trained further.
        if (what not in then or what == "student") and old == new:
            continue
        if what == "tokenizer" and what not in then and not config.data.prepared:
            continue  # the name of the text, which is the same, is made from it as well
        if then.get(what) != now.get(what):
            reason = "is not the one" if what in then else "cannot be compared with the one"
            used = [key for key in keys if after[key] or before[key]]
            spelt = " and ".join(f"config.{key}={after[key]!r}" for key in used)
            was = ", ".join(repr(before[key]) for key in used)
            raise UserError(
                f"the {what}{f' of {spelt}' if used else ''} {reason} that {workdir} was begun with"
                f"{f' (then {was})' if used else ''}; put it back, or name another --workdir"
            )


def _said_of(content: Mapping[str, str]) -> str:
    return f"the program's own loss {content[OWN_LOSSES]}" if OWN_LOSSES in content else "no loss of a program's own"


def steps_of(values: Mapping[str, Any], *, per_epoch: int) -> int:
    """The number of all updates, of the dotted values of a config."""
    return values["train.steps"] or math.ceil(values["train.epochs"] * per_epoch)


def check_length(config: Config, workdir: Path, *, old: int, new: int, at: int) -> None:
    """Checks that a run of `old` steps may become one of `new` steps after `at` of them.

    Raises:
      UserError: the steps that were trained would have been others.
    """
    if old == new:
        return
    _check_schedule(config, workdir, f"{old} steps", new)
    if new < at:
        raise UserError(
            f"{workdir} has trained {at} steps, and config.train asks for {new}; name a larger number, or another "
            "--workdir"
        )
    rises = [math.ceil(config.optim.warmup * steps) for steps in (old, new)]
    if rises[0] != rises[1] and at < max(rises):
        raise UserError(
            f"--workdir {workdir} holds a run of {old} steps, and now they are {new}: the warm-up is a share of all "
            f"steps (config.optim.warmup={config.optim.warmup:g}) and would change from {rises[0]} to {rises[1]} "
            f"steps after step {at}; go on with {old} steps until it is over, or name another --workdir"
        )


def go_on_with(
    config: Config, workdir: Path, recorded: dict[str, Any], *, old: int, new: int, report: Callable[[str], None]
) -> None:
    """Records the config that the run has from here on, where it is another, and reports what else is another.

    Args:
      recorded: the config of the run until now, as JSON.
      old: the number of steps until now. If it was another, what was exported after these steps is kept beside, as
        export-<format>-of-step-<number>, and the student of the last step is exported in its place.
    """
    before, after = configs.recorded_values(recorded), configs.values_of(config)
    for key in _REMEDIES:
        if before[key] != after[key]:
            report(f"config.{key} is {after[key]} from here on; it was {before[key]}, and a loss was not finite")
    for key in _HOW:
        if before[key] != after[key]:
            report(f"config.{key} is {after[key]!r} from here on; it was {before[key]!r}: {_HOW[key]}")
    with writing(workdir):
        if old != new:
            report(f"the run has {new} steps from here on; it had {old}")
            for folder in (workdir / f"export-{to}" for to in FORMATS):
                if folder.exists():
                    os.rename(folder, folder.with_name(f"{folder.name}-of-step-{old}"))
        if before != after:
            write_text(workdir / "config.json", configs.to_json(config))
    forget_not_finite(workdir)


def _check_schedule(config: Config, workdir: Path, old: str, new: Any) -> None:
    for key, uses in _BY_LENGTH.items():
        if uses(config):
            section, name = key.split(".")
            raise UserError(
                f"--workdir {workdir} holds a run of {old}, and now it is {new}: with "
                f"config.{key}={getattr(getattr(config, section), name)!r} every step depends on the number of all "
                f"steps; repeat the config to resume, or begin another --workdir with config.student.name={workdir}"
            )


def _places(values: Mapping[str, Any], keys: Collection[str]) -> list[str]:
    """Where settings lead to: existing paths without links and relative parts, and no revision beside a folder."""
    first, *rest = (values[key] for key in keys)
    names = first if isinstance(first, list | tuple) else [first]
    places = [os.path.expanduser(str(name)) for name in (*names, *rest)]
    if len(names) == 1 and os.path.isdir(places[0]):
        places = [os.path.realpath(places[0]), *("" for _ in places[1:])]
    return [os.path.realpath(place) if place and os.path.exists(place) else place for place in places]


def _of_teacher(name: str, revision: str, teacher: Model, params: PyTree) -> list[Any]:
    """What decides on what a teacher computes, and on where a text that it writes ends: fields, and a digest."""
    fields = hub.config_fields(hub.resolve(name, revision=revision))
    kept = {name: value for name, value in fields.items() if name not in _BOOKKEEPING}
    return [[kept, teacher.config.eos_token_id], _digest(params)]


# Fields of config.json that tell where and by what it was written.
_BOOKKEEPING = ("_name_or_path", "_commit_hash", "transformers_version", "torch_dtype", "dtype", "architectures")


def _digest(tree: PyTree) -> str:
    """SHA-256 of all names, shapes, types and values of a tree of arrays, a few at a time, hashed in several threads.

    An array of a mesh is copied first: what NumPy has read of an array, the array keeps.
    """

    def one(path: Any, leaf: Any) -> str:
        array = np.ascontiguousarray(leaf)
        digest = hashlib.sha256(array.view(np.uint8).reshape(-1).data if array.size else b"").hexdigest()
        return f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype} {digest}"

    leaves, lines = jax.tree_util.tree_leaves_with_path(tree), []
    with ThreadPoolExecutor() as threads:
        for start in range(0, len(leaves), _AT_ONCE):
            few = leaves[start : start + _AT_ONCE]
            read = [(path, on_host(jnp.copy(x)) if isinstance(x, jax.Array) else x) for path, x in few]
            lines += threads.map(lambda item: one(*item), read)
    return _hash(lines)


_AT_ONCE = 4  # arrays that are on the host while they are hashed


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
