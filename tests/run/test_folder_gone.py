"""A run whose folder is deleted, moved or replaced under it stops with a line, and with no exit code 0."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_run

from jaxdistill import train
from jaxdistill.run import checkpoint, training
from jaxdistill.run.lock import HOLDER, GoneError, Held, locked


def test_what_is_checked(tmp_path):
    run = tmp_path / "run"
    with locked(run) as held:
        held.check()
        held.needed = ("config.json",)
        with pytest.raises(GoneError, match=r"config\.json was deleted"):
            held.check()
        (run / "config.json").write_text("{}")
        held.check()
        own = (run / HOLDER).read_text()
        (run / HOLDER).write_text(json.dumps({"process": 1}))  # another process that began in a new folder
        with pytest.raises(GoneError, match=f"--workdir {run} was deleted, moved or replaced"):
            held.check()
        (run / HOLDER).write_text(own)
        run.rename(tmp_path / "elsewhere")
        with pytest.raises(GoneError, match="name its new place as --workdir"):
            held.check()
    Held(run).check()  # of a process that holds nothing


def test_a_save_that_ends_after_its_folder_is_gone_leaves_nothing(tmp_path):
    (tmp_path / "checkpoints" / "2" / "student").mkdir(parents=True)
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp-1").mkdir()
    checkpoint.remove_torn(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
    (tmp_path / "mine").write_text("")  # then the folder is not what a save has made
    checkpoint.remove_torn(tmp_path, is_gone=True)
    assert (tmp_path / "checkpoints" / "2" / "student").exists()
    (tmp_path / "mine").unlink()
    checkpoint.remove_torn(tmp_path, is_gone=True)
    assert list(tmp_path.iterdir()) == []
    checkpoint.remove_torn(tmp_path / "none", is_gone=True)


def delete(run: Path) -> None:
    shutil.rmtree(run)


def delete_what_is_seen(run: Path) -> None:
    for path in run.iterdir():
        if not path.name.startswith("."):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def delete_the_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def move(run: Path) -> None:
    run.rename(run.parent / "moved")


def replace(run: Path) -> None:
    shutil.rmtree(run)
    run.mkdir()
    (run / HOLDER).write_text("{}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("when", "happen"),
    [
        ("step", delete),
        pytest.param("step", move, marks=pytest.mark.weekly),  # to the run, a folder that was deleted
        ("save", delete_what_is_seen),
        ("save", delete_the_checkpoints),
        ("save", replace),
    ],
)
def test_a_run_without_its_folder_stops(tiny, tmp_path, monkeypatch, happen, when):
    run = tmp_path / "run"
    make, save = training.make_train_step, checkpoint.save

    def make_step(*args, **arguments):
        step = make(*args, **arguments)

        def stepping(state, *inputs):
            if int(state.step) == 1:
                happen(run)
            return step(state, *inputs)

        return stepping

    def saving(manager, at, *args, **arguments):
        save(manager, at, *args, **arguments)
        if at == 2:
            manager.wait_until_finished()
            happen(run)

    if when == "step":
        monkeypatch.setattr(training, "make_train_step", make_step)
    else:
        monkeypatch.setattr(checkpoint, "save", saving)
    values = {"train__steps": 4, "checkpoint__every": 2, "log__every": 100, "export__to": "('pytorch',)"}
    code, _, err = tiny_run.call(train.main, tiny_run.arguments(tiny, run, **values))
    assert code == 2 and "Traceback" not in err, err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "was deleted, moved or replaced while the run trained in it" in line
    left = sorted(path.name for path in run.iterdir()) if run.exists() else []
    assert (
        left
        == {
            delete: [],
            delete_what_is_seen: [],
            delete_the_checkpoints: [".lock", "config.json", "metrics.jsonl", "origin.json", "probe.json", "student"],
            move: [],
            replace: [HOLDER],
        }[happen]
    )
    if happen is move:  # and goes on there
        moved = tmp_path / "moved"
        monkeypatch.undo()
        tiny_run.train(tiny, moved, **values)
        assert tiny_run.records(moved, "train")[-1]["step"] == 4 and (moved / "export-pytorch").is_dir()
