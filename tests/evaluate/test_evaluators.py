"""Held-out figures, made a few tokens at a time, against NumPy on all logits at once."""

import math

import grids
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import tiny

from jaxdistill.evaluate import EVALUATORS
from jaxdistill.evaluate import context as contexts
from jaxdistill.evaluate.settings import EvaluateConfig
from jaxdistill.models import intercept
from jaxdistill.models.inputs import Inputs
from jaxdistill.models.model import build_model, init_params
from jaxdistill.step import sharding

ROWS, LENGTH = 16, 8


def held_out(kind: str) -> dict[str, np.ndarray]:
    ids, mask = tiny.batch(kind, ROWS, LENGTH)
    rng = np.random.default_rng(2)
    labels = rng.integers(5, 101, ids.shape).astype(np.int32)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "label_mask": mask & (rng.random(ids.shape) < 0.4),
    }


def context(kind: str, devices: int) -> contexts.Context:
    mesh = sharding.make_mesh(data=devices, fsdp=1, devices=jax.devices()[:devices])
    model = tiny.model(kind)
    unread: dict = {"tokenizer": None, "text": None}  # neither perplexity nor agreement reads them
    batches = [held_out(kind)]
    return contexts.Context(model, model, batches=batches, mesh=mesh, batch_size=ROWS, mask_fraction=1.0, **unread)


def all_at_once(kind: str) -> dict[str, float]:
    """Of the figures of both evaluators, in float64."""
    batch = held_out(kind)
    inputs = Inputs(jnp.asarray(batch["input_ids"]), jnp.asarray(batch["attention_mask"]))
    student, teacher = (
        np.asarray(intercept.apply(tiny.model(kind), params, inputs).logits)[batch["label_mask"]]
        for params in (tiny.params(kind), other(kind))
    )
    q, p = (scipy.special.log_softmax(x.astype(np.float64), -1) for x in (student, teacher))
    labels = batch["labels"][batch["label_mask"]]
    nll = -q[np.arange(len(labels)), labels].mean()
    best, order = teacher.argmax(axis=-1), np.argsort(-student, axis=-1)
    task = "clm" if tiny.model(kind).family.causal else "mlm"
    return {
        f"{task}_loss": nll,
        "perplexity": math.exp(nll),
        f"{task}_accuracy": (student.argmax(axis=-1) == labels).mean(),
        "kl": (np.exp(p) * (p - q)).sum(axis=-1).mean(),
        "top1": (order[:, 0] == best).mean(),
        "top5": (order[:, :5] == best[:, None]).any(axis=-1).mean(),
    }


def other(kind: str) -> dict:
    """A teacher near the student, so that they agree on some words."""
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda x: (x + 0.1 * rng.normal(size=x.shape)).astype(np.float32), tiny.params(kind))


@pytest.mark.parametrize(
    ("kind", "tokens"), grids.covering(["bert", "gpt2"], [1, 24, 1000])
)  # tokens of the 16 x 8 at a time: a row's 1, 3 (8 is not 3 x k), all 8
@pytest.mark.slow
def test_figures_do_not_depend_on_the_pieces(kind: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = 8
    whole = sharding.make_mesh(data=devices, fsdp=1)
    monkeypatch.setattr(contexts, "chunk_size", lambda **_: max(tokens // devices, 1))
    student, teacher = jax.device_put((tiny.params(kind), other(kind)), sharding.replicated(whole))
    expected, found = all_at_once(kind), {}
    for name in ("perplexity", "agreement"):
        found |= EVALUATORS[name].make(context(kind, devices), EvaluateConfig())(student, teacher)
    assert 0 < expected["top1"] < expected["top5"] < 1
    assert found == pytest.approx(expected, rel=1e-5)


def test_memory_does_not_grow_with_the_vocabulary_times_the_tokens() -> None:
    """Four times the tokens of one piece: one [tokens, vocab] array of theirs would be more than all of it."""
    vocab, length, chunk = 50_000, 512, 512
    model = build_model(tiny.config("gpt2", vocab_size=vocab, n_positions=length))
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    one = context("gpt2", 1)._replace(student=model)
    shapes = {"input_ids": jnp.int32, "labels": jnp.int32, "attention_mask": jnp.bool_, "label_mask": jnp.bool_}
    batch = {name: jax.ShapeDtypeStruct((4, length), kind) for name, kind in shapes.items()}

    def sums(params: dict, batch: dict) -> dict:
        return contexts.token_sums(
            one,
            lambda labels, logits: {"best": logits.max(axis=-1)},
            contexts.measured_tokens(one, model, params, batch),
        )

    compiled = jax.jit(sums).lower(params, batch).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * chunk * vocab * 4 < 4 * length * vocab * 4
