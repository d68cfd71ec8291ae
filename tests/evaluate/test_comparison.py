"""What a report compares models by, against NumPy on all logits at once."""

import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import test_evaluators
import tiny

from jaxdistill.evaluate import comparison
from jaxdistill.models import intercept
from jaxdistill.models.inputs import Inputs


@pytest.fixture(scope="module", params=["bert", "gpt2"])
def kind(request: Any) -> str:
    return request.param


def context(kind: str) -> Any:
    vocabulary = SimpleNamespace(special=(0, 1))
    counts = np.random.default_rng(3).integers(0, 1000, 101) ** 2
    text: Any = SimpleNamespace(token_counts=counts, vocabulary=vocabulary)
    return test_evaluators.context(kind, 2)._replace(text=text)


def logits_of(kind: str, params: Any) -> np.ndarray:
    batch = test_evaluators.held_out(kind)
    inputs = Inputs(jnp.asarray(batch["input_ids"]), jnp.asarray(batch["attention_mask"]))
    outputs = intercept.apply(tiny.model(kind), params, inputs)
    return np.asarray(outputs.logits, np.float64)[batch["label_mask"]]


@pytest.mark.slow
def test_figures_are_those_of_all_logits_at_once(kind: str) -> None:
    here, batch = context(kind), test_evaluators.held_out(kind)
    labels = batch["labels"][batch["label_mask"]]
    student, teacher = logits_of(kind, tiny.params(kind)), logits_of(kind, test_evaluators.other(kind))
    found = comparison.make_comparison(here)(tiny.params(kind), test_evaluators.other(kind))

    q, p = (scipy.special.log_softmax(x, -1) for x in (student, teacher))
    nll = -q[np.arange(len(labels)), labels]
    right, sure = student.argmax(-1) == labels, np.exp(q).max(-1)
    wanted = {
        "perplexity": math.exp(nll.mean()),
        "accuracy": right.mean(),
        "kl": (np.exp(p) * (p - q)).sum(-1).mean(),
    }
    order = np.argsort(-student, axis=-1)
    for k in comparison.RANKS:
        wanted[f"top{k}"] = (order[:, :k] == teacher.argmax(-1)[:, None]).any(-1).mean()
    bands = comparison.band_of_words(here.text.token_counts, special=(0, 1))[labels]
    for i, name in enumerate(comparison.BANDS):
        if (bands == i).any():
            wanted[name] = math.exp(nll[bands == i].mean())
    places = np.minimum((sure * comparison.BINS).astype(int), comparison.BINS - 1)
    inside = [places == i for i in range(comparison.BINS) if (places == i).any()]
    wanted["ece"] = sum(abs(sure[one].mean() - right[one].mean()) * one.mean() for one in inside)
    assert found.figures == pytest.approx(wanted, rel=1e-4)
    assert found.calibration == [
        pytest.approx((sure[one].mean(), right[one].mean(), one.mean()), rel=1e-4, abs=1e-7) for one in inside
    ]


def test_words_are_in_bands_by_the_tokens_that_they_make() -> None:
    """In the order of their counts: 60 tokens, then 30, then 6 and 4; special tokens are none of the text."""
    counts = np.array([500, 4, 30, 60, 6, 0])
    assert comparison.band_of_words(counts, special=(0,)).tolist() == [2, 2, 1, 0, 2, 2]
    assert counts[0] == 500  # the text's own counts stay as they are


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    a, b = (comparison._gram(np.asarray(x, np.float32)) for x in (one, other))
    return comparison._hsic(a, b) / math.sqrt(comparison._hsic(a, a) * comparison._hsic(b, b))


def test_similarity_sees_neither_rotation_nor_scale_nor_width() -> None:
    rng = np.random.default_rng(0)
    states = rng.normal(size=(200, 16))
    turn = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    assert similarity(states, 3 * states @ turn + 5) == pytest.approx(1, abs=1e-4)
    # The plain estimator says 0.7 of independent states that are wider than there are tokens.
    assert similarity(rng.normal(size=(100, 300)), rng.normal(size=(100, 300))) == pytest.approx(0, abs=0.1)
    half = np.concatenate([states[:, :8], rng.normal(size=(200, 8))], axis=1)
    assert 0.3 < similarity(states, half) < 0.7


def test_tokens_are_spread_over_the_real_ones_of_a_row() -> None:
    mask = jnp.arange(10)[None, :] < jnp.array([[10], [5], [2]])
    positions, valid = comparison._spread(mask, 4)
    taken = [list(map(int, row[keep])) for row, keep in zip(positions, np.asarray(valid), strict=True)]
    assert taken == [[0, 2, 5, 7], [0, 1, 2, 3], [0, 1]]


@pytest.mark.slow
def test_a_model_is_like_itself_layer_by_layer(kind: str) -> None:
    here = context(kind)
    found = comparison.layer_similarity(here, tiny.params(kind), tiny.params(kind))
    states = tiny.model(kind).num_layers + 1
    assert found.shape == (states, states)
    np.testing.assert_allclose(np.diag(found), 1, atol=1e-4)
    np.testing.assert_allclose(found, found.T, atol=1e-4)


@pytest.mark.slow
def test_memory_is_at_least_the_weights() -> None:
    params = tiny.params("bert")
    speed = comparison.measure_speed(tiny.model("bert"), params, rows=1, length=8, repetitions=2)
    assert speed.seconds > 0 and speed.memory > sum(x.nbytes for x in jax.tree.leaves(params))
