"""The contract of the step: what must change neither loss, nor gradient, nor the updated parameters.

Tiny models, all terms on, widths that differ (so that projections take part). Everything that compiles is made once.
"""

import functools
from types import SimpleNamespace
from typing import Any

import grids
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_params

from jaxdistill.losses import divergences as losses
from jaxdistill.losses import terms as objectives
from jaxdistill.losses.objective import init_projections
from jaxdistill.losses.term import Objective
from jaxdistill.models import intercept
from jaxdistill.models.inputs import Inputs
from jaxdistill.models.model import build_model
from jaxdistill.step import optimizer as optim
from jaxdistill.step import sharding
from jaxdistill.step.forward import Distillation, StudentPass, loss_fn
from jaxdistill.step.sharding import Meshes
from jaxdistill.step.state import Placement, TrainState
from jaxdistill.step.train_step import UpdateSettings, make_train_step

VOCAB, GROUP, ROWS, WIDTH = 29, 2, 4, 8
WEIGHTS = {
    "ce": 5.0,
    "mlm": 2.0,
    "cos": 1.0,
    "mse": 0.1,
    "hidden_mse": 1.0,
    "hidden_cos": 1.0,
    "attention": 1.0,
}
TOKENS = ("all", "masked")


def objective(tokens: str) -> Objective:
    return Objective(WEIGHTS, temperature=2.0, tokens=tokens, layer_map=((0, 0), (1, 2)))


@functools.cache
def models(dtype: Any = jnp.float32) -> SimpleNamespace:
    """RoBERTa, whose positions depend on where the padding is, from 16 wide to 8; with dropout in its config."""
    from transformers import RobertaConfig

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "max_position_embeddings": 24,
        "type_vocab_size": 1,
        "intermediate_size": 16,
    }
    teacher = RobertaConfig(**sizes, hidden_size=16, num_attention_heads=4, num_hidden_layers=2)
    student = RobertaConfig(**sizes, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    rng = np.random.default_rng(0)
    made = SimpleNamespace(teacher=build_model(teacher, dtype=dtype), student=build_model(student, dtype=dtype))
    made.teacher_params = random_params(made.teacher, rng, 0.2)
    made.params = {
        "student": random_params(made.student, rng, 0.2),
        "projections": init_projections(
            objective("all"), student_width=8, teacher_width=16, num_layers=(1, 2), key=jax.random.key(0)
        ),
    }
    return made


def make_batch(rng: np.random.Generator, *, lengths: Any, width: int = WIDTH, labelled: float = 0.3) -> dict:
    attention_mask = np.arange(width) < np.asarray(lengths)[:, None]
    label_mask = attention_mask & (rng.random(attention_mask.shape) < labelled)
    ids = rng.integers(4, VOCAB, attention_mask.shape)
    return {
        "input_ids": np.where(attention_mask, ids, 1).astype(np.int32),  # 1 is RoBERTa's padding
        "attention_mask": attention_mask,
        "labels": np.where(label_mask, rng.integers(0, VOCAB, ids.shape), -100).astype(np.int32),
        "label_mask": label_mask,
    }


def loss_of(params: Any, teacher_params: Any, batch: Any, key: Any, *, tokens: str, made: Any = None) -> Any:
    made = made or models()
    aim = objective(tokens)
    counts = objectives.token_counts(objectives.masks_of(aim, batch))
    distillation = Distillation(made.student, made.teacher, aim, GROUP, lambda length: GROUP * length)
    return loss_fn(params, teacher_params, batch, counts, distillation, StudentPass(key))


@functools.cache
def gradient_of(tokens: str) -> Any:
    """Jitted (batch) -> ((loss, means), gradient); compiles once a shape."""
    made = models()
    f = functools.partial(loss_of, tokens=tokens)
    graded = jax.jit(jax.value_and_grad(f, has_aux=True))
    return lambda batch: graded(made.params, made.teacher_params, batch, None)


def assert_close(ours: Any, theirs: Any, *, tolerance: float = 1e-5) -> None:
    """Of the largest entry of any leaf: float32 sums of other shapes add up in another order."""
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(theirs))

    def compare(path: tuple, a: Any, b: Any) -> None:
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * largest, err_msg=optim.path_name(path))

    jax.tree_util.tree_map_with_path(compare, ours, theirs)


lengths = st.lists(st.integers(0, WIDTH), min_size=ROWS, max_size=ROWS)
seeds = st.integers(0, 2**31)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", ["all", "masked"])
@given(lengths=lengths, seed=seeds)
@settings(max_examples=10, deadline=None)
def test_padding_and_what_stands_in_it_change_nothing(tokens: str, lengths: list[int], seed: int) -> None:
    """Columns and empty rows are added, and hold anything: the teacher sees it too."""
    rng = np.random.default_rng(seed)
    batch = make_batch(rng, lengths=lengths)
    large = {}
    for name, x in batch.items():
        more = np.zeros((2 * ROWS, WIDTH + 4), x.dtype)
        more[:ROWS, :WIDTH] = x
        large[name] = more
    real = large["attention_mask"]
    large["input_ids"] = np.where(real, large["input_ids"], rng.integers(0, VOCAB, real.shape)).astype(np.int32)
    labels = rng.integers(-100, VOCAB, real.shape)
    large["labels"] = np.where(large["label_mask"], large["labels"], labels).astype(np.int32)
    (loss, means), gradient = gradient_of(tokens)(batch)
    (other, other_means), other_gradient = gradient_of(tokens)(large)
    np.testing.assert_allclose(other, loss, rtol=1e-5)
    assert_close(other_means, means)
    assert np.isfinite(loss) and loss >= 0
    assert_close(other_gradient, gradient)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("attended", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_nothing_labelled_or_nothing_at_all(tokens: str, attended: bool) -> None:
    batch = make_batch(np.random.default_rng(0), lengths=[8, 5, 3, 8] if attended else [0] * ROWS, labelled=0.0)
    (loss, means), gradient = gradient_of(tokens)(batch)
    zero = {name for name, mean in means.items() if float(mean) == 0}
    assert zero == (set(WEIGHTS) if not attended else {"mlm"} if tokens == "all" else {"mlm", "ce", "mse"})
    assert np.isfinite(loss) and all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    if not attended:
        assert all(not np.any(g) for g in jax.tree.leaves(gradient))


def test_masked_is_the_arithmetic_of_all_at_the_masked_positions() -> None:
    """The head sees gathered positions only; here it sees everything and the positions are chosen after."""
    made = models()
    batch = make_batch(np.random.default_rng(1), lengths=[8, 5, 3, 8])

    def by_hand(params: Any) -> tuple[Any, dict]:
        inputs = Inputs(jnp.asarray(batch["input_ids"]), jnp.asarray(batch["attention_mask"]))
        s = intercept.apply(made.student, params["student"], inputs).logits
        t = intercept.apply(made.teacher, made.teacher_params, inputs).logits
        mean = lambda x: jnp.where(batch["label_mask"], x, 0).sum() / batch["label_mask"].sum()  # noqa: E731
        means = {
            "ce": mean(losses.forward_kl(s, t, temperature=2.0)),
            "mlm": mean(losses.cross_entropy(s, jnp.maximum(batch["labels"], 0))),
            "mse": mean(losses.logit_mse(s, t)),
        }
        return sum(WEIGHTS[name] * x for name, x in means.items()), means

    (_, wanted), wanted_gradient = jax.jit(jax.value_and_grad(by_hand, has_aux=True))(made.params)
    (_, means), gradient = gradient_of("masked")(batch)
    (_, all_means), _ = gradient_of("all")(batch)
    assert_close({name: means[name] for name in wanted}, wanted)
    # The head's bias sees the terms of the head alone.
    bias = lambda g: g["student"]["lm_head"]["bias"]  # noqa: E731
    assert_close(bias(gradient), bias(wanted_gradient))
    # What is not the head's does not know the difference.
    for name in set(WEIGHTS) - wanted.keys():
        np.testing.assert_allclose(means[name], all_means[name], rtol=1e-5, err_msg=name)
    assert float(means["ce"]) != pytest.approx(float(all_means["ce"]), rel=1e-3)


def test_the_teacher_gets_no_gradient() -> None:
    made = models()
    batch = make_batch(np.random.default_rng(2), lengths=[8, 5, 3, 8])
    f = functools.partial(loss_of, tokens="all")
    gradient = jax.jit(jax.grad(f, argnums=1, has_aux=True))(made.params, made.teacher_params, batch, None)[0]
    assert all(not np.any(g) for g in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_bfloat16_compute_stays_near_float32() -> None:
    made = models(jnp.bfloat16)
    batch = make_batch(np.random.default_rng(3), lengths=[8, 5, 3, 8])
    f = functools.partial(loss_of, tokens="all", made=made)
    (loss, means), gradient = jax.jit(jax.value_and_grad(f, has_aux=True))(
        made.params, made.teacher_params, batch, None
    )
    assert loss.dtype == jnp.float32 and all(mean.dtype == jnp.float32 for mean in means.values())
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(gradient))
    (wanted, _), wanted_gradient = gradient_of("all")(batch)
    np.testing.assert_allclose(loss, wanted, rtol=0.02)
    assert float(loss) != float(wanted)  # it did compute in bfloat16
    flat = [np.concatenate([np.ravel(g) for g in jax.tree.leaves(tree)]) for tree in (gradient, wanted_gradient)]
    assert np.dot(*flat) / np.prod([np.linalg.norm(g) for g in flat]) > 0.999


BIG = 8 * 2 * GROUP  # rows: two groups a device on eight devices
MESHES = {"one": (1, 1), "data": (8, 1), "fsdp": (4, 2)}


LABELLED = 4  # tokens a group, and the capacity: rows of two groups in one would not fit


def big_batches() -> list[dict]:
    rng = np.random.default_rng(4)
    batches = []
    for _ in range(3):
        batch = make_batch(rng, lengths=rng.integers(2, WIDTH + 1, BIG))
        real = batch["attention_mask"].reshape(-1, GROUP * WIDTH)
        rank = np.where(real, rng.random(real.shape), 2).argsort().argsort()
        label_mask = (rank < LABELLED).reshape(BIG, WIDTH)
        labels = rng.integers(0, VOCAB, label_mask.shape)
        batch |= {"label_mask": label_mask, "labels": np.where(label_mask, labels, -100).astype(np.int32)}
        batches.append(batch)
    return batches


@functools.cache
def run(
    mesh: str,
    *,
    accumulation: int = 1,
    dropout: bool = False,
    freeze: tuple[str, ...] = (),
    layer_drop: float | None = None,
    remat: str = "",
) -> SimpleNamespace:
    """Three updates; the gradient that reached the optimizer in the last one is kept in its state."""
    made = models()
    data, fsdp = MESHES[mesh]
    devices = sharding.make_mesh(data=data, fsdp=fsdp, devices=jax.devices()[: data * fsdp])
    record = optax.GradientTransformation(
        lambda params: optax.tree.zeros_like(params), lambda updates, state, params=None: (updates, updates)
    )
    optimizer = optax.chain(
        record,
        optim.make_optimizer(
            made.params,
            optim.OptimConfig(
                learning_rate=1e-2,
                schedule="constant",
                warmup=0.0,
                eps=1e-3,  # at 1e-6, Adam blows the rounding of gradients that are 0 up to whole updates
                weight_decay=0.01,
                no_decay=("bias$", "scale$"),
                clip=1.0,
            ),
            steps=1,
            freeze=freeze,
        ),
    )

    def init(params: Any) -> TrainState:
        params = jax.tree.map(jnp.array, params)
        return TrainState(jnp.int32(0), params, optimizer.init(params))

    shardings = sharding.by_rule(jax.eval_shape(init, made.params), devices, smallest=1)
    teacher_shardings = sharding.by_rule(made.teacher_params, devices, smallest=1)
    settings = UpdateSettings(
        accumulation=accumulation,
        freeze=freeze,
        dropout=dropout,
        drop_rates=None if layer_drop is None else lambda step: jnp.full(made.student.num_layers, layer_drop),
        remat=remat,
    )
    step: Any = make_train_step(
        Distillation(made.student, made.teacher, objective("masked"), GROUP, lambda length: LABELLED),
        optimizer,
        Placement(Meshes(devices, devices), shardings, teacher_shardings),
        settings,
    )
    result = SimpleNamespace(step=step, shardings=shardings, optimizer=optimizer, metrics=[])
    result.begin = lambda: jax.jit(init, out_shardings=shardings)(made.params)
    result.teacher = jax.device_put(made.teacher_params, teacher_shardings)
    result.put = lambda batch: sharding.put_batch(batch, devices)
    state = result.begin()
    for batch in big_batches():
        result.before = state
        state, metrics = step(state, result.teacher, result.put(batch), jax.random.key(7))
        result.metrics.append(jax.device_get(metrics))
    result.state = state
    return result


def assert_same_run(a: SimpleNamespace, b: SimpleNamespace) -> None:
    for ours, theirs in zip(a.metrics, b.metrics, strict=True):
        for name in theirs:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-5, err_msg=name)
    assert_close(a.state.opt_state[0], b.state.opt_state[0])
    assert_close(a.state.params, b.state.params)
    assert int(a.state.step) == int(b.state.step) == 3


@pytest.mark.parametrize("accumulation", grids.everyday([2, 4], 2))
def test_accumulation_changes_nothing(accumulation: int) -> None:
    assert_same_run(run("one", accumulation=accumulation), run("one"))


@pytest.mark.parametrize("mesh", grids.everyday(["data", "fsdp"], "fsdp"))
def test_eight_devices_are_one(mesh: str) -> None:
    """On the fsdp mesh with two micro-batches, so that both cuts are made."""
    many = run(mesh, accumulation=2 if mesh == "fsdp" else 1)
    assert_same_run(many, run("one"))
    split = [x for x in jax.tree.leaves(many.state.params) if not x.sharding.is_fully_replicated]
    assert bool(split) == (mesh == "fsdp")


@pytest.mark.slow
@pytest.mark.parametrize("remat", grids.everyday(["dots", "full"], "dots"))  # test_remat has both
def test_rematerialised_layers_change_nothing(remat: str) -> None:
    """With micro-batches and LayerDrop, which are traced around it."""
    settings: dict[str, Any] = {"accumulation": 2, "dropout": True, "layer_drop": 0.3}
    assert_same_run(run("fsdp", remat=remat, **settings), run("one", **settings))


@pytest.mark.slow
def test_dropout_on_eight_devices_is_dropout_on_one() -> None:
    frozen = ("embeddings/",)
    assert_same_run(run("fsdp", dropout=True, freeze=frozen), run("one", dropout=True, freeze=frozen))


@pytest.mark.slow
def test_layers_are_drawn_once_for_all_devices_and_micro_batches() -> None:
    one, many = run("one", layer_drop=0.3), run("fsdp", accumulation=2, layer_drop=0.3)
    assert_same_run(many, one)
    assert {float(metrics["layers"]) for metrics in one.metrics} == {0.0, 1.0}  # both happen, in these three updates


@pytest.mark.slow
def test_layer_drop_at_rate_zero_is_the_plain_step() -> None:
    """Up to the rounding of a program that branches; a run at rate 0 has no branches and is the plain one itself."""
    assert_same_run(run("one", layer_drop=0.0), run("one"))


@pytest.mark.slow
def test_a_step_without_its_layer_trains_what_is_around_it() -> None:
    dropped = run("one", layer_drop=1.0)
    gradient = dropped.state.opt_state[0]["student"]["roberta"]
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient["encoder"]))
    assert np.any(gradient["embeddings"]["word_embeddings"]["embedding"])


@pytest.mark.slow
def test_dropout_is_a_function_of_key_and_step() -> None:
    made = run("one", dropout=True, freeze=("embeddings/",))
    batch = made.put(big_batches()[0])

    def loss(step: int, key: int) -> float:
        state = made.begin()._replace(step=jax.device_put(jnp.int32(step), made.shardings.step))
        return float(made.step(state, made.teacher, batch, jax.random.key(key))[1]["loss"])

    assert loss(0, 7) == loss(0, 7)
    assert len({loss(0, 7), loss(1, 7), loss(0, 8)}) == 3
    assert loss(0, 7) != float(run("one").metrics[0]["loss"])  # there is dropout at all


def test_the_teacher_is_bitwise_unchanged() -> None:
    jax.tree.map(np.testing.assert_array_equal, run("one").teacher, models().teacher_params)


def test_the_state_is_donated_and_the_rest_is_not() -> None:
    made = run("one")
    donated = (
        made.before.step,
        made.before.params,
        made.before.opt_state[1],
    )  # [0] is this file's own recorder
    assert all(x.is_deleted() for x in jax.tree.leaves(donated))
    assert not any(x.is_deleted() for x in jax.tree.leaves(made.teacher))


def test_one_compilation_a_run() -> None:
    assert run("one").step._cache_size() == 1
    assert run("fsdp", accumulation=2).step._cache_size() == 1


def test_every_parameter_and_projection_learns() -> None:
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), run("one").state.params, models().params)
    for path, distance in jax.tree_util.tree_leaves_with_path(moved):
        name = optim.path_name(path)
        if not name.endswith("key/bias"):  # softmax does not see it: its gradient is 0
            assert distance > 1e-4, name


def test_frozen_parameters_stay_bitwise_and_have_no_optimizer_state() -> None:
    made = run("one", dropout=True, freeze=("embeddings/",))
    frozen = 0
    for path, x in jax.tree_util.tree_leaves_with_path(made.state.params):
        before = functools.reduce(lambda tree, key: tree[key.key], path, models().params)
        name = optim.path_name(path)
        if not name.endswith("key/bias"):  # whose gradient is 0, as softmax does not see it, but for rounding
            assert np.array_equal(x, before) == ("embeddings/" in name), name
        frozen += "embeddings/" in name
    assert frozen == 5  # words, positions, types, layer norm
    # The moments, without the gradient that this file's own recorder keeps.
    paths = [optim.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(made.state.opt_state[1])]
    assert paths and not any("embeddings/" in path for path in paths)


def test_frozen_parameters_have_no_part_in_the_gradient_norm() -> None:
    made = run("one", dropout=True, freeze=("embeddings/",))
    reached = made.state.opt_state[0]
    for path, gradient in jax.tree_util.tree_leaves_with_path(reached):
        if "embeddings/" in optim.path_name(path):
            assert not np.any(gradient)
    np.testing.assert_allclose(made.metrics[-1]["grad_norm"], optax.tree.norm(reached), rtol=1e-6)


@pytest.mark.slow
def test_attention_maps_are_compared_without_their_dropout() -> None:
    """A teacher that is its own student: its maps differ from the teacher's by their dropout alone."""
    from transformers import BertConfig

    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.5}
    model = build_model(BertConfig(**sizes, intermediate_size=16, max_position_embeddings=24, **drop))
    params = random_params(model, np.random.default_rng(1), 0.2)
    mesh = sharding.make_mesh(data=1, fsdp=1, devices=jax.devices()[:1])
    state = TrainState(jnp.int32(0), {"student": jax.tree.map(jnp.array, params), "projections": {}}, ())
    aim = Objective({"attention": 1.0}, 1.0, "all", ((1, 1), (2, 2)))
    step = make_train_step(
        Distillation(model, model, aim, GROUP, lambda length: LABELLED),
        optax.identity(),
        Placement(Meshes(mesh, mesh), sharding.by_rule(state, mesh), sharding.by_rule(params, mesh)),
    )
    batch = sharding.put_batch(big_batches()[0], mesh)
    _, metrics = step(state, params, batch, jax.random.key(0))
    assert abs(float(metrics["attention"])) < 1e-6
    assert model.config.attention_probs_dropout_prob == 0.5


def test_the_loss_falls() -> None:
    made = run("one")
    state, batch = made.begin(), made.put(big_batches()[0])
    seen = []
    for _ in range(20):
        state, metrics = made.step(state, made.teacher, batch, jax.random.key(0))
        seen.append(float(metrics["loss"]))
    assert seen[-1] < 0.8 * seen[0]
