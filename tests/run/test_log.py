"""Figures while a run trains: what they count, and where they are written."""

import json
import struct
import sys
import time
from collections.abc import Iterator
from types import ModuleType

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from jaxdistill import train
from jaxdistill.run import checkpoint, log, writers


def test_tokens_per_second_are_real_tokens_in_the_time_between_two_records(monkeypatch):
    clock = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    written = []
    to = log.Log(
        lambda step, kind, figures: written.append((step, kind, figures)), lambda step: 1e-3, last_good=lambda: ""
    )
    # Rows of 6 positions: 5 + 2 tokens are real in the first batch, 6 + 1 in the second, 3 + 0 in the third.
    masks = [np.arange(6) < np.array(lengths)[:, None] for lengths in ([5, 2], [6, 1], [3, 0], [4, 4])]
    batches = iter([{"attention_mask": mask} for mask in masks])
    metrics = {name: jnp.float32(1.5) for name in ("loss", "grad_norm")}
    to.next(batches)
    to.next(batches)
    to.put(2, metrics)
    clock += 4.0
    to.read()
    to.next(batches)
    to.put(3, metrics)
    clock += 0.5
    to.read()
    assert [(step, kind, figures["tokens_per_s"]) for step, kind, figures in written] == [
        (2, "train", 14 / 4.0),
        (3, "train", 3 / 0.5),
    ]
    # Neither time nor tokens before a restart count, as after compilation, an evaluation or a checkpoint.
    to.next(batches)
    to.restart()
    to.put(4, metrics)
    to.read()
    assert "tokens_per_s" not in written[-1][2]


@pytest.mark.slow
def test_figures_on_a_checkpoint_are_of_its_step(tiny, tmp_path):
    """Every step is saved and every other one is measured."""
    run = tmp_path / "run"
    tiny_run.train(tiny, run, checkpoint__every=1, checkpoint__keep=9, evaluate__every=2, train__steps=5)
    measured = {
        record["step"]: {name: value for name, value in record.items() if name not in ("step", "time", "kind")}
        for record in tiny_run.records(run, "eval")
    }
    assert sorted(measured) == [0, 2, 4, 5] and len({str(figures) for figures in measured.values()}) == 4
    notes = {step: tiny_run.saved(run, step)["notes"] for step in range(1, 6)}
    assert {step: each["metrics"] for step, each in notes.items()} == {step: measured.get(step, {}) for step in notes}
    # What a resumed run returns, if it has nothing left to measure, is the last evaluation before.
    assert [notes[step]["figures"] for step in range(2, 6)] == [measured[step] for step in (2, 2, 4, 5)]
    from jaxdistill.run.folder import load_student

    figures = {step: load_student(run, step=step, report=print).figures for step in (3, 4)}
    assert figures == {3: {}, 4: measured[4]}
    assert checkpoint.best_of(run, "perplexity") == min(
        ((step, figures["perplexity"]) for step, figures in measured.items() if step), key=lambda item: item[1]
    )


SAMPLES = writers.Table(("prompt", "student"), [("a | b", "c\nd")])


class Wandb(ModuleType):
    """As much of the package wandb as the writer uses; the tests need no account, no network and none of its 75 MB."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun, self.logged, self.finished = [], [], 0

    def init(self, **settings):
        self.begun.append(settings)
        return self

    def log(self, figures, *, step):
        self.logged.append((step, figures))

    def Table(self, columns, data):
        return "table", columns, data

    def finish(self):
        self.finished += 1


def test_figures_go_to_wandb_under_one_id(tmp_path, monkeypatch):
    stand_in = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    for _ in range(2):  # a run and its resumption
        write, close, show = writers.wandb(tmp_path, project="distil", config={"train": {"steps": 4}})
        write(1, "train", {"loss": 0.5, "mlm": 0.25})
        write(2, "eval", {"perplexity": 3.5})
        show(2, "samples", SAMPLES)
        close()
    first, second = stand_in.begun
    assert first == second == {
        "project": "distil", "dir": str(tmp_path), "id": (tmp_path / writers.WANDB_ID).read_text(), "resume": "allow",
        "config": {"train": {"steps": 4}},
    }  # fmt: skip
    table = ("table", ["prompt", "student"], [["a | b", "c\nd"]])
    records = [(1, {"train/loss": 0.5, "train/mlm": 0.25}), (2, {"eval/perplexity": 3.5}), (2, {"samples": table})]
    assert stand_in.logged == records * 2
    assert stand_in.finished == 2


def log_records(data: bytes) -> Iterator[bytes]:
    """The records of a W&B file, a log of LevelDB's form: pieces with a checksum, a length and a kind before each."""
    at, whole = 7, b""  # after the name and the version of the format
    while at < len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left  # no piece begins in the last bytes of a block
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            yield whole
            whole = b""


@pytest.mark.slow
def test_wandb_keeps_what_was_written(tmp_path, monkeypatch):
    """Offline, from the file of its own that it sends later; so the stand-in above takes what the package takes."""
    pytest.importorskip("wandb", reason="needs the extra `wandb`, which is not installed")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    write, close, show = writers.wandb(tmp_path, project="distil", config={"train": {"steps": 4}})
    write(1, "train", {"loss": 0.5, "mlm": 0.25})
    write(2, "eval", {"perplexity": 3.5})
    show(2, "samples", SAMPLES)
    close()
    (file,) = tmp_path.rglob(f"*-{(tmp_path / writers.WANDB_ID).read_text()}.wandb")
    found = {}
    for data in log_records(file.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        for item in record.history.item:
            found[record.history.step.num, item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    table = json.loads((file.parent / "files" / found[2, "samples.path"]).read_text())
    assert (table["columns"], table["data"]) == (list(SAMPLES.columns), [list(row) for row in SAMPLES.rows])
    figures = {(step, name): value for (step, name), value in found.items() if "/" in name}
    assert figures == {(1, "train/loss"): 0.5, (1, "train/mlm"): 0.25, (2, "eval/perplexity"): 3.5}


class Trackio(ModuleType):
    """As much of the package trackio as the writer uses."""

    def __init__(self) -> None:
        super().__init__("trackio")
        self.begun, self.logged, self.finished = [], [], 0

    def init(self, **settings):
        print("* Trackio project initialized")
        self.begun.append(settings)
        return self

    def log(self, figures, *, step):
        self.logged.append((step, figures))

    def Table(self, dataframe):
        return dataframe.to_dict("list")

    def finish(self):
        self.finished += 1


def test_figures_and_texts_go_to_trackio_under_one_name(tmp_path, monkeypatch, capsys):
    stand_in = Trackio()
    monkeypatch.setitem(sys.modules, "trackio", stand_in)
    for _ in range(2):  # a run and its resumption
        write, close, show = writers.trackio(tmp_path, project="distil", config={"train": {"steps": 4}})
        write(1, "train", {"loss": 0.5})
        show(2, "samples", SAMPLES)
        close()
    first, second = stand_in.begun
    assert first == second and first["project"] == "distil" and first["resume"] == "allow"
    assert first["name"] == f"{tmp_path.name}-{(tmp_path / writers.TRACKIO_ID).read_text()[:8]}"
    table = {"prompt": ["a | b"], "student": ["c\nd"]}
    assert stand_in.logged == [(1, {"train/loss": 0.5}), (2, {"samples": table})] * 2 and stand_in.finished == 2
    assert capsys.readouterr().out == ""  # which is for results


@pytest.mark.slow
def test_trackio_on_this_machine(tmp_path, monkeypatch):
    """Where trackio is installed: the stand-in above takes what it takes."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    for step in (1, 2):
        write, close, show = writers.trackio(tmp_path, project="distil", config={"train": {"steps": 4}})
        write(step, "train", {"loss": 0.5 / step})
        show(step, "samples", SAMPLES)
        close()
    [run] = trackio.Api().runs("distil")
    assert run.name.startswith(tmp_path.name)


def test_tensorboard_shows_texts_as_a_table(tmp_path):
    _, close, show = writers.tensorboard(tmp_path)
    show(3, "samples", SAMPLES)
    close()
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    assert b"samples" in data and b"text" in data  # the tag, and the plug-in that shows it
    assert b"| prompt | student |\n| --- | --- |\n| a &#124; b | c d |" in data


def test_the_teachers_figures_stand_beside_the_students():
    table = log.beside_teacher({"perplexity": 3.5, "kl": 0.25, "teacher_perplexity": 2.0})
    assert table.columns == ("figure", "student", "teacher")
    assert table.rows == [("perplexity", "3.5", "2"), ("kl", "0.25", "")]


@pytest.mark.slow
def test_a_run_shows_its_prompts_at_every_evaluation(tiny, tmp_path, monkeypatch):
    """To a tracker; what is printed at the end is the last of them, and no figure of the run moves."""
    stand_in = Trackio()
    monkeypatch.setitem(sys.modules, "trackio", stand_in)
    monkeypatch.setattr(writers, "check_installed", lambda settings: None)
    plain, tracked = tmp_path / "plain", tmp_path / "tracked"
    values = {"evaluate__prompts": "('the [MASK] sees a dog.',)", "evaluate__every": 2}
    tiny_run.train(tiny, plain, **values)
    code, _, err = tiny_run.call(train.main, tiny_run.arguments(tiny, tracked, log__trackio="project", **values))
    assert code == 0, err
    shown = {step: figures["samples"] for step, figures in stand_in.logged if "samples" in figures}
    assert list(shown) == [0, 2, 4] and all(list(one) == ["prompt", "teacher", "student"] for one in shown.values())
    assert shown[0]["teacher"] == shown[4]["teacher"] and shown[0]["student"] != shown[4]["student"]
    assert f"  student: {shown[4]['student'][0]}\n" in err
    assert sum("figures" in figures for _, figures in stand_in.logged) == 3
    assert [tiny_run.untimed(one) for one in tiny_run.records(plain)] == [
        tiny_run.untimed(one) for one in tiny_run.records(tracked)
    ]
