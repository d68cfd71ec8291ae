"""Figures while a run trains: what they count, and where they are written."""

import sys
import time
from types import ModuleType

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from jaxdistill.run import checkpoint, log, writers


def test_tokens_per_second_are_real_tokens_in_the_time_between_two_records(monkeypatch):
    clock = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    written = []
    to = log.Log(
        lambda step, kind, figures: written.append((step, kind, figures)), lambda step: 1e-3, last_good=lambda: ""
    )
    # Rows of 6 positions: 5 + 2 tokens are real in the first batch, 6 + 1 in the second, 3 + 0 in the third.
    masks = [np.arange(6) < np.array(lengths)[:, None] for lengths in ([5, 2], [6, 1], [3, 0])]
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
    # Time and tokens of an evaluation, or of a checkpoint, do not count.
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

    def finish(self):
        self.finished += 1


def test_figures_go_to_wandb_under_one_id(tmp_path, monkeypatch):
    stand_in = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    for _ in range(2):  # a run and its resumption
        write, close = writers.wandb(tmp_path, project="distil", config={"train": {"steps": 4}})
        write(1, "train", {"loss": 0.5, "mlm": 0.25})
        write(2, "eval", {"perplexity": 3.5})
        close()
    first, second = stand_in.begun
    assert first == second == {
        "project": "distil", "dir": str(tmp_path), "id": (tmp_path / writers.WANDB_ID).read_text(), "resume": "allow",
        "config": {"train": {"steps": 4}},
    }  # fmt: skip
    assert stand_in.logged == [(1, {"train/loss": 0.5, "train/mlm": 0.25}), (2, {"eval/perplexity": 3.5})] * 2
    assert stand_in.finished == 2


@pytest.mark.slow
def test_wandb_in_its_own_offline_mode(tmp_path, monkeypatch):
    """Where wandb is installed: the stand-in above takes what it takes."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    write, close = writers.wandb(tmp_path, project="distil", config={"train": {"steps": 4}})
    write(1, "train", {"loss": 0.5})
    write(2, "eval", {"perplexity": 3.5})
    close()
    (file,) = tmp_path.rglob(f"*-{(tmp_path / writers.WANDB_ID).read_text()}.wandb")
    assert all(name in file.read_bytes() for name in (b"train/loss", b"0.5", b"eval/perplexity", b"3.5"))
