"""Teacher and student on devices of their own are the step, and the run, that they are on one mesh."""

import functools
import json
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_step as one_mesh
import tiny
import tiny_run
from test_step import GROUP, LABELLED, VOCAB, assert_close

from jaxdistill import cli, train
from jaxdistill.errors import UserError
from jaxdistill.losses.objective import init_projections
from jaxdistill.losses.term import Objective
from jaxdistill.run import training
from jaxdistill.step import sharding
from jaxdistill.step.forward import Distillation, teacher_outputs
from jaxdistill.step.settings import MeshConfig
from jaxdistill.step.sharding import Meshes
from jaxdistill.step.state import Placement, TrainState
from jaxdistill.step.train_step import UpdateSettings, make_train_step

CAUSAL = {"ce": 5.0, "clm": 2.0, "cos": 1.0, "hidden_mse": 1.0, "attention": 1.0}


@functools.cache
def pair(kind: str) -> SimpleNamespace:
    """Models and their parameters, from 16 wide to 8, so that there are projections; and three batches."""
    if kind == "masked":
        made = one_mesh.models()
        return SimpleNamespace(**vars(made), weights=one_mesh.WEIGHTS, batches=one_mesh.big_batches())
    narrow = {"n_embd": 8, "n_layer": 1}
    made = SimpleNamespace(teacher=tiny.model(kind), student=tiny.model(kind, **narrow), weights=CAUSAL)
    made.teacher_params = tiny.params(kind)
    aim = Objective(CAUSAL, temperature=2.0, tokens="all", layer_map=((0, 0), (1, 2)))
    made.params = {
        "student": tiny.params(kind, **narrow),
        "projections": init_projections(
            aim, student_width=8, teacher_width=16, num_layers=(1, 2), key=jax.random.key(0)
        ),
    }
    rng = np.random.default_rng(0)
    made.batches = []
    for _ in range(3):
        mask = np.arange(8) < rng.integers(2, 9, 32)[:, None]
        ids = rng.integers(5, 101, mask.shape).astype(np.int32)
        predicted = mask & np.roll(mask, -1, axis=1) & (np.arange(8) < 7)
        labels = np.where(predicted, np.roll(ids, -1, axis=1), -100).astype(np.int32)
        documents = np.where(np.arange(8) < 4, 0, 1).astype(np.int32)  # two in every row
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "label_mask": predicted}
        made.batches.append({**batch, "segment_ids": np.broadcast_to(documents, mask.shape).copy()})
    return made


@functools.cache
def run(
    kind: str,
    *,
    tokens: str = "all",
    head: str = "fused",
    accumulation: int = 1,
    devices: tuple[int, int] = (0, 0),
    fsdp: int = 1,
) -> SimpleNamespace:
    """Three updates; devices: of student and teacher."""
    made = pair(kind)
    if devices == (0, 0):
        mesh = sharding.make_mesh(data=1, fsdp=1, devices=jax.devices()[:1])
        meshes = Meshes(mesh, mesh)
    else:
        meshes = sharding.make_meshes(MeshConfig(fsdp=fsdp), student=devices[0], teacher=devices[1])
    mesh, teacher_mesh = meshes
    optimizer = optax.sgd(0.01, momentum=0.9)

    def init(params: Any) -> TrainState:
        params = jax.tree.map(jnp.array, params)
        return TrainState(jnp.int32(0), params, optimizer.init(params))

    shardings = sharding.by_rule(jax.eval_shape(init, made.params), mesh, smallest=1)
    teacher_shardings = sharding.by_rule(made.teacher_params, teacher_mesh, smallest=1)
    aim = Objective(made.weights, 2.0, tokens, layer_map=((0, 0), (1, 2)), head=head)
    step = make_train_step(
        Distillation(made.student, made.teacher, aim, GROUP, lambda length: LABELLED),
        optimizer,
        Placement(meshes, shardings, teacher_shardings),
        # Dropout is drawn by micro-batch; the whole runs below have it.
        UpdateSettings(accumulation=accumulation, dropout=False),
    )
    made = SimpleNamespace(step=step, mesh=mesh, teacher_mesh=teacher_mesh, metrics=[])
    made.teacher = jax.device_put(pair(kind).teacher_params, teacher_shardings)
    state = jax.jit(init, out_shardings=shardings)(pair(kind).params)
    for batch in pair(kind).batches:
        state, metrics = step(state, made.teacher, sharding.put_batch(batch, mesh), jax.random.key(7))
        made.metrics.append(metrics)
    made.metrics, made.state = jax.device_get(made.metrics), state
    return made


def weekly(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.weekly)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "tokens", "head", "accumulation", "devices", "fsdp"),
    [
        ("masked", "masked", "fused", 2, (4, 2), 2),
        weekly("masked", "all", "fused", 1, (4, 4), 1),
        ("masked", "all", "dense", 2, (2, 4), 1),
        ("gpt2", "all", "fused", 2, (2, 2), 1),
        weekly("masked", "all", "fused", 2, (2, 2), 1),
        weekly("masked", "all", "fused", 1, (1, 1), 1),
        weekly("masked", "all", "dense", 1, (4, 4), 1),
        weekly("masked", "masked", "fused", 1, (1, 1), 1),
        weekly("masked", "masked", "fused", 1, (1, 4), 1),
        weekly("masked", "masked", "fused", 2, (4, 4), 1),
        weekly("masked", "masked", "dense", 1, (2, 2), 1),
        ("masked", "masked", "dense", 2, (4, 4), 2),
        weekly("gpt2", "all", "fused", 1, (4, 4), 1),
        weekly("gpt2", "all", "dense", 1, (1, 1), 1),
        ("gpt2", "all", "dense", 2, (4, 1), 1),
    ],
)
def test_two_meshes_are_one(
    kind: str, tokens: str, head: str, accumulation: int, devices: tuple[int, int], fsdp: int
) -> None:
    many = run(kind, tokens=tokens, head=head, accumulation=accumulation, devices=devices, fsdp=fsdp)
    one = run(kind, tokens=tokens, head=head)
    assert one.metrics[0].keys() == {"loss", "grad_norm", *pair(kind).weights}
    for ours, theirs in zip(many.metrics, one.metrics, strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-5, err_msg=name)
    assert_close(many.state.params, one.state.params)
    assert_close(many.state.opt_state, one.state.opt_state)  # the gradients' sum

    first, rest = set(jax.devices()[: devices[0]]), set(jax.devices()[devices[0] : sum(devices)])
    assert all(x.sharding.device_set == first for x in jax.tree.leaves(many.state))
    assert all(x.sharding.device_set == rest for x in jax.tree.leaves(many.teacher))
    jax.tree.map(np.testing.assert_array_equal, many.teacher, pair(kind).teacher_params)


def moved_by(monkeypatch: pytest.MonkeyPatch, made: SimpleNamespace, kind: str) -> list[list[tuple[int, ...]]]:
    """Shapes of the arrays that further updates put from mesh to mesh, by call."""
    calls: list[list[tuple[int, ...]]] = []
    put = jax.device_put

    def counting(tree: Any, where: Any = None, **rest: Any) -> Any:
        calls.append([x.shape for x in jax.tree.leaves(tree)])
        return put(tree, where, **rest)

    state = jax.tree.map(jnp.copy, made.state)
    batches = [sharding.put_batch(batch, made.mesh) for batch in pair(kind).batches]
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_put", counting)
        teacher = dict(made.teacher)  # as of another run: a tree that the step has not seen
        for batch in batches:
            state, _ = made.step(state, teacher, batch, jax.random.key(7))
    return calls


@pytest.mark.slow
def test_the_teachers_head_is_moved_once_and_logits_never(monkeypatch: pytest.MonkeyPatch) -> None:
    made = run("masked", devices=(4, 4))
    calls = moved_by(monkeypatch, made, "masked")
    wide = [shapes for shapes in calls if any(VOCAB in shape for shape in shapes)]
    assert wide == [[(VOCAB, 16), (VOCAB,)]]
    hidden, maps = (32, 8, 16), (32, 4, 8, 8)
    taught = [hidden, hidden, maps, hidden]  # the layers of the map, layer 2's attention, the features
    assert calls.count([(32, 8), (32, 8)]) == 3 and calls.count(taught) == 3  # ids and mask there; back
    assert len(calls) == 7


@pytest.mark.parametrize(
    ("weights", "tokens", "head", "wanted"),
    [
        ({"mlm": 1.0}, "all", "fused", []),
        ({"ce": 1.0}, "all", "fused", ["features"]),
        ({"mse": 1.0}, "all", "dense", ["logits"]),
        ({"ce": 1.0}, "masked", "fused", ["features"]),
        ({"ce": 1.0, "policy": 1.0}, "labels", "fused", ["logits"]),
        ({"cos": 1.0}, "all", "fused", ["hidden_states/2"]),
        ({"hidden_cos": 1.0}, "all", "fused", ["hidden_states/0", "hidden_states/1"]),
        ({"attention": 1.0, "mlm": 1.0}, "all", "fused", ["attentions/0"]),
    ],
)
def test_a_teacher_gives_what_is_looked_at(
    weights: dict[str, float], tokens: str, head: str, wanted: list[str]
) -> None:
    made = pair("masked")
    aim = Objective(weights, 2.0, tokens, layer_map=((0, 0), (1, 1)), head=head)
    batch = jax.tree.map(jnp.asarray, made.batches[0])

    def taught(params: Any) -> Any:
        distillation = Distillation(made.student, made.teacher, aim, GROUP, lambda length: LABELLED)
        return teacher_outputs(distillation, params, batch)

    given = jax.eval_shape(taught, made.teacher_params)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(given)]
    outputs = [path.removeprefix("outputs/") for path in paths if path.startswith("outputs/")]
    assert sorted(outputs) == wanted
    assert (given.head is not None) == ("features" in wanted)
    if tokens == "masked":
        assert given.outputs.features.shape == (16, LABELLED, 16)


@pytest.fixture(scope="module")
def apart(tiny: tiny_run.Tiny) -> Any:
    """(workdir of a run on 4 + 4 devices, where the arguments of its steps lay, what it said)."""
    workdir, seen = tiny.folder / "apart", []
    make = training.make_train_step

    def make_seen(*arguments: Any) -> Any:
        step = make(*arguments)

        def seeing(state: TrainState, teacher_params: Any, *rest: Any) -> Any:
            devices = [[x.sharding.device_set for x in jax.tree.leaves(tree)] for tree in (state, teacher_params)]
            seen.append(devices)
            return step(state, teacher_params, *rest)

        return seeing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_train_step", make_seen)
        code, _, err = tiny_run.call(train.main, tiny_run.arguments(tiny, workdir, **APART))
    assert code == 0, err
    return workdir, seen, err


COMMON = {"checkpoint__every": 2, "evaluate__every": 2}
APART = {**COMMON, "teacher__devices": 4, "student__devices": 4}


@pytest.mark.slow
def test_a_run_on_two_meshes_is_the_run_on_one(tiny: tiny_run.Tiny, apart: Any) -> None:
    workdir, seen, told = apart
    tiny_run.train(tiny, tiny.folder / "one", **COMMON)
    ours, theirs = (tiny_run.records(folder) for folder in (workdir, tiny.folder / "one"))
    assert [record["step"] for record in ours] == [record["step"] for record in theirs] and len(ours) > 4
    for a, b in zip(ours, theirs, strict=True):
        a, b = tiny_run.untimed(a), tiny_run.untimed(b)
        assert a.keys() == b.keys() and a.pop("kind") == b.pop("kind")
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-3, err_msg=name)
    devices = jax.devices()
    assert len(seen) == 4
    for state, teacher in seen:
        assert {frozenset(x) for x in state} == {frozenset(devices[:4])}
        assert {frozenset(x) for x in teacher} == {frozenset(devices[4:])}
    assert (
        'mesh {"student": {"data": 4, "fsdp": 1, "tensor": 1}, "teacher": {"data": 4, "fsdp": 1, "tensor": 1}}' in told
    )


@pytest.mark.slow
def test_a_run_on_two_meshes_is_resumed(
    tiny: tiny_run.Tiny, apart: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir, make = tmp_path / "run", training.make_train_step

    def make_stopping(*arguments: Any) -> Any:
        step, calls = make(*arguments), iter(range(3))

        def stopping(*inputs: Any) -> Any:
            if next(calls, None) is None:
                raise tiny_run.Stopped
            return step(*inputs)

        return stopping

    with monkeypatch.context() as patch, pytest.raises(tiny_run.Stopped):
        patch.setattr(training, "make_train_step", make_stopping)
        train.main(tiny_run.arguments(tiny, workdir, **APART))
    code, _, err = tiny_run.call(train.main, tiny_run.arguments(tiny, workdir, **APART))
    assert code == 0 and "at step 2 of 4" in err, err
    a, b = tiny_run.saved(workdir), tiny_run.saved(apart[0])
    assert [name for name in a if name != "notes" and a[name].tobytes() != b[name].tobytes()] == []
    ours, theirs = ([tiny_run.untimed(r) for r in tiny_run.records(folder)] for folder in (workdir, apart[0]))
    assert ours == theirs


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"student__devices": 5, "teacher__devices": 4}, ["config.student.devices=5", "devices=4", "8 devices here"]),
        (
            {"student__devices": 4, "teacher__devices": 3},
            ["config.train.batch_size=16", "3 devices of the teacher"],
        ),
        ({"student__devices": 3, "teacher__devices": 4}, ["config.train.batch_size=16", "3 devices = 6"]),
        ({"student__devices": 4}, ["config.student.devices=4 and config.teacher.devices=0 go together"]),
    ],
)
def test_devices_that_do_not_fit(tiny: tiny_run.Tiny, tmp_path: Any, values: dict[str, int], said: list[str]) -> None:
    code, _, err = tiny_run.call(train.main, tiny_run.arguments(tiny, tmp_path / "run", **values))
    assert code == 2 and err.splitlines()[-1].startswith("error: ") and not (tmp_path / "run").exists()
    assert all(part in err for part in said), err


@pytest.mark.slow
def test_plan_of_two_meshes(tiny: tiny_run.Tiny) -> None:
    """Each side has its own program and devices; together they do the work of one mesh of half as many devices."""
    figures = []
    for devices in ({"student__devices": 4, "teacher__devices": 4}, {}):
        arguments = ["plan", f"--config={tiny.recipe}", "--json", *tiny_run.overrides(**devices)]
        code, out, err = tiny_run.call(cli.main, arguments)
        assert code == 0, err
        figures.append(json.loads(out))
    apart, together = figures
    assert set(apart["programs"]) == {"teacher", "update"} and apart["mesh"]["teacher"]["data"] == 4
    assert apart["total_flops"] == pytest.approx(together["total_flops"], rel=0.01)
    assert apart["programs"]["teacher"]["flops"] < apart["programs"]["update"]["flops"]


def test_several_hosts_refuse_two_meshes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="for one process, and here are 2"):
        sharding.make_meshes(MeshConfig(), student=4, teacher=4)


def test_meshes_of_all_devices_are_one() -> None:
    mesh, teacher_mesh = sharding.make_meshes(MeshConfig(fsdp=2), student=0, teacher=0)
    assert mesh is teacher_mesh and mesh.size == 8


@pytest.mark.parametrize(("axis", "sizes"), [(0, (4, 4)), (1, (2, 4)), (0, (4, 2)), (1, (2, 3)), (0, (1, 6))])
def test_rows_go_from_mesh_to_mesh_without_the_host(
    monkeypatch: pytest.MonkeyPatch, axis: int, sizes: tuple[int, int]
) -> None:
    a, b = sharding.make_meshes(MeshConfig(), student=sizes[0], teacher=sizes[1])
    leaving, arriving = sharding.matching_rows(a, b, axis=axis)
    x = np.arange(24 * 24).reshape(24, 24)
    rows, plain = jax.device_put(x, leaving), jax.device_put(x, sharding.by_batch(a))

    def on_the_host(array: Any) -> Any:
        raise AssertionError("read on the host")

    with monkeypatch.context() as patch:
        patch.setattr(type(rows), "_value", property(on_the_host))
        moved = jax.device_put(rows, arriving)
        if 1 not in sizes and sizes[0] != sizes[1]:  # what it is for
            with pytest.raises(AssertionError, match="read on the host"):
                jax.device_put(plain, sharding.by_batch(b))
    assert moved.sharding.device_set == set(b.devices.flat)
    np.testing.assert_array_equal(moved, x)
