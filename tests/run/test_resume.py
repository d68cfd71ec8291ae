"""A run that is stopped or killed at any moment and started again ends in the bits of an uninterrupted run."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import grids
import jax
import numpy as np
import pytest
import tiny_run

pytestmark = pytest.mark.slow  # test_train stops and resumes a run of four steps in the fast part

# Dropout is on (the teacher's config has 0.1), layers drop, widths differ from batch to batch, an epoch is 12 updates.
VARIED = {
    "train__steps": 29,
    "train__accumulation": 2,
    "train__batch_size": 32,
    "data__buckets": "(16,32)",
    "checkpoint__every": 4,
    "evaluate__every": 8,
    "loss__alpha_hidden_mse": 1.0,
    "student__layer_drop": 0.3,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_run.make(tmp_path_factory.mktemp("resume"), count=400)


@pytest.fixture(scope="module")
def uninterrupted(tiny):
    workdir = tiny.folder / "uninterrupted"
    tiny_run.train(tiny, workdir, **VARIED)
    return workdir


def test_the_uninterrupted_run_is_varied(tiny, uninterrupted):
    """The tests below would prove little without several epochs, several widths and parameters that move."""
    first, last = tiny_run.saved(uninterrupted, 28), tiny_run.saved(uninterrupted)
    same = {name for name in first if name.startswith("student") and first[name].tobytes() == last[name].tobytes()}
    # The bias of keys has a gradient of 0 up to rounding, as softmax is invariant to it.
    assert all("['key']['bias']" in name for name in same)
    assert {record["layers"] for record in tiny_run.records(uninterrupted, "train")} == {0, 1, 2}
    steps = [record["step"] for record in tiny_run.records(uninterrupted, "train")]
    assert steps == list(range(1, 30))
    assert [record["step"] for record in tiny_run.records(uninterrupted, "eval")] == [0, 8, 16, 24, 29]


@pytest.mark.weekly  # the short form is in test_train
@pytest.mark.parametrize("updates", [2, 6, 21])  # 21: in the second epoch
def test_stopped_and_run_again(tiny, uninterrupted, tmp_path, monkeypatch, updates):
    from jaxdistill import train

    workdir = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(tiny_run.Stopped):
        tiny_run.stop_after(patch, updates)
        train.main(tiny_run.arguments(tiny, workdir, **VARIED))
    assert len(tiny_run.records(workdir, "train")) >= updates - 1  # the steps after the checkpoint are computed again
    tiny_run.train(tiny, workdir, **VARIED)
    tiny_run.assert_same_run(workdir, uninterrupted)


def test_a_damaged_checkpoint_costs_only_its_steps(tiny, uninterrupted, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    (data,) = (path for path in (workdir / "checkpoints" / "29" / "student" / "d").iterdir())
    data.write_bytes(data.read_bytes()[:-100])
    tiny_run.train(tiny, workdir, **VARIED)
    said = capsys.readouterr().err
    assert "checkpoint 29 is damaged (" in said and f"resumed {workdir} at step 28 of 29" in said
    tiny_run.assert_same_run(workdir, uninterrupted)
    assert (workdir / "checkpoints" / "damaged-29").is_dir()


def test_a_finished_run_is_only_reported(tiny, uninterrupted, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    before = tiny_run.bits(workdir)
    tiny_run.train(tiny, workdir, **VARIED)
    assert tiny_run.bits(workdir) == before
    assert f"{workdir} is finished: all 29 steps are trained" in "".join(capsys.readouterr())


def test_what_may_change_on_resume(tiny, uninterrupted, tmp_path, monkeypatch):
    """Parameters do not depend on the settings of evaluation, logs and checkpoints."""
    from jaxdistill import train

    workdir = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(tiny_run.Stopped):
        tiny_run.stop_after(patch, 9)
        train.main(tiny_run.arguments(tiny, workdir, **VARIED))
    other = {"checkpoint__every": 11, "evaluate__every": 5, "log__every": 7, "checkpoint__keep": 1}
    tiny_run.train(tiny, workdir, **VARIED | other)
    a, b = tiny_run.saved(workdir), tiny_run.saved(uninterrupted)
    assert all(a[name].tobytes() == b[name].tobytes() for name in a if name != "notes")


SCRIPT = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv.pop(1)))
jax.config.update("jax_numpy_rank_promotion", "raise")
from jaxdistill.train import main
sys.exit(main())
"""


def start(tiny: tiny_run.Tiny, workdir: Path, *, devices: int = 8, **values) -> subprocess.Popen:
    with (workdir.parent / f"{workdir.name}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(devices), *tiny_run.arguments(tiny, workdir, **values)],
            stdout=log,
            stderr=log,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )


def wait_for(process: subprocess.Popen, happened, *, seconds: float = 120) -> bool:
    """Waits until `happened()`; returns False if the process ends before."""
    end = time.monotonic() + seconds
    while not happened():
        if process.poll() is not None:
            return False
        assert time.monotonic() < end, "nothing happens"
        time.sleep(0.0005)
    return True


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_killed_at_any_moment(tiny, uninterrupted, tmp_path):
    """A process is killed (SIGKILL) while it writes a checkpoint, and between two steps' records.

    In the whole grid it is also killed while it starts, and a second time while it writes and between records.
    """
    workdir = tmp_path / "run"
    rng = random.Random(0)
    checkpoints = workdir / "checkpoints"

    def writing() -> bool:
        return any("orbax-checkpoint-tmp" in path.name for path in checkpoints.glob("*"))

    def lines() -> int:
        path = workdir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    torn = 0
    for moment in ("start", "write", "step", "write", "step") if grids.FULL else ("write", "step"):
        process = start(tiny, workdir, **VARIED)
        if moment == "start":
            alive = wait_for(process, workdir.exists)
        elif moment == "write":
            alive = wait_for(process, writing)
        else:
            begun, some = lines(), rng.randint(2, 6)
            alive = wait_for(process, lambda begun=begun, some=some: lines() != begun) and wait_for(
                process, lambda some=some: lines() >= some
            )
            time.sleep(rng.random() * 0.05)
        if not alive:
            break
        kill(process)
        torn += writing()
    log = workdir.parent / f"{workdir.name}.log"
    assert torn, f"no kill fell into the write of a checkpoint: {log.read_text()}"
    assert start(tiny, workdir, **VARIED).wait() == 0, log.read_text()
    tiny_run.assert_same_run(workdir, uninterrupted)
    assert not writing()


@pytest.mark.weekly  # test_elastic goes on from eight devices with one, and from one with eight
def test_other_devices_go_on_with_the_run(tiny, tmp_path):
    """A run that one device begins and eight devices continue is the run on eight devices."""
    values = VARIED | {"train__steps": 12, "checkpoint__every": 4, "checkpoint__keep": 9}
    one, eight = tmp_path / "one", tmp_path / "eight"
    process = start(tiny, one, devices=1, **values)
    assert process.wait() == 0, (tmp_path / "one.log").read_text()
    tiny_run.train(tiny, eight, **values)
    for step in (8, 12):
        shutil.rmtree(one / "checkpoints" / str(step))
    tiny_run.train(tiny, one, **values)
    a, b = tiny_run.saved(one), tiny_run.saved(eight)
    for name in a:
        if name.startswith("student"):
            np.testing.assert_allclose(a[name], b[name], atol=1e-5, err_msg=name)
    assert len(jax.devices()) == 8
