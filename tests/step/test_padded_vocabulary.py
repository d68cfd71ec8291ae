"""Embeddings padded to unlike sizes, with one tokenizer: all is over the words that both models have.

Each padded model is the tiny one with rows of large random numbers after its last word, so the models without these
rows say what is right.
"""

import functools
from pathlib import Path
from typing import Any

import grids
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import tiny_causal
import tiny_run

from jaxdistill import cli, train
from jaxdistill.evaluate import EVALUATORS
from jaxdistill.evaluate.context import Context
from jaxdistill.evaluate.settings import EvaluateConfig
from jaxdistill.losses.policy import PolicyConfig
from jaxdistill.losses.term import Objective
from jaxdistill.losses.terms import masks_of, token_counts
from jaxdistill.sampling.decoding import Decoding
from jaxdistill.sampling.generate import make_decoder
from jaxdistill.sampling.on_policy import make_scorer
from jaxdistill.step import sharding
from jaxdistill.step.forward import Distillation, loss_fn
from jaxdistill.step.settings import MeshConfig
from jaxdistill.step.sharding import Meshes
from jaxdistill.step.state import Placement, TrainState
from jaxdistill.step.train_step import UpdateSettings, make_train_step

WORDS, PADDED = 101, 108
ON_LOGITS = {"ce": 5.0, "mse": 0.1}
ON_SAMPLES = {"policy": 1.0, "repetition": 1.0, "diversity": 1.0, "entropy": 1.0}


def pad(tree: Any) -> Any:
    """Parameters with rows after the last word that would draw every softmax to themselves.

    They have either sign in turn, as a hidden state whose numbers add up to less than 0 gives a row of 9s no weight.
    """

    def padded(x: np.ndarray) -> np.ndarray:
        for axis, size in enumerate(x.shape):
            if size == WORDS:
                signs = np.where(np.arange(PADDED - WORDS) % 2, 9.0, -9.0).astype(x.dtype)
                more = np.moveaxis(np.broadcast_to(signs, (*np.delete(x.shape, axis), len(signs))), -1, axis)
                x = np.concatenate([x, more], axis)
        return x

    return jax.tree.map(padded, tree)


def cut(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x)[tuple(slice(WORDS if n == PADDED else n) for n in x.shape)], tree)


def after_words(x: np.ndarray) -> np.ndarray:
    return x[WORDS:] if len(x) == PADDED else x[:0]


def close(found: Any, wanted: Any) -> None:
    """To a share of the largest number, as a gradient may be 0 but for rounding."""
    share = 1e-5 * max(np.abs(x).max() for x in jax.tree.leaves(wanted))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=share), found, wanted)


def models_of(kind: str, padded: str) -> tuple[Any, Any, Any, Any]:
    """Student and teacher, and their parameters; `padded` names the one with more rows."""
    narrow = {**tiny.depth(kind, 1), "tie_word_embeddings": kind != "llama"}
    more = {"student": {}, "teacher": {}, padded: {"vocab_size": PADDED}}
    params = {"student": tiny.params(kind, **narrow), "teacher": tiny.params(kind)}
    if padded:
        params[padded] = pad(params[padded])
    models = tiny.model(kind, **narrow, **more["student"]), tiny.model(kind, **more["teacher"])
    return *models, params["student"], params["teacher"]


def batch_of(kind: str, rows: int = 4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ids, mask = tiny.batch(kind, rows, 8)
    chosen = mask & (rng.random(mask.shape) < 0.5)
    drawn = {name: rng.normal(size=mask.shape).astype(np.float32) for name in ("log_p", "old_log_q", "advantages")}
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": rng.integers(5, WORDS, ids.shape).astype(np.int32),
        "label_mask": chosen,
        "sampled_mask": mask & ~chosen,
        "weights": np.ones(mask.shape, np.float32),
        **drawn,
    }


def graded(kind: str, padded: str, objective: Objective) -> Any:
    """((loss, means), gradient of the student)."""
    student, teacher, params, teacher_params = models_of(kind, padded)
    return gradient(Distillation(student, teacher, objective, 2, lambda length: 16), params, teacher_params, kind=kind)


def gradient(distillation: Distillation, params: Any, teacher_params: Any, *, kind: str) -> Any:
    """((loss, means), gradient of the student) of the batch of a kind."""
    batch = jax.tree.map(jnp.asarray, batch_of(kind))

    @functools.partial(jax.jit, compiler_options=tiny.QUICK)
    def of(params: Any, teacher_params: Any) -> Any:
        counts = token_counts(masks_of(distillation.objective, batch))
        trained = lambda params: {"student": params, "projections": {}}  # noqa: E731
        loss = lambda params: loss_fn(trained(params), teacher_params, batch, counts, distillation)  # noqa: E731
        return jax.value_and_grad(loss, has_aux=True)(params)

    return jax.device_get(of(params, teacher_params))


FAST = ("gpt2", "fused", "all", "student")
SLOW = [
    ("gpt2", "dense", "labels", "teacher"),
    ("gpt2", "samples", "labels", "student"),
    ("bert", "fused", "masked", "student"),
]
WEEKLY = [
    ("gpt2", "fused", "all", "teacher"),
    ("gpt2", "dense", "labels", "student"),
    ("gpt2", "samples", "labels", "teacher"),
    ("llama", "fused", "all", "student"),
]


@pytest.mark.parametrize(
    ("kind", "head", "tokens", "padded"),
    [FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW), *grids.everyday(WEEKLY)],
)
def test_losses_and_gradients_are_over_the_common_words(kind: str, head: str, tokens: str, padded: str) -> None:
    """Tied or not; the rows after the common words get no gradient."""
    weights = {**ON_LOGITS, "mlm" if kind == "bert" else "clm": 2.0, **(ON_SAMPLES if head == "samples" else {})}
    objective = Objective(weights, 2.0, tokens, (), head=head if head == "fused" else "dense", policy=PolicyConfig())
    wanted, wanted_gradient = graded(kind, "", objective)
    found, gradient = graded(kind, padded, objective)
    assert all(np.isfinite(x) for x in jax.tree.leaves(wanted))
    close(found, wanted)
    close(cut(gradient), wanted_gradient)
    assert not any(after_words(x).any() for x in jax.tree.leaves(gradient))


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "padded"), grids.covering([(0, 0), (2, 2)], ["student", "teacher"]))
def test_an_update_on_a_mesh_is_that_of_the_common_words(padded: str, devices: tuple[int, int]) -> None:
    """In micro-batches, parameters split by fsdp, on one mesh and on two; rows after the common words stay."""

    def update(padded: str, meshes: Meshes, accumulation: int) -> Any:
        student, teacher, params, teacher_params = models_of("gpt2", padded)
        objective = Objective({**ON_LOGITS, "clm": 2.0}, 2.0, "all", ())
        optimizer = optax.sgd(0.01)
        init = lambda p: TrainState(jnp.int32(0), {"student": p, "projections": {}}, optimizer.init(p))  # noqa: E731
        of_state = sharding.by_rule(jax.eval_shape(init, params), meshes.student, smallest=1)
        of_teacher = sharding.by_rule(teacher_params, meshes.teacher, smallest=1)
        step = make_train_step(
            Distillation(student, teacher, objective, 2, lambda length: 16),
            optimizer,
            Placement(meshes, of_state, of_teacher),
            UpdateSettings(accumulation=accumulation, dropout=False),
        )
        names = ("input_ids", "attention_mask", "labels", "label_mask")
        batch = sharding.put_batch({name: batch_of("gpt2", 16)[name] for name in names}, meshes.student)
        state = jax.jit(init, out_shardings=of_state)(params)
        state, metrics = step(state, jax.device_put(teacher_params, of_teacher), batch, jax.random.key(0))
        return params, jax.device_get((state.params["student"], metrics))

    alone = sharding.make_mesh(data=1, fsdp=1, devices=jax.devices()[:1])
    _, wanted = update("", Meshes(alone, alone), 1)
    meshes = sharding.make_meshes(MeshConfig(data=-1, fsdp=2), student=devices[0], teacher=devices[1])
    before, found = update(padded, meshes, 2)
    close(cut(found), wanted)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(after_words(a), after_words(b)), found[0], before)


@pytest.mark.slow
def test_what_models_write_is_of_the_common_words() -> None:
    """Drawn from a mixture, or by one model for the other to read, and scored for the policy gradient."""
    decoding = Decoding(max_new_tokens=6, temperature=1.0)
    batch = batch_of("gpt2")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    inputs |= {"keys": jax.random.split(jax.random.key(0), 4), "live": np.ones(4, bool)}

    def written(padded: str) -> Any:
        *models, params, teacher_params = models_of("gpt2", padded)
        both = make_decoder(models, weights=(0.6, 0.4), decoding=decoding)
        alone = make_decoder(models[:1], weights=(1.0,), decoding=decoding, words=WORDS)
        score = make_scorer(*models, PolicyConfig(), accumulation=1, group=1)
        scored = score(params, teacher_params, jax.tree.map(jnp.asarray, batch))
        return both((params, teacher_params), **inputs), alone((params,), **inputs), scored

    wanted = jax.device_get(written(""))
    for padded in ("student", "teacher"):
        close(jax.device_get(written(padded)), wanted)


@pytest.mark.slow
def test_models_agree_on_the_common_words() -> None:
    def figures(padded: str) -> dict[str, float]:
        student, teacher, params, teacher_params = models_of("gpt2", padded)
        unread: dict[str, Any] = {"tokenizer": None, "text": None, "batch_size": 4, "mask_fraction": 1.0}
        mesh = sharding.make_mesh(data=1, fsdp=1, devices=jax.devices()[:1])
        context = Context(student, teacher, batches=[batch_of("gpt2")], mesh=mesh, **unread)
        return dict(EVALUATORS["agreement"].make(context, EvaluateConfig())(params, teacher_params))

    wanted = figures("")
    assert wanted["kl"] > 0.01
    for padded in ("student", "teacher"):
        assert figures(padded) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_a_run_says_so_and_exports_the_student_in_its_own_size(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    made = tiny_causal.make(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(made.teacher)
    words = len(tokenizer)
    teacher = tiny_causal.write_model(tmp_path / "padded", tokenizer, vocab_size=words + 7)
    student = tiny_causal.write_model(tmp_path / "less", tokenizer, vocab_size=words + 2, num_hidden_layers=1)
    run, folder = tmp_path / "run", tmp_path / "export"
    values = {"teacher__name": teacher, "student__name": student, "sample__student": 0.5, "train__steps": 2}
    code, _, err = tiny_run.call(train.main, tiny_run.arguments(made, run, **values))
    assert code == 0 and f"over the {words + 2:,} that both have" in err
    for command in (
        ["evaluate", "--metrics=perplexity,agreement,rouge"],
        ["export", "--to-pytorch", f"--out={folder}"],
    ):
        assert tiny_run.call(cli.main, [command[0], f"--workdir={run}", *command[1:]])[0] == 0
    assert AutoConfig.from_pretrained(folder).vocab_size == words + 2
    # Without a tokenizer beside it, nothing says that the student's words are the teacher's.
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        (student / name).unlink(missing_ok=True)
    code, _, said = tiny_run.call(train.main, tiny_run.arguments(made, tmp_path / "other", **values))
    assert code == 2 and "no tokenizer stands beside the student" in said and not (tmp_path / "other").exists()
