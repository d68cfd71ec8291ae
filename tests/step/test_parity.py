"""Loss, gradient and ten updates against the PyTorch oracle of the reference's step, on tiny random pairs."""

import functools
from types import SimpleNamespace
from typing import Any

import grids
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import torch
from tiny import random_params

from jaxdistill.losses import terms as objectives
from jaxdistill.losses.objective import init_projections
from jaxdistill.losses.term import Objective
from jaxdistill.models import torch_names
from jaxdistill.models.model import build_model
from jaxdistill.step import optimizer as optim
from jaxdistill.step import sharding
from jaxdistill.step.forward import Distillation, loss_fn
from jaxdistill.step.sharding import Meshes
from jaxdistill.step.state import Placement, TrainState
from jaxdistill.step.train_step import UpdateSettings, make_train_step

VOCAB, ROWS, GROUP, STEPS = 97, 8, 2, 10
WEIGHTS = {
    "ce": 5.0,
    "mlm": 2.0,
    "cos": 1.0,
    "mse": 0.05,
    "hidden_mse": 1.0,
    "hidden_cos": 1.0,
    "attention": 1.0,
}
LAYER_MAP = ((0, 0), (1, 1), (2, 3))
PAIRS = ("bert to distilbert", "bert to bert", "roberta to roberta", "bert to narrower bert")
OPTIM = optim.OptimConfig(learning_rate=5e-3, warmup=0.25, weight_decay=0.01)  # betas, eps and clip of the defaults


def model_configs(pair: str) -> tuple[Any, Any]:
    from transformers import BertConfig, DistilBertConfig, RobertaConfig

    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    bert: dict[str, Any] = {**sizes, **off, "max_position_embeddings": 40}
    match pair:
        case "bert to distilbert":
            small: dict[str, Any] = {
                "vocab_size": VOCAB,
                "dim": 32,
                "n_heads": 4,
                "hidden_dim": 48,
                "max_position_embeddings": 40,
            }
            student = DistilBertConfig(**small, n_layers=2, dropout=0.0, attention_dropout=0.0)
        case "bert to bert":
            student = BertConfig(**bert, num_hidden_layers=2)
        case "bert to narrower bert":
            narrow: dict[str, Any] = bert | {"hidden_size": 16, "num_attention_heads": 2}
            student = BertConfig(**narrow, num_hidden_layers=2)
        case "roberta to roberta":
            roberta: dict[str, Any] = bert | {"pad_token_id": 1, "type_vocab_size": 1}
            return RobertaConfig(**roberta, num_hidden_layers=3), RobertaConfig(**roberta, num_hidden_layers=2)
    return BertConfig(**bert, num_hidden_layers=3), student


def make_batch(rng: np.random.Generator, *, pad: int, lengths: list[int], labelled: int | None = None) -> dict:
    """Right-padded rows; `labelled` tokens a row have a label, or about a quarter of them all."""
    width = max(lengths)
    attention_mask = np.arange(width) < np.asarray(lengths)[:, None]
    score = np.where(attention_mask, rng.random(attention_mask.shape), np.inf)
    label_mask = score < 0.25 if labelled is None else score.argsort().argsort() < labelled
    ids = rng.integers(5, VOCAB, attention_mask.shape)
    return {
        "input_ids": np.where(attention_mask, ids, pad).astype(np.int32),
        "attention_mask": attention_mask,
        "labels": np.where(label_mask, rng.integers(5, VOCAB, ids.shape), oracle.IGNORED).astype(np.int32),
        "label_mask": label_mask,
    }


@functools.cache
def make_pair(name: str) -> SimpleNamespace:
    rng = np.random.default_rng(PAIRS.index(name))
    teacher, student = (build_model(config) for config in model_configs(name))
    projections = init_projections(
        objective("all"),
        student_width=student.width,
        teacher_width=teacher.width,
        num_layers=(student.num_layers, teacher.num_layers),
        key=jax.random.key(2),
    )
    assert bool(projections) == (student.width != teacher.width)
    pad = teacher.config.pad_token_id
    return SimpleNamespace(
        teacher=teacher,
        student=student,
        teacher_params=random_params(teacher, rng, 0.15),
        params={"student": random_params(student, rng, 0.15), "projections": projections},
        batches=[make_batch(rng, pad=pad, lengths=[12, *rng.integers(3, 12, ROWS - 1)]) for _ in range(STEPS)],
        # The reference means over every micro-batch alone, which is exact only where they are alike.
        even_batches=[make_batch(rng, pad=pad, lengths=[12, 7] * 4, labelled=2) for _ in range(STEPS)],
    )


def objective(tokens: str) -> Objective:
    return Objective(WEIGHTS, temperature=2.0, tokens=tokens, layer_map=LAYER_MAP)


def in_torch(
    pair: SimpleNamespace,
) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    """(student, teacher, projections, every student parameter by name) on the oracle's side."""
    student, teacher = (
        oracle.load_model(
            model.config,
            {name: torch.tensor(x) for name, x in torch_names.to_torch(params).items()},
            train=train,
        )
        for model, params, train in (
            (pair.student, pair.params["student"], True),
            (pair.teacher, pair.teacher_params, False),
        )
    )
    projections = {
        name: torch.nn.Parameter(torch.tensor(np.asarray(x["kernel"])).double())
        for name, x in pair.params["projections"].items()
    }
    return student, teacher, projections, dict(student.named_parameters()) | projections


def ours_by_torch_name(pair: SimpleNamespace, tree: Any) -> dict[str, np.ndarray]:
    student = torch_names.to_torch(tree["student"])
    return student | {name: np.asarray(x["kernel"]) for name, x in tree["projections"].items()}


def oracle_terms(models: tuple, batch: dict, *, tokens: str) -> dict[str, torch.Tensor]:
    student, teacher, projections, _ = models
    batch = {name: torch.tensor(x) for name, x in batch.items()}
    batch["labels"] = batch["labels"].long()
    with torch.no_grad():
        taught = oracle.forward(teacher, batch)
    return oracle.terms(
        oracle.forward(student, batch),
        taught,
        batch,
        temperature=2.0,
        restrict_ce_to_mask=tokens == "masked",
        layer_map=LAYER_MAP,
        projections=projections,
    )


def assert_same_parameters(ours: dict[str, np.ndarray], theirs: dict[str, Any], *, relative: bool) -> None:
    """To 1e-4 of each tensor's largest entry, or 1e-4 absolute."""
    assert ours.keys() == theirs.keys()
    largest = max(np.abs(want).max() for want in theirs.values())
    for name, want in theirs.items():
        # The gradient of a key's bias is 0, as softmax does not see it: rounding of larger terms is all it holds.
        scale = max(np.abs(want).max(), largest / 100) if relative else 1.0
        np.testing.assert_allclose(ours[name], want, rtol=0, atol=1e-4 * scale, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tokens"), grids.covering(PAIRS, ["all", "masked"]))
def test_losses_and_gradients_by_term(name: str, tokens: str) -> None:
    pair = make_pair(name)
    batch = jax.tree.map(jnp.asarray, pair.batches[0])
    aim = objective(tokens)
    counts = objectives.token_counts(objectives.masks_of(aim, batch))

    @jax.jit
    def value_and_gradient(params: Any, weights: dict[str, float]) -> tuple[tuple[jax.Array, Any], Any]:
        # The loss is linear in its weights, and its gradient is the only one that the fused head has.
        weighted = aim._replace(weights=weights)
        distillation = Distillation(pair.student, pair.teacher, weighted, GROUP, lambda length: GROUP * length)
        return jax.value_and_grad(loss_fn, has_aux=True)(params, pair.teacher_params, batch, counts, distillation)

    loss, values = value_and_gradient(pair.params, WEIGHTS)[0]
    models = in_torch(pair)
    theirs = oracle_terms(models, pair.batches[0], tokens=tokens)
    np.testing.assert_allclose(loss, oracle.total(theirs, WEIGHTS).item(), rtol=1e-5)
    for term in WEIGHTS:
        np.testing.assert_allclose(values[term], theirs[term].item(), rtol=1e-5, err_msg=term)
        wanted = torch.autograd.grad(
            theirs[term],
            list(models[3].values()),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        assert_same_parameters(
            ours_by_torch_name(
                pair, value_and_gradient(pair.params, {name: float(name == term) for name in WEIGHTS})[1]
            ),
            {key: x.numpy() for key, x in zip(models[3], wanted, strict=True)},
            relative=True,
        )


# Every compilation takes seconds, so the fast part has one case, and every pair is in the everyday suite once.
UPDATES = [
    ("roberta to roberta", "masked", 1),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("bert to distilbert", "all", 1),
            ("bert to narrower bert", "all", 2),
            ("bert to bert", "masked", 2),
        )
    ),
    *(
        pytest.param(*case, marks=pytest.mark.weekly)
        for case in (
            ("bert to distilbert", "masked", 1),
            ("roberta to roberta", "all", 1),
            ("bert to bert", "all", 1),
            ("bert to narrower bert", "masked", 1),
        )
    ),
]


@pytest.mark.parametrize(("name", "tokens", "accumulation"), UPDATES)
def test_ten_updates(name: str, tokens: str, accumulation: int) -> None:
    pair = make_pair(name)
    batches = pair.batches if accumulation == 1 else pair.even_batches
    # What reaches the optimizer is kept beside its state, so that one compilation shows gradient and update.
    record = optax.GradientTransformation(
        lambda params: optax.tree.zeros_like(params), lambda updates, state, params=None: (updates, updates)
    )
    adamw = optim.make_optimizer(pair.params, OPTIM, steps=STEPS, freeze=())
    optimizer = optax.chain(record, adamw)
    mesh = sharding.make_mesh(data=1, fsdp=1, devices=jax.devices()[:1])
    init = lambda params: TrainState(jnp.int32(0), params, optimizer.init(params))  # noqa: E731
    shardings = sharding.by_rule(jax.eval_shape(init, pair.params), mesh)
    state = jax.jit(init, out_shardings=shardings)(pair.params)
    step = make_train_step(
        Distillation(pair.student, pair.teacher, objective(tokens), GROUP, lambda length: GROUP * length),
        optimizer,
        Placement(Meshes(mesh, mesh), shardings, sharding.by_rule(pair.teacher_params, mesh)),
        UpdateSettings(accumulation=accumulation, dropout=False),
    )
    models = in_torch(pair)
    torch_optimizer = oracle.adamw(models[3], weight_decay=OPTIM.weight_decay)
    clipped = 0
    for i, batch in enumerate(batches):
        state, metrics = step(state, pair.teacher_params, batch, jax.random.key(0))
        # Groups of rows stay whole: of two micro-batches the first has groups 0 and 2.
        micro = [
            {
                key: x.reshape(-1, accumulation, GROUP, x.shape[1])[:, j].reshape(-1, x.shape[1])
                for key, x in batch.items()
            }
            for j in range(accumulation)
        ]
        theirs = [oracle_terms(models, m, tokens=tokens) for m in micro]
        norm = oracle.update(
            torch_optimizer,
            [oracle.total(values, WEIGHTS) for values in theirs],
            learning_rate=oracle.learning_rate(i, peak=5e-3, steps=STEPS, warmup=0.25),
            clip=OPTIM.clip,
        )
        clipped += norm > OPTIM.clip
        # Before the first update (whose learning rate is 0) only the step itself is compared.
        tolerance = 1e-5 if i == 0 else 1e-4
        for term in WEIGHTS:
            mean = np.mean([values[term].item() for values in theirs])
            np.testing.assert_allclose(metrics[term], mean, rtol=tolerance, err_msg=f"{term} at step {i}")
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
        if i == 0:
            factor = min(1.0, OPTIM.clip / norm)  # clipped in place on their side
            wanted = {key: x.grad.numpy() / factor for key, x in models[3].items() if x.grad is not None}
            assert_same_parameters(ours_by_torch_name(pair, state.opt_state[0]), wanted, relative=True)
    assert clipped  # or the comparison says nothing of clipping
    before = ours_by_torch_name(pair, pair.params)
    after = {key: x.detach().numpy() for key, x in models[3].items()}
    assert max(np.abs(after[key] - before[key]).max() for key in before) > 1e-2
    assert_same_parameters(ours_by_torch_name(pair, state.params), after, relative=False)
