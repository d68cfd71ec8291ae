"""A signal stops a run after its step, with a checkpoint and a code of its own; a second one stops it at once."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import grids
import pytest
import tiny_run

from jaxdistill.run import stop
from jaxdistill.run.stop import EXIT_CODE

# Signals are sent where the program says that it is, so that no test depends on the speed of a machine.
PROGRAM = """
import os, signal, sys, time
import jax
from jaxdistill import train

jax.config.update("jax_num_cpu_devices", 8)  # as in the tests, for the same bits
# A job in the background of a shell inherits SIGINT as ignored, one of nohup SIGHUP.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
where, names, argv = sys.argv[1], sys.argv[2].split(","), sys.argv[3:]


def send():
    for name in names:
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(0.3)


if where == "import":  # while a library is imported that swallows whatever is raised
    class Finder:
        def find_spec(self, name, *rest):
            if name == "orbax":
                try:
                    send()
                except BaseException:
                    pass
    sys.meta_path.insert(0, Finder())
else:
    from jaxdistill.run import training
    make = training.make_train_step

    def making(*args, **arguments):
        step, calls = make(*args, **arguments), 0

        def stepping(*inputs):
            nonlocal calls
            calls += 1
            if calls == int(where):
                send()
            return step(*inputs)

        return stepping

    training.make_train_step = making
sys.exit(train.main(argv))
"""


def run(tiny: tiny_run.Tiny, workdir: Path, where: str, names: str, **values) -> tuple[int, str]:
    argv = tiny_run.arguments(tiny, workdir, **values)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, where, names, *argv], capture_output=True, text=True, timeout=300
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def uninterrupted(tiny):
    tiny_run.train(tiny, tiny.folder / "uninterrupted", train__steps=6)
    return tiny.folder / "uninterrupted"


SIGNALS = ["SIGTERM", "SIGHUP", "SIGINT"]


@pytest.mark.slow
@pytest.mark.parametrize("name", grids.everyday(SIGNALS, "SIGTERM"))
def test_the_step_is_finished_and_saved_and_the_same_command_goes_on(tiny, uninterrupted, tmp_path, name):
    workdir = tmp_path / "run"
    code, err = run(tiny, workdir, "3", name, train__steps=6)
    assert code == EXIT_CODE == 75
    assert f"{name}: the run saves a checkpoint after this step and stops; a second signal stops it at once" in err
    assert err.splitlines()[-1] == (
        f"stopped by {name} after step 3 of 6; its checkpoint is saved in {workdir}, and the same command goes on from "
        "there"
    )
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["3"]
    tiny_run.train(tiny, workdir, train__steps=6)
    resumed, whole = tiny_run.saved(workdir), tiny_run.saved(uninterrupted)
    assert resumed["notes"] == whole["notes"]
    assert [at for at in whole if at != "notes" and resumed[at].tobytes() != whole[at].tobytes()] == []
    records = [[tiny_run.untimed(record) for record in tiny_run.records(folder)] for folder in (workdir, uninterrupted)]
    assert records[0] == records[1]


@pytest.mark.slow
def test_a_second_signal_stops_at_once(tiny, tmp_path):
    code, err = run(tiny, tmp_path / "run", "3", "SIGTERM,SIGINT", train__steps=6)
    assert code == 128 + signal.SIGINT
    assert err.splitlines()[-1] == "SIGINT: stopped at once; the same command goes on from the last checkpoint"
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "where"), grids.covering(SIGNALS, ["import", "1"]))
def test_before_the_first_step_is_done_the_first_signal_ends_the_process(tiny, tmp_path, name, where):
    began = time.monotonic()
    code, err = run(tiny, tmp_path / "run", where, name)
    assert code == EXIT_CODE and time.monotonic() - began < 60
    assert err.splitlines()[-1] == f"{name}: stopped with nothing to save; the same command goes on from here"
    assert not list(tmp_path.rglob("metrics.jsonl")) or "first step after" not in err


@pytest.mark.parametrize("name", SIGNALS)
def test_every_signal_asks_for_the_end_after_the_step(name):
    before = signal.signal(getattr(signal, name), signal.SIG_DFL)  # a run in the background of a shell ignores SIGINT
    try:
        with stop.listening() as asked:
            asked.defers = True
            os.kill(os.getpid(), getattr(signal, name))
            end = time.monotonic() + 30
            while not asked.asked and time.monotonic() < end:
                time.sleep(0.005)
        assert asked.asked == name
    finally:
        signal.signal(getattr(signal, name), before)


def test_ignored_signals_stay_ignored_and_handlers_come_back():
    before = {number: signal.getsignal(number) for number in stop.SIGNALS}
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop.listening() as asked:
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            asked.defers = True
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.2)
            assert asked.asked == ""
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
            assert asked.asked == "SIGTERM"
    finally:
        signal.signal(signal.SIGHUP, hangup)
    assert {number: signal.getsignal(number) for number in stop.SIGNALS} == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.slow
def test_checkpoints_by_time(tiny, uninterrupted, tmp_path):
    """With no time between checkpoints every step is saved; what is trained stays the same to the bit."""
    tiny_run.train(tiny, tmp_path / "run", train__steps=6, checkpoint__minutes=1e-9, checkpoint__keep=9)
    steps = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert steps == [1, 2, 3, 4, 5, 6]
    often, whole = tiny_run.saved(tmp_path / "run"), tiny_run.saved(uninterrupted)
    assert [at for at in whole if at != "notes" and often[at].tobytes() != whole[at].tobytes()] == []
    tiny_run.train(tiny, tmp_path / "never", train__steps=2, checkpoint__minutes=0.0)
    assert [path.name for path in (tmp_path / "never" / "checkpoints").iterdir()] == ["2"]


def test_ctrl_c_ends_a_command_also_where_an_exception_is_lost(monkeypatch, capfd):
    monkeypatch.setattr(stop, "_AGAIN", 0.05)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def lost(phase, info):  # what a callback of the garbage collector raises is printed, and the program goes on
        gc.callbacks.remove(lost)
        signal.raise_signal(signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt), stop.interruptible("unsaid"):
            gc.callbacks.append(lost)
            gc.collect()
            time.sleep(20)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert capfd.readouterr() == ("", "")


def test_ctrl_c_ends_a_command_at_once_while_a_library_is_imported(monkeypatch, tmp_path, capfd):
    (tmp_path / "interrupted_library.py").write_text(
        "import signal\ntry:\n    signal.raise_signal(signal.SIGINT)\nexcept KeyboardInterrupt:\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(os, "_exit", sys.exit)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit, match="130"), stop.interruptible("interrupted; nothing was written"):
            import interrupted_library  # noqa: F401 # pyright: ignore[reportMissingImports]
    finally:
        signal.signal(signal.SIGINT, before)
    assert capfd.readouterr().err == "interrupted; nothing was written\n"


def test_what_ignores_ctrl_c_goes_on_to_ignore_it():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop.interruptible("unsaid"):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
