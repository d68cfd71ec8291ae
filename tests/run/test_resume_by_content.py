"""A run goes on with the same content wherever it lies and however it is spelt, and with no other content."""

import json
import os
import shutil
from pathlib import Path

import grids
import numpy as np
import pytest
import tiny_run

from jaxdistill import config as configs
from jaxdistill import train
from jaxdistill.config import Config
from jaxdistill.errors import UserError
from jaxdistill.run import resume

CONSTANT = {"optim__schedule": "constant", "optim__warmup": 0.5}


@pytest.fixture(scope="module")
def places(tiny):
    """A folder with everything that a config can name, and the values that name it."""
    folder = tiny.folder / "a"
    folder.mkdir()
    shutil.copy(tiny.text, folder / "text.txt")
    tiny_run.write_text(folder / "held_out.txt", tiny_run.lines(40, seed=5))
    shutil.copytree(tiny.teacher, folder / "teacher")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.teacher)
    tiny_run.write_model(folder / "student", tokenizer, seed=3, num_hidden_layers=1)
    np.save(folder / "counts.npy", np.arange(len(tokenizer)) % 7 + 1)
    return folder


def named(folder: Path) -> dict[str, object]:
    return {
        "teacher__name": folder / "teacher",
        "student__name": folder / "student",
        "tokenizer__name": folder / "teacher",
        "data__path": folder / "text.txt",
        "data__eval_path": folder / "held_out.txt",
        "data__token_counts": folder / "counts.npy",
        "checkpoint__every": 2,
    }


@pytest.fixture(scope="module")
def begun(tiny, places):
    """A run of 4 steps that was stopped after step 3, so that it goes on from step 2."""
    workdir = tiny.folder / "begun"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(tiny_run.Stopped):
        tiny_run.stop_after(patch, 3)
        train.main(tiny_run.arguments(tiny, workdir, **named(places)))
    return workdir


@pytest.fixture(scope="module")
def uninterrupted(tiny, places):
    tiny_run.train(tiny, tiny.folder / "uninterrupted", **named(places))
    return tiny.folder / "uninterrupted"


def moved(tiny, places, tmp_path) -> dict[str, object]:
    shutil.copytree(places, tmp_path / "b")
    return named(tmp_path / "b")


def spelt_otherwise(tiny, places, tmp_path) -> dict[str, object]:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(places)
    return named(tmp_path / "folder" / ".." / "link") | {"teacher__name": f"{places}//teacher/"}


def prepared_and_renamed(tiny, places, tmp_path) -> dict[str, object]:
    store = tiny.folder / "cache" / tiny_run.saved(tiny.folder / "begun")["notes"]["text"]
    shutil.copytree(store, tmp_path / "corpus")
    return named(places) | {"data__prepared": tmp_path / "corpus"}


def split_and_compressed(tiny, places, tmp_path) -> dict[str, object]:
    import gzip

    lines = (places / "text.txt").read_bytes().splitlines(keepends=True)
    (tmp_path / "1.txt").write_bytes(b"".join(lines[:70]))
    (tmp_path / "2.txt.gz").write_bytes(gzip.compress(b"".join(lines[70:])))
    return named(places) | {"data__path": tmp_path / "*.txt*"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "other",
    grids.everyday(
        [moved, spelt_otherwise, prepared_and_renamed, split_and_compressed],
        *(moved, prepared_and_renamed, split_and_compressed),  # the run of 0.1.0 below has other spellings
    ),
)
def test_the_same_content_elsewhere_goes_on_to_the_same_bits(tiny, places, begun, uninterrupted, tmp_path, other):
    workdir = tmp_path / "run"
    shutil.copytree(begun, workdir)
    values = other(tiny, places, tmp_path)
    tiny_run.train(tiny, workdir, **values)
    a, b = tiny_run.saved(workdir), tiny_run.saved(uninterrupted)
    assert [name for name in a if name != "notes" and a[name].tobytes() != b[name].tobytes()] == []
    # The folder names the new place, so that evaluate finds it.
    recorded = json.loads((workdir / "config.json").read_text())
    assert recorded["data"]["path"] == str(values["data__path"])
    assert recorded["teacher"]["name"] == str(values["teacher__name"])


def other_text(folder: Path) -> None:
    tiny_run.write_text(folder / "text.txt", tiny_run.lines(199))


def other_held_out_text(folder: Path) -> None:
    tiny_run.write_text(folder / "held_out.txt", tiny_run.lines(40, seed=6))


def other_teacher(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    file = folder / "teacher" / "model.safetensors"
    tensors = load_file(file)
    name = min(tensors)
    save_file(tensors | {name: np.nextafter(tensors[name], 9)}, file, metadata={"format": "pt"})


def other_activation(folder: Path) -> None:
    path = folder / "teacher" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "relu"}))


def other_student(folder: Path) -> None:
    shutil.copytree(folder / "teacher", folder / "student", dirs_exist_ok=True)


def other_counts(folder: Path) -> None:
    counts = np.load(folder / "counts.npy")
    np.save(folder / "counts.npy", counts % 5 + 1)


def other_words_for_the_same_ids(folder: Path) -> None:
    """The rows are prepared, so that they stay the same ids."""
    for file in folder.glob("*/tokenizer.json"):
        tokenizer = json.loads(file.read_text())
        ids = tokenizer["model"]["vocab"]
        ids["cat"], ids["dog"] = ids["dog"], ids["cat"]
        file.write_text(json.dumps(tokenizer))


CHANGES = [
    (other_text, "the text or the tokenizer is not the one"),
    (other_held_out_text, "the held-out text of config.data.eval_path="),
    (other_teacher, "the teacher of config.teacher.name="),
    (other_activation, "the teacher of config.teacher.name="),
    (other_student, "the student of config.student.name="),
    (other_counts, "the token counts of config.data.token_counts="),
    (other_words_for_the_same_ids, "the tokenizer of config.tokenizer.name="),
]


@pytest.mark.slow
@pytest.mark.parametrize(("change", "said"), CHANGES, ids=[change.__name__ for change, _ in CHANGES])
def test_other_content_is_refused_and_nothing_is_touched(tiny, places, begun, tmp_path, change, said):
    workdir = tmp_path / "run"
    shutil.copytree(begun, workdir)
    values = moved(tiny, places, tmp_path)
    if change is other_words_for_the_same_ids:
        values |= {"data__prepared": tiny.folder / "cache" / tiny_run.saved(begun)["notes"]["text"]}
        del values["data__eval_path"]
    change(tmp_path / "b")
    before = tiny_run.bits(workdir)
    code, _, err = tiny_run.call(train.main, tiny_run.arguments(tiny, workdir, **values))
    assert code == 2 and err.splitlines()[-1].startswith(f"error: {said}") and err.count("error: ") == 1, err
    assert f"{workdir} was begun with" in err
    assert tiny_run.bits(workdir) == before


def as_of_0_1_0(workdir: Path) -> None:
    """Takes from the checkpoints' notes what that version did not record."""
    from jaxdistill.run import checkpoint

    for path in (workdir / "checkpoints").glob("*/notes/metadata"):
        notes = {name: value for name, value in json.loads(path.read_text()).items() if name != "digest"}
        del notes["content"], notes["steps"]
        path.write_text(json.dumps({**notes, "digest": checkpoint._digest(notes)}))


@pytest.mark.slow
def test_a_run_of_0_1_0_goes_on_where_places_are_spelt_otherwise(tiny, places, begun, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(begun, workdir)
    as_of_0_1_0(workdir)
    recorded = json.loads((workdir / "config.json").read_text())
    recorded["teacher"]["revision"] = recorded["student"]["revision"] = "main"  # which is refused today
    (workdir / "config.json").write_text(json.dumps(recorded))
    elsewhere = moved(tiny, places, tmp_path)
    code, _, err = tiny_run.call(train.main, tiny_run.arguments(tiny, workdir, **elsewhere))
    assert code == 2 and "the teacher of config.teacher.name=" in err and "cannot be compared" in err
    tiny_run.train(tiny, workdir, **spelt_otherwise(tiny, places, tmp_path))
    a, b = tiny_run.saved(workdir), tiny_run.saved(uninterrupted)
    assert [name for name in a if name != "notes" and a[name].tobytes() != b[name].tobytes()] == []


@pytest.mark.slow
def test_a_finished_run_says_so_at_once_and_can_be_longer_with_a_constant_rate(tiny, tmp_path, monkeypatch):
    run, whole = tmp_path / "run", tmp_path / "whole"
    short = CONSTANT | {"train__steps": 4, "export__to": "('pytorch',)"}
    tiny_run.train(tiny, run, **short)
    before = tiny_run.bits(run)
    with monkeypatch.context() as patch:
        patch.setattr("jaxdistill.run.loop.assemble", None)  # no model and no text is read
        code, out, err = tiny_run.call(train.main, tiny_run.arguments(tiny, run, **short))
    assert code == 0 and out + err == f"{run} is finished: all 4 steps are trained\n"
    assert tiny_run.bits(run) == before
    tiny_run.train(tiny, run, **short | {"train__steps": 6})
    assert [record["step"] for record in tiny_run.records(run, "train")] == [1, 2, 3, 4, 5, 6]
    # The warm-up is a share of all steps: with 2 of 4 it is the one of a run of 6 whose share is a third.
    tiny_run.train(tiny, whole, optim__schedule="constant", optim__warmup=1 / 3, train__steps=6)
    a, b = tiny_run.saved(run), tiny_run.saved(whole)
    assert [name for name in a if name != "notes" and a[name].tobytes() != b[name].tobytes()] == []
    kept = {path.name: (path / "model.safetensors").read_bytes() for path in run.glob("export-*")}
    assert kept["export-pytorch-of-step-4"] == before["export-pytorch/model.safetensors"]
    assert kept["export-pytorch"] != kept["export-pytorch-of-step-4"]


def config_with(**sections: dict[str, object]) -> Config:
    values = {"optim": {"schedule": "constant", "warmup": 0.0}, "train": {"steps": 4}}
    return Config().changed(**values).changed(**sections)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"optim": {"schedule": "linear"}}, "config.optim.schedule='linear'"),
        ({"optim": {"schedule": "cosine"}}, "config.optim.schedule='cosine'"),
        ({"loss": {"end": {"temperature": 1.0}}}, "config.loss.end={'temperature': 1.0}"),
        (
            {"student": {"layer_drop": 0.1, "layer_drop_schedule": "linear"}},
            "config.student.layer_drop_schedule='linear'",
        ),
    ],
)
def test_more_steps_are_refused_where_every_step_depends_on_their_number(tmp_path, sections, said):
    config = config_with(**sections)
    (tmp_path / "config.json").write_text(configs.to_json(config))
    longer = config.changed(train={"steps": 6})
    for refused in (
        lambda: resume.began_with(longer, tmp_path),  # before anything is read
        lambda: resume.check_length(longer, tmp_path, old=4, new=6, at=4),
    ):
        with pytest.raises(UserError) as error:
            refused()
        assert said in str(error.value) and f"config.student.name={tmp_path}" in str(error.value)
    assert resume.began_with(config, tmp_path) is not None
    resume.check_length(config, tmp_path, old=4, new=4, at=2)


def test_more_steps_with_a_constant_rate(tmp_path):
    config = config_with(optim={"warmup": 0.5})
    (tmp_path / "config.json").write_text(configs.to_json(config))
    assert resume.began_with(config.changed(train={"steps": 6}), tmp_path) is not None
    resume.check_length(config, tmp_path, old=4, new=6, at=3)
    with pytest.raises(UserError, match=r"would change from 2 to 3 steps after step 2"):
        resume.check_length(config, tmp_path, old=4, new=6, at=2)
    with pytest.raises(UserError, match=r"has trained 4 steps, and config\.train asks for 3"):
        resume.check_length(config, tmp_path, old=4, new=3, at=4)


def test_every_key_that_differs_is_listed(tmp_path):
    config = config_with()
    (tmp_path / "config.json").write_text(configs.to_json(config))
    other = config.changed(optim={"learning_rate": 0.1}, data={"max_length": 64, "path": "elsewhere.txt"})
    with pytest.raises(UserError) as error:
        resume.began_with(other, tmp_path)
    assert (
        "holds a run with config.data.max_length=128, config.optim.learning_rate=0.0005, and now they are 64, 0.1; "
    ) in str(error.value)


def test_places(tmp_path):
    """Two spellings of one existing place are one; a revision counts beside a hub name alone."""
    (tmp_path / "model").mkdir()
    keys = ("teacher.name", "teacher.revision")

    def place(name: str, revision: str) -> list[str]:
        return resume._places({"teacher.name": name, "teacher.revision": revision}, keys)

    here = place(str(tmp_path / "model"), "")
    assert here == place(f"{tmp_path}/./model/", "main") == place(os.path.relpath(tmp_path / "model"), "")
    assert place("user/model", "main") != place("user/model", "") != here
