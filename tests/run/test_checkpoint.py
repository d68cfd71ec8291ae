"""A checkpoint is restored bit for bit, or found to be damaged, and then the checkpoint before is restored."""

import errno
import functools
import gc
import shutil
from typing import Any

import grids
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdistill.errors import UserError
from jaxdistill.run import checkpoint

Tree = dict[str, Any]


@functools.cache
def items(seed: int) -> Tree:
    """The items that the loop saves: student; step, projections and optax state. They have all dtypes that occur."""
    rng = np.random.default_rng(seed)
    student = {
        "dense": {"kernel": jnp.asarray(rng.normal(size=(4, 6)), jnp.float32), "bias": jnp.zeros(6)},
        "low": jnp.asarray(rng.normal(size=5), jnp.bfloat16),
    }
    projections = {"1>2": {"kernel": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}}
    params = {"student": student, "projections": projections}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-3, 0.0, 9)))
    state = optimizer.init(params)
    grads = jax.tree.map(lambda x: jnp.full_like(x, 0.1 * seed + 0.1), params)
    _, state = jax.jit(optimizer.update)(grads, state, params)
    return {"student": student, "rest": {"step": jnp.int32(seed), "projections": projections, "opt_state": state}}


def notes(seed: int) -> dict[str, Any]:
    return {"data": {"next_index": seed}, "figures": {"perplexity": 1 / 3 + seed}}


def same(a: Any, b: Any) -> bool:
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs
    )


def write(workdir, steps, metrics=None, **options) -> None:
    with checkpoint.open_manager(workdir, **options) as manager:
        for step in steps:
            measured = None if metrics is None else metrics[step]
            checkpoint.save(manager, step, items(step), notes=notes(step), metrics=measured)
        checkpoint.finish(manager)


def read(workdir, **options) -> tuple[Any, list[str]]:
    said: list[str] = []
    with checkpoint.open_manager(workdir, read_only=options.get("read_only", False), keep=5) as manager:
        return checkpoint.restore(manager, items(0), report=said.append, **options), said


def steps_in(workdir) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def is_step(found: Any, step: int) -> bool:
    at, arrays, record = found
    record = {name: record[name] for name in ("data", "figures")}
    return at == step and same(arrays, items(step)) and record == notes(step)


def test_round_trip(tmp_path):
    write(tmp_path, [3])
    found, said = read(tmp_path)
    assert is_step(found, 3) and said == []
    assert type(found[1]["rest"]["opt_state"][1][0]) is optax.ScaleByAdamState
    # The student alone, as evaluate and export read it.
    with checkpoint.open_manager(tmp_path, read_only=True) as manager:
        found = checkpoint.restore(manager, {"student": items(0)["student"]}, report=said.append)
    assert found is not None and found[0] == 3 and said == []
    assert same(found[1], {"student": items(3)["student"]})


def test_nothing_to_restore(tmp_path):
    assert read(tmp_path) == (None, [])


def test_reading_writes_nothing(tmp_path):
    write(tmp_path, [1])
    before = sorted(tmp_path.rglob("*"))
    read(tmp_path, read_only=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_stays(tmp_path):
    figures = {1: 5.0, 2: 2.0, 3: 9.0, 4: 3.0, 5: 4.0, 6: None, 7: None}
    metrics = {step: None if value is None else {"perplexity": value} for step, value in figures.items()}
    write(tmp_path, figures, metrics, keep=2, best="perplexity", keep_steps=(3,))
    assert steps_in(tmp_path) == [2, 3, 6, 7]  # the best; the one to keep; the last two
    # A resumed run also knows the best checkpoint.
    write(tmp_path, [8, 9], {8: {"perplexity": 2.5}, 9: None}, keep=1, best="perplexity")
    assert steps_in(tmp_path) == [2, 9]
    write(tmp_path, [10, 11], {10: {"perplexity": 1.5}, 11: None}, keep=1, best="perplexity")
    assert steps_in(tmp_path) == [10, 11]
    write(tmp_path, [12], keep=1)
    assert steps_in(tmp_path) == [12]


def test_no_metric_of_that_name_keeps_the_last(tmp_path):
    write(tmp_path, [1, 2], {1: {"loss": 1.0}, 2: {"loss": 2.0}}, keep=1, best="perplexity")
    assert 2 in steps_in(tmp_path)


# The files of a checkpoint; if a new orbax writes other files, `test_every_file_is_damaged_in_turn` fails.
FILES = (
    "_CHECKPOINT_METADATA",
    "commit_success.txt",
    "notes/metadata",
    "notes/commit_success.txt",
    *(
        f"{item}/{name}"
        for item in ("student", "rest")
        for name in (
            "_METADATA",
            "_sharding",
            "commit_success.txt",
            "d/*",
            "manifest.ocdbt",
            "ocdbt.process_0/d/*",
            "ocdbt.process_0/manifest.ocdbt",
        )
    ),
)


DAMAGES = ("deleted", "empty", "half", "first", "middle", "last")


def damage(path, how: str) -> None:
    data = path.read_bytes()
    if how == "deleted":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "half":
        path.write_bytes(data[: len(data) // 2])
    else:
        changed = bytearray(data)
        for at in {"first": [0], "middle": [len(data) // 2], "last": [len(data) - 1]}[how]:
            changed[at] ^= 1 << (at % 8)
        path.write_bytes(bytes(changed))
    assert how == "deleted" or path.read_bytes() != data


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    write(folder, [1, 2], {1: {"perplexity": 2.0}, 2: {"perplexity": 1.0}}, keep=5)
    return folder


def files(workdir, step: int) -> list[Any]:
    return sorted(path for path in (workdir / "checkpoints" / str(step)).rglob("*") if path.is_file())


def test_every_file_is_damaged_in_turn(two):
    root = two / "checkpoints" / "2"
    matched = [set(root.glob(pattern)) for pattern in FILES]
    assert set(files(two, 2)) == set().union(*matched)
    assert all(matched)


# Reads that tensorstore has under way when orbax gives up end later, in threads of its own, on a closed event loop.
@pytest.mark.slow  # many cases; the tests below damage one file each
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("pattern", "how"), grids.covering(FILES, DAMAGES))
def test_damage_is_seen(two, tmp_path, pattern, how, caplog):
    workdir = tmp_path / "run"
    shutil.copytree(two, workdir)
    for path in (workdir / "checkpoints" / "2").glob(pattern):
        if path.stat().st_size or how == "deleted":
            damage(path, how)
    found, said = read(workdir)
    gc.collect()
    assert caplog.messages == []  # nothing is logged beside the messages to `report`
    if is_step(found, 2):
        assert said == []
        return
    assert is_step(found, 1)
    assert len(said) == 1 and "\n" not in said[0]
    assert said[0].startswith("checkpoint 2 is damaged (") and said[0].endswith("falling back to the one before")
    # The run continues, and saves that step again.
    write(workdir, [2], {2: {"perplexity": 1.0}}, keep=5, best="perplexity")
    found, said = read(workdir)
    assert is_step(found, 2) and said == []
    assert steps_in(workdir) == [1, 2]


@pytest.mark.slow
def test_the_same_step_may_be_damaged_again(two, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(two, workdir)
    for names in ({"damaged-2"}, {"damaged-2", "damaged-2-1"}):
        damage(workdir / "checkpoints" / "2" / "notes" / "metadata", "half")
        assert is_step(read(workdir)[0], 1)
        assert names <= {path.name for path in (workdir / "checkpoints").iterdir()}
        write(workdir, [2], keep=5)


@pytest.mark.slow
def test_all_damaged(two, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(two, workdir)
    for step in (1, 2):
        damage(workdir / "checkpoints" / str(step) / "notes" / "metadata", "half")
    # Every start fails and moves nothing: a run must not start anew where there are checkpoints.
    for _ in range(2):
        with pytest.raises(UserError, match=r"no checkpoint in .* can be read"):
            read(workdir)
        assert steps_in(workdir) == [1, 2]


def test_a_reader_leaves_the_damaged_one_in_place(two, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(two, workdir)
    damage(workdir / "checkpoints" / "2" / "notes" / "metadata", "half")
    found, said = read(workdir, read_only=True)
    assert is_step(found, 1) and len(said) == 1
    assert steps_in(workdir) == [1, 2]


READ_ERRORS = [
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ESTALE, "Stale file handle"),
    PermissionError(errno.EACCES, "Permission denied"),
    # As tensorstore tells of it.
    ValueError("UNAVAILABLE: Error reading \"a\": Failed to read from file 7: Input/output error [os_error_code='5']"),
]


@pytest.mark.parametrize("error", READ_ERRORS, ids=lambda error: type(error).__name__)
def test_a_read_that_fails_leaves_a_whole_checkpoint_as_it_is(two, tmp_path, monkeypatch, error):
    """Only what is missing or of another content is damaged; a disk or a mount may answer otherwise another time."""
    workdir = tmp_path / "run"
    shutil.copytree(two, workdir)

    def fail(*args, **arguments):
        raise ValueError("orbax's own words") from error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.ocp.CheckpointManager, "restore", fail)
        with pytest.raises(UserError, match=r"checkpoint 2 in .* cannot be read now \(.*\), and may be whole"):
            read(workdir)
    found, said = read(workdir)
    assert is_step(found, 2) and said == [] and steps_in(workdir) == [1, 2]


def test_memory_that_runs_out_while_a_checkpoint_is_read_is_no_damage(two, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(two, workdir)
    for error in (MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")):

        def fail(*args, error=error, **arguments):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.ocp.CheckpointManager, "restore", fail)
            with pytest.raises(type(error)):
                read(workdir)
    assert steps_in(workdir) == [1, 2]


def test_a_step_by_name(two):
    found, said = read(two, step=1)
    assert is_step(found, 1) and said == []


def test_half_written_folders_of_a_killed_run_go(two, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(two, workdir)
    torn = workdir / "checkpoints" / "3.orbax-checkpoint-tmp-1"
    shutil.copytree(workdir / "checkpoints" / "2", torn)
    assert is_step(read(workdir, read_only=True)[0], 2) and torn.exists()
    write(workdir, [3], keep=5)  # orbax deletes the folder in the background, before the next save ends
    assert not torn.exists() and is_step(read(workdir)[0], 3)


DTYPES = (np.float32, jnp.bfloat16, np.int32, np.uint8)


@settings(deadline=None, max_examples=60)
@given(
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
    where=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 31),
)
def test_any_flipped_bit_changes_the_fingerprint(dtype, seed, where, bit):
    # All arrays have one shape, so that all examples of a dtype share a compiled program.
    size = 7 * 11 * np.dtype(dtype).itemsize
    raw = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    flipped = raw.copy()
    flipped[int(where * size)] ^= 1 << (bit % 8)
    one, other = ({"a": x.view(dtype).reshape(7, 11)} for x in (raw, flipped))
    before, after = checkpoint.fingerprint(one), checkpoint.fingerprint(other)
    assert before.tolist() != after.tolist()
    assert before.tolist() == checkpoint.fingerprint({"a": one["a"].copy()}).tolist()


def test_swapped_values_change_the_fingerprint():
    x = np.arange(6, dtype=np.float32)
    swapped = x[[1, 0, 2, 3, 4, 5]]
    assert checkpoint.fingerprint({"a": x}).tolist() != checkpoint.fingerprint({"a": swapped}).tolist()
    pair = {"a": x, "b": swapped}
    assert checkpoint.fingerprint(pair).shape == (2,)


def test_the_fingerprint_does_not_hang_on_the_devices():
    devices = jax.devices()
    assert len(devices) == 8
    x = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
    one = checkpoint.fingerprint({"a": jax.device_put(x, devices[0])}).tolist()
    mesh = Mesh(np.asarray(devices).reshape(2, 4), ("data", "fsdp"))
    for spec in (PartitionSpec(), PartitionSpec(None, "fsdp"), PartitionSpec("fsdp"), PartitionSpec("data", "fsdp")):
        array = jax.device_put(x, NamedSharding(mesh, spec))
        assert checkpoint.fingerprint({"a": array}).tolist() == one


def test_restore_puts_arrays_where_the_templates_say(tmp_path):
    write(tmp_path, [1])
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    placed = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec())), items(0))
    with checkpoint.open_manager(tmp_path) as manager:
        found = checkpoint.restore(manager, placed, report=print)
    assert found is not None
    arrays = found[1]
    assert same(arrays, items(1))
    assert all(x.sharding.is_equivalent_to(y.sharding, x.ndim) for x, y in zip(
        jax.tree.leaves(arrays), jax.tree.leaves(placed), strict=True))  # fmt: skip


def test_an_asynchronous_save_holds_what_was_there_when_it_began(tmp_path):
    """The step overwrites the state that is donated to it while the checkpoint of that state is being written."""
    state = {"student": {"a": jnp.zeros((512, 1024))}, "rest": {"b": jnp.arange(1024.0)}}
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    expected = {}
    with checkpoint.open_manager(tmp_path, keep=20) as manager:
        for step in range(1, 9):
            state = bump(state)
            expected[step] = jax.tree.map(np.array, state)
            checkpoint.save(manager, step, state, notes={}, metrics=None)
            for _ in range(5):
                state = bump(state)
        checkpoint.finish(manager)
        for step, wanted in expected.items():
            found = checkpoint.restore(manager, state, report=print, step=step)
            assert found is not None and same(jax.tree.map(np.asarray, found[1]), wanted), step
