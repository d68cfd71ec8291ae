"""Runs whose folder is an address in object storage, which a folder plays here."""

import argparse
import json

import bucket
import numpy as np
import pytest
import tiny_run

from jaxdistill import cli, train
from jaxdistill.errors import UserError
from jaxdistill.run import mirror

ADDRESS = "gs://bucket/runs/a"


@pytest.fixture
def storage(tmp_path, monkeypatch):
    return bucket.use(tmp_path / "storage", monkeypatch)


def argv(tiny, **values):
    return [f"--config={tiny.recipe}", f"--workdir={ADDRESS}", *tiny_run.overrides(**values)]


@pytest.mark.slow
def test_a_run_at_an_address_is_the_run_of_a_folder(tiny, storage, tmp_path, monkeypatch):
    """Torn after three steps, and gone on with by another machine, which has nothing but the address."""
    values = {"train__steps": 4, "checkpoint__every": 2, "export__to": "('pytorch',)"}
    monkeypatch.setattr(mirror, "PERIOD", 0.0)
    with monkeypatch.context() as patch:
        tiny_run.stop_after(patch, 3)
        with pytest.raises(SystemExit):
            train.main(argv(tiny, **values))
    run = storage / "bucket" / "runs" / "a"
    assert {"config.json", "metrics.jsonl", "origin.json", "probe.json", "student"} <= {p.name for p in run.iterdir()}
    assert [path.name for path in (run / "checkpoints").glob("[0-9]*")] == ["2"]
    assert not list(run.glob(".*"))
    code, _, err = tiny_run.call(train.main, argv(tiny, **values))
    assert code == 0 and f"resumed {ADDRESS} at step 2 of 4" in err, err
    assert f"to {ADDRESS}/export-pytorch" in err and "mirror" not in err
    tiny_run.train(tiny, tmp_path / "run", **values)
    tiny_run.assert_same_run(run, tmp_path / "run")
    weights = "export-pytorch/model.safetensors"
    assert (run / weights).read_bytes() == (tmp_path / "run" / weights).read_bytes()
    # Commands read the address, and write to another one.
    code, out, err = tiny_run.call(cli.main, ["evaluate", f"--workdir={ADDRESS}", "--metrics=perplexity", "--json"])
    assert code == 0, err
    last = tiny_run.records(run, "eval")[-1]["perplexity"]
    assert json.loads(out)["perplexity"] == pytest.approx(last, rel=1e-6)
    command = ["export", f"--workdir={ADDRESS}", "--to-pytorch", "--out=gs://bucket/student"]
    code, _, err = tiny_run.call(cli.main, command)
    assert code == 0 and (storage / "bucket" / "student" / "model.safetensors").is_file(), err
    code, _, err = tiny_run.call(cli.main, command)
    assert code == 2 and err == (
        "error: gs://bucket/student exists and is not empty: choose another --out, nothing is written over\n"
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


def test_what_cannot_be_reached_is_one_line(storage, monkeypatch):
    with pytest.raises(argparse.ArgumentTypeError, match="addresses begin with gs:// or s3://"):
        mirror.folder("ftp://host/run")
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
