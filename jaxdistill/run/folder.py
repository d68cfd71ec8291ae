"""The files of a run folder that are written once, at its start, and read by resume, evaluate and export.

config.json      every value of the config, as of the last start that changed one
student/         config.json and tokenizer files: with a checkpoint, a complete student
origin.json      what the student is made from, for its model card
probe.json       a few rows of real token ids, on which an exported folder is compared with the checkpoint
checkpoints/     written by orbax
metrics.jsonl    a record in each line
wandb-id.txt     where figures go to W&B: the id of the run there
.lock            held by the process that trains, as lock.py says; .holder.json names it while it runs
.not-finite.json after a loss that is not finite, until the run goes on: another learning rate is then accepted
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pydantic
from jax.sharding import Mesh
from jaxtyping import PyTree

from jaxdistill.config import Config
from jaxdistill.errors import UserError, place_in
from jaxdistill.files import named_path, read_json, write_text, writing
from jaxdistill.knobs import section_of
from jaxdistill.models import hub
from jaxdistill.models.model import Model, build_model, param_shapes
from jaxdistill.models.tokenizer import load_tokenizer
from jaxdistill.run import checkpoint
from jaxdistill.step import sharding

ORIGIN = "origin.json"


class Student(NamedTuple):
    """The student of a checkpoint."""

    model: Model
    params: PyTree
    tokenizer: Any
    step: int
    figures: dict[str, float]  # of the evaluation after this step; empty where there was none
    probe: dict[str, np.ndarray]
    config: dict[str, Any]  # of the run, as JSON


def read_config(workdir: Path) -> dict[str, Any] | None:
    """The config of the run that stands in `workdir`, or None.

    Raises:
      UserError: it is there and cannot be read, or the folder holds something else.
    """
    path = named_path(str(workdir)) / "config.json"
    if workdir.is_file():
        raise UserError(f"--workdir {workdir} is a file; name a folder")
    if not path.exists():
        if checkpoint.folder_of(workdir).exists():
            raise UserError(f"{workdir} holds checkpoints but no config.json; remove it, or name another --workdir")
        return None
    try:
        config = read_json(path)
    except UserError as e:
        raise UserError(f"{e}; or name another --workdir") from e
    if not isinstance(config, dict) or "teacher" not in config:
        raise UserError(f"{path} is not the config of a run; name another --workdir")
    return _complete(path, config)


def _complete(path: Path, recorded: dict[str, Any]) -> dict[str, Any]:
    """The values of config.json, with the default of a knob that it does not have.

    Raises:
      UserError: a value has another type than its knob. Its rules may be younger than the run, so they are not checked.
    """
    complete = {**Config().model_dump(mode="json"), **recorded}
    for name, field in Config.model_fields.items():
        if (section := section_of(field)) and isinstance(complete[name], dict):
            complete[name] = {**section().model_dump(mode="json"), **complete[name]}
    try:
        Config.model_validate(complete)
    except pydantic.ValidationError as error:
        for one in error.errors():
            is_choice = one["type"] == "literal_error" and isinstance(one["input"], str)
            if one["type"].endswith(("_type", "literal_error")) and not is_choice:
                key = place_in(one["loc"][:2])
                raise UserError(f"{path} is damaged: {key} ({one['msg']}); name another --workdir") from None
    return complete


def create(
    workdir: Path, *, config: str, origin: str, student: Model, tokenizer: Any, probe: dict[str, np.ndarray]
) -> None:
    """Writes the files that stay the same in a run; config.json last, as its presence means that all are there."""
    with writing(workdir):
        student.config.save_pretrained(workdir / "student")
        tokenizer.save_pretrained(workdir / "student")
        write_text(workdir / "probe.json", json.dumps({name: x.tolist() for name, x in probe.items()}))
        write_text(workdir / ORIGIN, origin)
        write_text(workdir / "config.json", config)


def load_student(
    workdir: Path, *, step: int | None = None, report: Callable[[str], None], mesh: Mesh | None = None
) -> Student:
    """The student of a run's last whole checkpoint, or of the checkpoint after `step` updates.

    Args:
      mesh: holds the parameters, split over its devices; None = those of this process, as few as have room.

    Raises:
      UserError: `workdir` is no run folder, or has no such checkpoint.
    """
    config = read_config(workdir)
    if config is None:
        raise UserError(f"{workdir} is no run folder: it has no config.json")
    if not checkpoint.folder_of(workdir).is_dir():
        raise UserError(f"{workdir} has no checkpoint yet")
    model = build_model(hub.load_config(workdir / "student"))
    with checkpoint.open_manager(workdir, read_only=True) as manager:
        if step is not None and step not in manager.all_steps():
            raise UserError(f"{workdir} has no checkpoint of step {step}; it has {sorted(manager.all_steps())}")
        shapes = param_shapes(model)
        places = sharding.on_mesh(shapes, mesh, family=model.family)
        shapes = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)
        found = checkpoint.restore(manager, {"student": shapes}, report=report, step=step, read_only=True)
    if found is None:
        raise UserError(f"{workdir} has no checkpoint yet")
    at, items, notes = found
    tokenizer = load_tokenizer(workdir / "student")
    probe = _read_probe(workdir / "probe.json", model)
    return Student(model, items["student"], tokenizer, at, notes["metrics"], probe, config)


class _Probe(pydantic.BaseModel):
    """The content of probe.json: rows of equal length."""

    input_ids: list[list[pydantic.NonNegativeInt]] = pydantic.Field(min_length=1)
    attention_mask: list[list[bool]]


def _read_probe(path: Path, model: Model) -> dict[str, np.ndarray]:
    try:
        probe = _Probe.model_validate(read_json(path))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{path} is damaged ({place_in(first['loc'])}: {first['msg']}): take it from a copy of the run folder"
        ) from None
    length = len(probe.input_ids[0])
    whole = len(probe.attention_mask) == len(probe.input_ids)
    whole = whole and all(len(row) == length for row in [*probe.input_ids, *probe.attention_mask])
    if not whole or not 1 <= length <= model.max_length or max(map(max, probe.input_ids)) >= model.vocab_size:
        raise UserError(
            f"{path} is damaged: its rows do not go together, or are no rows of a model of {model.max_length:,} "
            f"positions and {model.vocab_size:,} words; take it from a copy of the run folder"
        )
    return {
        "input_ids": np.asarray(probe.input_ids, np.int32),
        "attention_mask": np.asarray(probe.attention_mask, bool),
    }
