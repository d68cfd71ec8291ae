"""A run goes on, on other devices and in other pieces, with the same text and the same figures."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_run

from jaxdistill import recipe, train
from jaxdistill.config import Config
from jaxdistill.errors import UserError
from jaxdistill.run import accumulation, training
from jaxdistill.step import sharding
from jaxdistill.step.sharding import Meshes

EVERY = {"train__steps": 6, "checkpoint__every": 1, "evaluate__every": 6, "checkpoint__minutes": 0}
# Devices and settings of one start after the other, each of which takes two steps.
STARTS: tuple[tuple[int, dict[str, Any]], ...] = (
    (8, {}),
    (1, {"train__accumulation": 4, "student__remat": "full", "student__attention": "own"}),
    (8, {"mesh__fsdp": 4, "mesh__tensor": 2, "mesh__teacher_fsdp": 1, "train__accumulation": 0}),
)


def start(tiny: tiny_run.Tiny, workdir: Any, devices: int, steps: int, **values: Any) -> tuple[int, list[Any], str]:
    """(exit code, the text of every step, what was said) of a start that is stopped after `steps` steps."""
    seen: list[Any] = []
    make, every = training.make_train_step, jax.devices()[:devices]

    def make_seen(*arguments: Any) -> Any:
        step = make(*arguments)

        def seeing(state: Any, teacher: Any, batch: Any, key: Any) -> Any:
            if len(seen) == steps:
                raise tiny_run.Stopped
            seen.append(np.sort(np.asarray(batch["labels"]) + 1000 * np.asarray(batch["input_ids"]), axis=0))
            return step(state, teacher, batch, key)

        return seeing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_train_step", make_seen)
        patch.setattr(jax, "devices", lambda *rest: every)
        patch.setattr(jax, "device_count", lambda: devices)
        try:
            code, _, err = tiny_run.call(train.main, tiny_run.arguments(tiny, workdir, **EVERY, **values))
        except tiny_run.Stopped:
            return -1, seen, ""
    return code, seen, err


@pytest.mark.slow
def test_eight_devices_one_and_eight_in_another_mesh(tiny: tiny_run.Tiny) -> None:
    whole, moved = tiny.folder / "whole", tiny.folder / "moved"
    code, expected, err = start(tiny, whole, 8, 6)
    assert code == 0, err
    seen = []
    for devices, values in STARTS:
        code, batches, err = start(tiny, moved, devices, 2, **values)
        seen += batches
    code, batches, err = start(tiny, moved, *STARTS[-1][:1], 2, **STARTS[-1][1])
    assert code == 0 and not batches, err  # all six steps are trained, none twice
    for ours, theirs in zip(seen, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    config = json.loads((moved / "config.json").read_text())
    assert config["mesh"]["tensor"] == 2 and config["train"]["accumulation"] == 0
    # Dropout is drawn by micro-batch, so the figures of the steps on one device are near, and not equal.
    ours, theirs = (tiny_run.records(folder, "train") for folder in (moved, whole))
    assert [record["step"] for record in ours] == [record["step"] for record in theirs] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5 if a["step"] <= 2 else 0.05)


def test_the_fewest_micro_batches_that_fit() -> None:
    config = Config().changed(train={"batch_size": 128, "accumulation": 0}, mask={"group": 4})
    two, one = (sharding.make_mesh(data=n, fsdp=1, devices=jax.devices()[:n]) for n in (2, 1))
    choices = accumulation.possible(config, Meshes(two, one))
    assert choices == [1, 2, 4, 8, 16]
    tried: list[int] = []

    def peak(pieces: int) -> int:
        tried.append(pieces)
        return 100 + 800 // pieces

    assert accumulation.fewest(choices, peak, limit=None) == 1 and not tried
    assert accumulation.fewest(choices, peak, limit=400) == 4 and tried == [1, 2, 4]
    with pytest.raises(UserError, match=r"not even 16 micro-batches fit into the 100 bytes .* config.mesh.fsdp"):
        accumulation.fewest(choices, peak, limit=100)


@pytest.mark.parametrize(
    ("batch_size", "pieces", "said"),
    [(32, 4, "set config.train.accumulation to 0"), (16, 1, r"let devices share rows \(config.mesh.tensor=2\)")],
)
def test_what_lets_all_devices_take_part_is_said(batch_size: int, pieces: int, said: str) -> None:
    config = Config().changed(
        train={"batch_size": batch_size, "accumulation": pieces}, mask={"group": 4}, evaluate={"batch_size": 8}
    )
    mesh = sharding.make_mesh(data=8, fsdp=1)
    with pytest.raises(UserError, match=rf"config.train.batch_size={batch_size} must be a multiple .*{said}"):
        training.check_devices(config, Meshes(mesh, mesh))


RECIPES = sorted(path for path in (Path(__file__).parents[2] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs_on_any_slice_or_says_what_to_set(path: Path) -> None:
    """With micro-batches chosen by the run, the batch, and so the mathematics, stays as it is."""
    values = {"data.path": "none", "tokenizer.name": "none", "train.accumulation": 0, "mesh.fsdp": 1}
    config = recipe.read(str(path), [f"--config.{key}={value}" for key, value in values.items()])
    for count in (1, 8, 16, 64):
        devices = [jax.devices()[0]] * count  # the number alone counts
        mesh = sharding.make_mesh(data=-1, fsdp=1, devices=devices)
        if config.train.batch_size // config.mask.group % count == 0:
            training.check_devices(config, Meshes(mesh, mesh))
            assert accumulation.possible(config, Meshes(mesh, mesh))
            continue
        with pytest.raises(UserError, match=r"config.train.batch_size=\d+ must be a multiple") as error:
            training.check_devices(config, Meshes(mesh, mesh))
        found = re.search(r"set config.train.batch_size to (\d+)$", str(error.value))
        assert found, error.value
        training.check_devices(config.changed(train={"batch_size": int(found[1])}), Meshes(mesh, mesh))
        if shared := re.search(r"config.mesh.tensor=(\d)\)", str(error.value)):
            mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=int(shared[1]), devices=devices)
            training.check_devices(config, Meshes(mesh, mesh))


def test_batches_of_evaluation_are_filled_up() -> None:
    mesh = sharding.make_mesh(data=8, fsdp=1)
    placed = sharding.put_batch({"mask": np.ones((12, 3), bool)}, mesh)["mask"]
    np.testing.assert_array_equal(placed, np.arange(16)[:, None] < np.full((1, 3), 12))
