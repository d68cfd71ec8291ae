"""Runs whose folder is an address in object storage, which a folder plays here."""

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import bucket
import numpy as np
import pytest
import tiny_run

from jaxdistill import cli, train
from jaxdistill.errors import UserError
from jaxdistill.run import checkpoint, mirror

ADDRESS = "gs://bucket/runs/a"
AT_S3 = "s3://bucket/runs/a"


@pytest.fixture
def storage(tmp_path, monkeypatch):
    return bucket.use(tmp_path / "storage", monkeypatch, ("gcs", "s3"))


VALUES = {"train__steps": 6, "checkpoint__every": 3, "export__to": "('pytorch',)"}


def argv(tiny, address):
    return [f"--config={tiny.recipe}", f"--workdir={address}", *tiny_run.overrides(**VALUES)]


@pytest.fixture(scope="module")
def in_a_folder(tiny, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    tiny_run.train(tiny, run, **VALUES)
    return run


def saved_at_once(save: Callable[..., None], manager: Any, *values: Any, **named: Any) -> None:
    save(manager, *values, **named)
    checkpoint.finish(manager)


@pytest.mark.slow
# At s3:// the run is the same, and its checkpoints are sent and fetched as a test below does.
@pytest.mark.parametrize("address", [ADDRESS, pytest.param(AT_S3, marks=pytest.mark.weekly)])
def test_a_run_at_an_address_is_the_run_of_a_folder(tiny, storage, in_a_folder, monkeypatch, address):
    """Torn after five steps, and gone on with by another machine, which has nothing but the address.

    The checkpoint of the third step is whole before the record of the fourth one is sent.
    """
    monkeypatch.setattr(mirror, "PERIOD", 0.0)
    with monkeypatch.context() as patch:
        tiny_run.stop_after(patch, 5)
        patch.setattr(checkpoint, "save", partial(saved_at_once, checkpoint.save))
        with pytest.raises(SystemExit):
            train.main(argv(tiny, address))
    run = storage / "bucket" / "runs" / "a"
    assert {"config.json", "metrics.jsonl", "origin.json", "probe.json", "student"} <= {p.name for p in run.iterdir()}
    assert [path.name for path in (run / "checkpoints").glob("[0-9]*")] == ["3"]
    assert not list(run.glob(".*"))
    code, _, err = tiny_run.call(train.main, argv(tiny, address))
    assert code == 0 and f"resumed {address} at step 3 of 6" in err, err
    assert f"to {address}/export-pytorch" in err and "mirror" not in err
    tiny_run.assert_same_run(run, in_a_folder)
    weights = "export-pytorch/model.safetensors"
    assert (run / weights).read_bytes() == (in_a_folder / weights).read_bytes()
    # Commands read the address, and write to another one.
    code, out, err = tiny_run.call(cli.main, ["evaluate", f"--workdir={address}", "--metrics=perplexity", "--json"])
    assert code == 0, err
    last = tiny_run.records(run, "eval")[-1]["perplexity"]
    assert json.loads(out)["perplexity"] == pytest.approx(last, rel=1e-6)
    out_of = f"{address[:2]}://bucket/student"
    command = ["export", f"--workdir={address}", "--to-pytorch", f"--out={out_of}"]
    code, _, err = tiny_run.call(cli.main, command)
    assert code == 0 and (storage / "bucket" / "student" / "model.safetensors").is_file(), err
    code, _, err = tiny_run.call(cli.main, command)
    assert code == 2 and err == (
        f"error: {out_of} exists and is not empty: choose another --out, nothing is written over\n"
    )


def test_files_are_fetched_and_only_changed_ones_are_sent(storage):
    run = storage / "bucket" / "runs" / "a"
    (run / "student").mkdir(parents=True)
    (run / "checkpoints" / "1").mkdir(parents=True)
    (run / "export-flax").mkdir()
    for name in ("config.json", "student/tokenizer.json", "checkpoints/1/large", "export-flax/large", ".holder.json"):
        (run / name).write_text(name)
    here = mirror.folder(f"{ADDRESS}/")
    mirror.fetch(here)
    names = {path.relative_to(here).as_posix() for path in here.rglob("*") if path.is_file()}
    assert names == {"config.json", "student/tokenizer.json"} and (here / "export-flax").is_dir()
    (run / "config.json").write_text("changed there")  # shows whether it is sent without a change here
    (here / "metrics.jsonl").write_text("{}\n")
    mirror.send(here)
    assert (run / "config.json").read_text() == "changed there" and (run / "metrics.jsonl").read_text() == "{}\n"
    (here / "metrics.jsonl").write_text("{}\n{}\n")
    mirror.send(here, every=60)
    assert (run / "metrics.jsonl").read_text() == "{}\n"
    (here / "config.json").unlink()
    mirror.send(here)
    assert (run / "metrics.jsonl").read_text() == "{}\n{}\n" and not (run / "config.json").exists()
    assert (run / "checkpoints" / "1" / "large").read_text() == "checkpoints/1/large"


def test_checkpoints_at_s3_are_sent_and_fetched_whole(storage):
    """orbax writes at gs:// itself, and not at s3://."""
    run = storage / "bucket" / "run"
    for step, names in {"2": ("d/1", "_CHECKPOINT_METADATA"), "4": ("d/1",)}.items():  # killed while it sent step 4
        for name in names:
            (run / "checkpoints" / step / name).parent.mkdir(parents=True, exist_ok=True)
            (run / "checkpoints" / step / name).write_text(step)
    here = mirror.folder("s3://bucket/run")
    mirror.fetch(here)
    saved = mirror.place_of_checkpoints(here)
    assert saved == here / "checkpoints" and str(mirror.place_of_checkpoints(mirror.folder(ADDRESS))).startswith(
        "gs://"
    )
    assert sorted(path.name for path in saved.rglob("*") if path.is_file()) == ["1", "_CHECKPOINT_METADATA"]
    for folder in ("6", "8.orbax-checkpoint-tmp-1"):
        (saved / folder).mkdir()
        for name in ("_CHECKPOINT_METADATA", "z"):
            (saved / folder / name).write_text("6")
    assert [path.name for _, path in mirror._files(here)][-1] == "_CHECKPOINT_METADATA"
    mirror.send(here)
    there = {path.name: path for path in (run / "checkpoints").iterdir()}
    assert set(there) == {"2", "4", "6"} and (there["6"] / "z").read_text() == "6"
    with pytest.raises(UserError, match=r"--workdir s3://bucket/run: 2 processes write .* gs://"):
        mirror.check_processes(here, 2)
    mirror.check_processes(here, 1)
    mirror.check_processes(mirror.folder(ADDRESS), 2)


def test_what_cannot_be_reached_is_one_line(storage, monkeypatch):
    with pytest.raises(argparse.ArgumentTypeError, match="addresses begin with gs:// or s3://"):
        mirror.folder("ftp://host/run")
    monkeypatch.delitem(bucket._registry, "s3")
    here = mirror.folder("s3://bucket/run")
    with pytest.raises(UserError, match=r"s3://bucket/run needs a package .*: pip install 'jaxdistill\[s3\]'"):
        mirror.fetch(here)
    monkeypatch.setattr(bucket.Bucket, "exists", lambda *a, **k: (_ for _ in ()).throw(PermissionError("403")))
    with pytest.raises(UserError, match=r"gs://bucket/runs/a cannot be read or written \(PermissionError: 403\)"):
        mirror.fetch(mirror.folder(ADDRESS))


def test_who_holds_an_address_is_the_one_that_came_last(storage, capsys):
    from jaxdistill.run.lock import GoneError, locked

    first, second = mirror.folder(ADDRESS), mirror.folder(ADDRESS)
    with locked(first) as held:
        held.check()
        with locked(second) as other:
            assert "names another process as its holder" in capsys.readouterr().err
            other.check()
            with pytest.raises(GoneError, match="deleted, moved or replaced"):
                held.check()
    assert not np.any([path.is_file() for path in storage.rglob("*")])
