"""Two and four real processes train one run: the numbers of one process, one stop, one end."""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny_run

from jaxdistill import cli, cluster, processes, train
from jaxdistill.cluster import Cluster, cluster_of
from jaxdistill.errors import UserError

# Trains as the command does; at a step, the process of one number gets a signal, so that no test waits for a clock.
PROGRAM = """
import os, pathlib, signal, sys
import jax, pytest, tiny_run
from jaxdistill import train
from jaxdistill.run import lock

rows, where, name, argv = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:]
lock._DELAY = 1.0
if rows:
    tiny_run.keep_rows(pytest.MonkeyPatch(), pathlib.Path(rows))
if name:
    from jaxdistill.run import training
    make = training.make_train_step

    def making(*args, **arguments):
        step, calls = make(*args, **arguments), 0

        def stepping(*inputs):
            nonlocal calls
            calls += 1
            if calls == 3 and jax.process_index() == where:
                jax.block_until_ready(inputs[0])
                os.kill(os.getpid(), getattr(signal, name))
            return step(*inputs)

        return stepping

    training.make_train_step = making
sys.exit(train.main(argv))
"""


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def together(
    count: int,
    argv: Sequence[str] | Sequence[Sequence[str]],
    *,
    where: int = 0,
    name: str = "",
    devices: int = 2,
    rows: Path | str = "",
) -> list[tuple[int, list[str]]]:
    """(exit code, lines of its own on standard error) of each of `count` processes, `devices` devices in all.

    Args:
      argv: the arguments, or those of each process.
      where, name: the process that gets a signal before its third step, and the name of the signal.
      rows: file to which each process adds the rows of its steps; "" = none.
    """
    cluster = [f"--coordinator=127.0.0.1:{free_port()}", f"--processes={count}", "--process-timeout=30"]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices // count), "PYTHONPATH": os.pathsep.join(sys.path)}
    of_each = argv if isinstance(argv[0], list) else [argv] * count
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rows), str(where), name, *own, *cluster, f"--process-id={number}"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, own in enumerate(of_each)
    ]
    # At the same time, as a pipe that nobody reads would stop the process that writes to it.
    said = [""] * count
    readers = [
        threading.Thread(target=lambda i=i, one=one: said.__setitem__(i, one.communicate(timeout=300)[1]))
        for i, one in enumerate(running)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    return [
        (one.returncode, [line for line in text.splitlines() if "[Gloo]" not in line])
        for one, text in zip(running, said, strict=True)
    ]


def assert_close(run: Path, other: Path) -> None:
    """The figures of every record to 1e-6, and all arrays of the last checkpoint to the rounding of sums."""
    a, b = tiny_run.records(run), tiny_run.records(other)
    assert [record["kind"] for record in a] == [record["kind"] for record in b]
    for x, y in zip(map(tiny_run.untimed, a), map(tiny_run.untimed, b), strict=True):
        del x["kind"], y["kind"]
        assert x == pytest.approx(y, rel=1e-6, abs=1e-6), x["step"]
    a, b = tiny_run.saved(run), tiny_run.saved(other)
    assert a.keys() == b.keys()
    for name in a.keys() - {"notes"}:
        np.testing.assert_allclose(a[name], b[name], atol=2e-6, err_msg=name)
    for name in ("data", "text", "content", "steps", "config"):
        assert a["notes"][name] == b["notes"][name]


QUICK = {"train__steps": 2, "evaluate__metrics": "('perplexity',)", "student__layers": "[0]"}


@pytest.mark.weekly  # the run that a signal stops, below, is compared with one process as closely
def test_two_processes_train_what_one_does(tiny, tmp_path):
    """Each on one device: half of the rows of every batch, half of the checkpoint."""
    ended = together(2, tiny_run.arguments(tiny, tmp_path / "two", **QUICK))
    assert [code for code, _ in ended] == [0, 0], ended
    assert ended[1][1] in ([], ["loading the libraries ..."])  # the first one speaks for both
    tiny_run.train(tiny, tmp_path / "one", **QUICK)
    assert_close(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_a_signal_to_one_stops_all_at_one_step_and_the_same_command_goes_on(tiny, tmp_path, monkeypatch):
    """One process has trained the first step on eight devices; two processes go on with one device each."""
    values = {"train__steps": 8, "export__to": "('pytorch',)", "evaluate__prompts": "('the [MASK] sees',)"}
    values["checkpoint__every"] = 1
    argv, of_two, of_one = tiny_run.arguments(tiny, tmp_path / "two", **values), tmp_path / "rows", tmp_path / "of_one"
    with monkeypatch.context() as patch:
        tiny_run.stop_after(patch, 1)
        tiny_run.keep_rows(patch, of_two)
        with pytest.raises(tiny_run.Stopped):
            train.main(argv)
    ended = together(2, argv, where=1, name="SIGTERM", rows=of_two)
    assert [code for code, _ in ended] == [75, 75], ended
    last = [lines[-1] for _, lines in ended]
    assert last[0].startswith("stopped by a signal to another process after step ")
    assert last[1].startswith("stopped by SIGTERM after step ") and last[0].split("step")[1] == last[1].split("step")[1]
    saved = max(int(path.name) for path in (tmp_path / "two" / "checkpoints").iterdir())
    assert 4 <= saved <= 7 and f"after step {saved} of 8" in last[0]
    ended = together(2, argv, rows=of_two)
    assert [code for code, _ in ended] == [0, 0], ended
    tiny_run.keep_rows(monkeypatch, of_one)
    tiny_run.train(tiny, tmp_path / "one", **values)
    assert_close(tmp_path / "two", tmp_path / "one")
    assert tiny_run.rows_kept(of_two) == tiny_run.rows_kept(of_one)
    for name in ("config.json", "model.safetensors", "README.md", "tokenizer.json"):
        assert (tmp_path / "two" / "export-pytorch" / name).is_file()
    from safetensors.numpy import load_file

    files = [load_file(tmp_path / run / "export-pytorch" / "model.safetensors") for run in ("two", "one")]
    assert files[0].keys() == files[1].keys()
    for name in files[0]:
        np.testing.assert_allclose(files[0][name], files[1][name], atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("where", [0, pytest.param(1, marks=pytest.mark.weekly)])  # the first coordinates the others
def test_a_killed_process_ends_the_other_with_a_line_and_the_run_goes_on(tiny, tmp_path, where, monkeypatch):
    """After the loss of process 1, one process on eight devices goes on with what two have done."""
    values = {"train__steps": 6, "checkpoint__every": 1}
    argv, of_two, of_one = tiny_run.arguments(tiny, tmp_path / "two", **values), tmp_path / "rows", tmp_path / "of_one"
    began = time.monotonic()
    ended = together(2, argv, where=where, name="SIGKILL", rows=of_two)
    assert ended[where][0] == -signal.SIGKILL and ended[1 - where][0] == processes.GOES_ON, ended
    assert ended[1 - where][1][-1] == f"error: {processes.LOSS}"
    assert time.monotonic() - began < 150
    if where == 1:
        with monkeypatch.context() as patch:
            tiny_run.keep_rows(patch, of_two)
            tiny_run.train(tiny, tmp_path / "two", **values)
    else:
        ended = together(2, argv, rows=of_two)
        assert [code for code, _ in ended] == [0, 0], ended
    tiny_run.keep_rows(monkeypatch, of_one)
    tiny_run.train(tiny, tmp_path / "one", **values)
    assert_close(tmp_path / "two", tmp_path / "one")
    assert tiny_run.rows_kept(of_two) == tiny_run.rows_kept(of_one)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.weekly)])
def test_processes_with_parameters_split_over_all_of_them(tiny, tmp_path, count):
    """A model wide enough to be split: no process holds it whole, and prompts and export see it whole."""
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 256, "num_hidden_layers": 2}
    texts = tiny.text.read_text().splitlines()
    wide = tiny_run.write_model(tmp_path / "wide", tiny_run.make_tokenizer(texts), **sizes)
    values = {
        "teacher__name": wide,
        "mesh__fsdp": 8,
        "train__steps": 2,
        "export__to": "('flax',)",
        "evaluate__prompts": "('the [MASK] sees',)",
    }
    ended = together(count, tiny_run.arguments(tiny, tmp_path / "several", **values), devices=8)
    assert [code for code, _ in ended] == [0] * count, ended
    assert any("student: " in line for line in ended[0][1])
    tiny_run.train(tiny, tmp_path / "one", **values)
    assert_close(tmp_path / "several", tmp_path / "one")
    assert (tmp_path / "several" / "export-flax" / "flax_model.msgpack").is_file()


@pytest.mark.slow
def test_without_a_shared_folder_all_say_so_before_the_first_step(tiny, tmp_path):
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    ended = together(2, [tiny_run.arguments(tiny, folder) for folder in folders])
    assert [code for code, _ in ended] == [2, 2], ended
    for _, lines in ended:
        assert "is not one folder for all 2 processes: process 1 on " in lines[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_error_of_one_process_ends_all_with_its_line(tiny, tmp_path):
    """The folder is held by another process, which the first one alone asks."""
    from jaxdistill.run.lock import locked

    with locked(tmp_path / "run"):
        ended = together(2, tiny_run.arguments(tiny, tmp_path / "run"))
    assert [code for code, _ in ended] == [2, 2], ended
    assert ended[0][1][-1].startswith(f"error: --workdir {tmp_path / 'run'} is in use by process ")
    assert ended[1][1][-1].startswith("error: process 0 on ") and "is in use by process " in ended[1][1][-1]


@pytest.mark.slow
def test_the_coordinator_waits_in_vain(tiny, tmp_path):
    argv = tiny_run.arguments(tiny, tmp_path / "run")
    cluster = [f"--coordinator=127.0.0.1:{free_port()}", "--processes=2", "--process-id=0", "--process-timeout=2"]
    done = subprocess.run(
        [sys.executable, "-m", "jaxdistill.train", *argv, *cluster], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and "did not come together at 127.0.0.1:" in done.stderr.splitlines()[-1]
    assert "***" not in done.stderr and not (tmp_path / "run").exists()


def flags_of(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cluster.add_flags(parser)
    return parser.parse_args(argv)


def test_flags_come_before_the_environment():
    environment = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    assert cluster_of(flags_of(), {}) == Cluster("", None, None, cluster.PATIENCE)
    assert cluster_of(flags_of(), environment)[:3] == ("a:1", 4, 3)
    flags = flags_of("--coordinator=b:2", "--process-id=0", "--process-timeout=7")
    assert cluster_of(flags, environment) == Cluster("b:2", 4, 0, 7)
    for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        with pytest.raises(UserError, match=f"{name}='x' must be a number"):
            cluster_of(flags_of(), {name: "x"})
    with pytest.raises(UserError, match="--processes 0 must be 1 or more"):
        cluster_of(flags_of("--processes=0"), {})
    with pytest.raises(UserError, match="--process-timeout 0 must be 1 second or more"):
        cluster_of(flags_of("--process-timeout=0"), {})


@pytest.mark.parametrize(
    ("cluster", "said"),
    [
        (Cluster("a:1"), "--coordinator without --processes and --process-id: no cluster was detected"),
        (Cluster("", 2, 0), "--processes and --process-id without --coordinator"),
        (Cluster("a:1", 2, 2), "--process-id 2 of --processes 2: it must be 0 to 1"),
        (Cluster("a", 2, 0), "--coordinator 'a' must be HOST:PORT"),
        (Cluster("a:0", 2, 0), "--coordinator 'a:0' must be HOST:PORT"),
        (Cluster("a:99999", 2, 0), "--coordinator 'a:99999' must be HOST:PORT"),
    ],
)
def test_what_cannot_be_meant_is_refused_at_once(cluster, said):
    with pytest.raises(UserError, match=said):
        processes.join(cluster)


@pytest.mark.slow
def test_an_address_that_cannot_be_used_is_refused_in_time():
    began = time.monotonic()
    with pytest.raises(UserError, match=r"cannot be reached from process 1 on .* in 1 s"):
        processes.join(Cluster(f"127.0.0.1:{free_port()}", 2, 1, 1))
    with pytest.raises(UserError, match="cannot be reached"):
        processes.join(Cluster("no-such-host.invalid:8476", 2, 1, 1))
    assert time.monotonic() - began < 30
    with socket.create_server(("", 0)) as server, pytest.raises(UserError, match="process 0 cannot listen there"):
        processes.join(Cluster(f"127.0.0.1:{server.getsockname()[1]}", 2, 0, 1))


def test_a_scheduler_says_who_belongs_together(monkeypatch):
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "node[03-04]",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
    }
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    completed = cluster.completed(Cluster())
    assert completed[:3] == (f"node03:{65535 - 2**12 + 1 + 7}", 2, 1)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    processes.join(Cluster())  # one task has nobody to wait for
    assert processes.count() == 1 and processes.is_first() and processes.gathered("place", "x") == ["x"]


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        ({}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, None),  # each takes the one of its number
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, []),  # all of its host
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "CUDA_VISIBLE_DEVICES": "3"}, []),  # --gpus-per-task=1
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, []),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "JAX_LOCAL_DEVICE_IDS": "0,1"}, None),
    ],
)
def test_the_gpus_of_a_process(environment, devices):
    assert cluster.own_devices(environment) == devices


def test_processes_that_differ_say_in_what(monkeypatch):
    """What each tells the others is as of two processes here; the first thing that differs is told."""
    told = []
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "gathered", lambda what, text: [*told, text])
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    values = {"config.train.steps": 4, "config.data.path": "a"}
    told.append(json.dumps({"host": "there", "values": {name: str(x) for name, x in values.items()}}))
    processes.check_same("settings", values, advice="repeat")
    said = r"^config\.train\.steps is 4 in process 0 on there, and 5 in process 1 on here; repeat$"
    with pytest.raises(UserError, match=said):
        processes.check_same("settings", values | {"config.train.steps": 5}, advice="repeat")
    with pytest.raises(UserError, match=r"^config\.data\.path is a in process 0 on there, and not there in process 1"):
        processes.check_same("settings", {"config.train.steps": 4}, advice="repeat")


@pytest.mark.parametrize("command", ["report", "plan"])
def test_a_command_of_one_process_says_so(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--processes=2"])
    assert f"error: --processes is for several processes, and {command} is run by one; " in capsys.readouterr().err


def test_flags_of_train_are_listed(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    assert "--coordinator HOST:PORT" in capsys.readouterr().out


def test_devices_that_share_rows_are_of_one_process(monkeypatch):
    from jaxdistill.config import Config
    from jaxdistill.run import training
    from jaxdistill.step.sharding import make_meshes

    config = Config().changed(mesh={"tensor": 4}, train={"batch_size": 64})
    meshes = make_meshes(config.mesh, student=0, teacher=0)
    training.check_devices(config, meshes)
    monkeypatch.setattr("jax.process_count", lambda: 4)
    monkeypatch.setattr("jax.local_device_count", lambda: 2)
    with pytest.raises(UserError, match=r"config\.mesh\.tensor=4 must divide the 2 devices of each process"):
        training.check_devices(config, meshes)
