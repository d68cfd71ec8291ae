"""The files of a run folder that are written once, at its start, and read by resume, evaluate and export.

config.json      every value of the config
student/         config.json and tokenizer files: with a checkpoint, a complete student
probe.json       a few rows of real token ids, on which an exported folder is compared with the checkpoint
checkpoints/     written by orbax
metrics.jsonl    a record in each line
.lock            held by the process that trains, as lock.py says; .holder.json names it while it runs
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from jaxdistill.errors import UserError
from jaxdistill.files import write_text, writing
from jaxdistill.models import hub
from jaxdistill.models.model import Model, build_model, param_shapes
from jaxdistill.models.tokenizer import load_tokenizer
from jaxdistill.run import checkpoint


class Student(NamedTuple):
    """The student of a checkpoint."""

    model: Model
    params: PyTree
    tokenizer: Any
    step: int
    figures: dict[str, float]  # the last evaluation before the checkpoint
    probe: dict[str, np.ndarray]
    config: dict[str, Any]  # of the run, as JSON


def read_config(workdir: Path) -> dict[str, Any] | None:
    """The config of the run that stands in `workdir`, or None.

    Raises:
      UserError: it is there and cannot be read, or the folder holds something else.
    """
    path = workdir / "config.json"
    if workdir.is_file():
        raise UserError(f"--workdir {workdir} is a file; name a folder")
    if not path.exists():
        if (workdir / checkpoint.FOLDER).exists():
            raise UserError(f"{workdir} holds checkpoints but no config.json; name another --workdir")
        return None
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e}); name another --workdir") from e
    if not isinstance(config, dict) or "teacher" not in config:
        raise UserError(f"{path} is not the config of a run; name another --workdir")
    return config


def create(workdir: Path, *, config: str, student: Model, tokenizer: Any, probe: dict[str, np.ndarray]) -> None:
    """Writes the files that stay the same in a run; config.json last, as its presence means that all are there."""
    with writing(workdir):
        student.config.save_pretrained(workdir / "student")
        tokenizer.save_pretrained(workdir / "student")
        write_text(workdir / "probe.json", json.dumps({name: x.tolist() for name, x in probe.items()}))
        write_text(workdir / "config.json", config)


def load_student(workdir: Path, *, step: int | None = None, report: Callable[[str], None]) -> Student:
    """The student of a run's last whole checkpoint, or of the checkpoint after `step` updates.

    Raises:
      UserError: `workdir` is no run folder, or has no such checkpoint.
    """
    config = read_config(workdir)
    if config is None:
        raise UserError(f"{workdir} is no run folder: it has no config.json")
    if not (workdir / checkpoint.FOLDER).is_dir():
        raise UserError(f"{workdir} has no checkpoint yet")
    model = build_model(hub.load_config(workdir / "student"))
    with checkpoint.open_manager(workdir, read_only=True) as manager:
        if step is not None and step not in manager.all_steps():
            raise UserError(f"{workdir} has no checkpoint of step {step}; it has {sorted(manager.all_steps())}")
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), param_shapes(model))
        found = checkpoint.restore(manager, {"student": shapes}, report=report, step=step, read_only=True)
    if found is None:
        raise UserError(f"{workdir} has no checkpoint yet")
    at, items, notes = found
    probe = {
        name: np.asarray(x, dtype=bool if name == "attention_mask" else np.int32)
        for name, x in json.loads((workdir / "probe.json").read_text()).items()
    }
    tokenizer = load_tokenizer(workdir / "student")
    return Student(model, items["student"], tokenizer, at, notes["figures"], probe, config)
