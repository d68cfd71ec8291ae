"""What models write in training: drawn from the mixture that was asked for, and marked as the losses read it."""

import grids
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill.errors import UserError
from jaxdistill.models.families import FAMILIES
from jaxdistill.models.inputs import Inputs
from jaxdistill.models.intercept import apply
from jaxdistill.sampling.decoding import Decoding
from jaxdistill.sampling.generate import make_generator
from jaxdistill.sampling.rollout import make_sampler, prompts_of
from jaxdistill.step import sharding

CAUSAL = [kind for kind, family in FAMILIES.items() if family.causal]
PROMPTS = [[17, 40, 8, 99, 23, 64], [50], [71, 5, 33], [12, 12, 90, 61]]
LENGTH, NEW, PAD = 6, 8, 1
STUDENT, TEACHER = tiny.model("gpt2"), tiny.model("mistral")


def params_of(kind, **overrides):
    """tiny's with larger matrices: a model that does not say one word for ever, nor any two with like chances."""
    return jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, tiny.params(kind, **overrides))


def prompts_for(prompts, length=LENGTH):
    """Prompts by `prompts_of`, one row each; an empty one is an empty slot."""
    width = max(map(len, prompts)) + 2
    mask = np.arange(width) < np.array([[len(row)] for row in prompts])
    ids = np.array([row + [PAD] * (width - len(row)) for row in prompts], np.int32)
    batch = {"input_ids": ids, "attention_mask": mask, "label_mask": np.zeros_like(mask)}
    return prompts_of(batch, length=length, prompt_tokens=0, eos=PAD)


def sample(prompts, mixture, *, length=LENGTH, seed=0, student="gpt2", teacher="mistral", new=NEW, **fields):
    decoding = Decoding(max_new_tokens=new, pad_id=PAD, **fields)
    models = {"student": tiny.model(student), "teacher": tiny.model(teacher)}
    sampler = make_sampler(**models, decoding=decoding, mixture=mixture, length=length)
    return sampler(params_of(student), params_of(teacher), prompts_for(prompts, length), jax.random.key(seed))


def new_tokens(batch):
    """The sampled tokens of each row, by its labels and mask."""
    return [np.asarray(row)[mask].tolist() for row, mask in zip(batch["labels"], batch["sampled_mask"], strict=True)]


def logits_of(kind, batch, **overrides):
    model, params = tiny.model(kind, **overrides), params_of(kind, **overrides)
    inputs = Inputs(jnp.asarray(batch["input_ids"]), jnp.asarray(batch["attention_mask"]))
    return np.asarray(apply(model, params, inputs).logits, np.float64)


@st.composite
def texts(draw):
    """A batch padded on the right, its rows' prompt lengths (0: nothing is predicted)."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    lengths = np.array(draw(st.lists(st.integers(0, width), min_size=rows, max_size=rows)))
    tokens = st.sampled_from([PAD, *range(5, 40)])  # eos pads too
    ids = draw(st.lists(tokens, min_size=rows * width, max_size=rows * width))
    mask = np.arange(width) < lengths[:, None]
    predicted = np.array(draw(st.lists(st.booleans(), min_size=rows * width, max_size=rows * width)))
    return {
        "input_ids": np.where(mask, np.reshape(ids, mask.shape), PAD).astype(np.int32),
        "attention_mask": mask,
        "label_mask": predicted.reshape(mask.shape) & mask,
    }


@given(texts(), st.integers(1, 11), st.integers(0, 10))
@settings(max_examples=200, deadline=None)
def test_prompts_are_as_defined(batch, length, prompt_tokens):
    got = prompts_of(batch, length=length, prompt_tokens=prompt_tokens, eos=PAD)
    assert {name: (x.dtype, x.shape[1:]) for name, x in got.items()} == {
        "input_ids": (np.int32, (length,)),
        "attention_mask": (bool, (length,)),
        "live": (bool, ()),
    }
    for row in range(len(batch["input_ids"])):
        prompt = batch["input_ids"][row][batch["attention_mask"][row]].tolist()
        if prompt[-1:] == [PAD]:
            prompt.pop()
        if prompt_tokens:
            prompt = prompt[:prompt_tokens]
        elif batch["label_mask"][row].any():
            prompt = prompt[: batch["label_mask"][row].tolist().index(True) + 1]
        prompt = prompt[-length:]
        assert got["input_ids"][row].tolist() == [PAD] * (length - len(prompt)) + prompt
        assert got["attention_mask"][row].tolist() == [False] * (length - len(prompt)) + [True] * len(prompt)
        assert got["live"][row] == (len(prompt) > 0)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, marks=pytest.mark.slow, id="likeliest"),
        pytest.param({"temperature": 1.2, "top_k": 30}, id="drawn"),
    ],
)
@pytest.mark.slow
def test_one_writer_alone_is_that_model_with_the_same_keys(fields):
    """And the other does not run: there are no parameters to run it with."""
    decoding = Decoding(max_new_tokens=NEW, end_ids=(9, 12), pad_id=PAD, **fields)
    learnt, taught = params_of("gpt2"), params_of("mistral")
    alone = {
        kind: make_generator(model, decoding=decoding, batch_size=4)(params, PROMPTS, jax.random.key(7))
        for kind, model, params in (("gpt2", STUDENT, learnt), ("mistral", TEACHER, taught))
    }
    for kind, teacher, mixture, *params in (
        ("gpt2", TEACHER, 0.0, learnt, None),
        ("gpt2", None, 0.0, learnt, None),
        ("mistral", TEACHER, 1.0, None, taught),
    ):
        run = make_sampler(student=STUDENT, teacher=teacher, decoding=decoding, mixture=mixture, length=LENGTH)
        written = new_tokens(run(*params, prompts_for(PROMPTS), jax.random.key(7)))
        assert written == [list(x.tokens) for x in alone[kind]]


@pytest.mark.slow
def test_draws_are_from_the_mixture_of_probabilities():
    """Two tokens of eleven, the second given the first, against full forward passes of both models."""
    rows, prompt, words, at, mixture = 16_384, [4, 9, 6], {"vocab_size": 11}, 1.3, 0.3
    models = {role: tiny.model(kind, **words) for role, kind in (("student", "gpt2"), ("teacher", "mistral"))}
    decoding = Decoding(max_new_tokens=2, temperature=at)
    run = make_sampler(**models, decoding=decoding, mixture=mixture, length=4)
    params = (params_of("gpt2", **words), params_of("mistral", **words))
    batch = run(*params, prompts_for([prompt] * rows, 4), jax.random.key(3))
    first, second = np.asarray(batch["input_ids"])[:, 4:].T

    def expected(ids):
        full = {"input_ids": np.array(ids), "attention_mask": np.ones_like(ids, bool)}
        p, q = (scipy.special.softmax(logits_of(kind, full, **words)[:, -1] / at, -1) for kind in ("mistral", "gpt2"))
        assert np.abs(p - q).max(axis=1).min() > 0.05  # the test can tell
        return mixture * p + (1 - mixture) * q

    def check(tokens, probabilities):
        n = len(tokens)
        error = np.sqrt(n * probabilities * (1 - probabilities))
        often = n * probabilities >= 5
        assert often.sum() > 2
        counts = np.bincount(tokens, minlength=11)
        assert (np.abs(counts - n * probabilities) <= 5 * error)[often].all()
        rare = n * probabilities[~often].sum()
        assert abs(counts[~often].sum() - rare) <= 5 * np.sqrt(rare) + 1

    check(first, expected([prompt])[0])
    checked = 0
    for token, given_first in enumerate(expected([[*prompt, token] for token in range(11)])):
        if (first == token).sum() >= 500:
            check(second[first == token], given_first)
            checked += 1
    assert checked > 2


@pytest.mark.parametrize(
    ("student", "mixture"),
    tiny.families([("gpt2", 1.0), *grids.covering(CAUSAL, (0.4, 0.0))], fast=(), weekly=True),
)
@pytest.mark.slow
def test_a_forward_over_the_batch_sees_what_decoding_saw(student, mixture):
    """At every sampled position the label is the likeliest token of a full pass; empty rows do no harm."""
    teacher = "mistral" if student != "mistral" else "llama"
    batch = sample([*PROMPTS, []], mixture, student=student, teacher=teacher, end_ids=(9,))
    q, p = (scipy.special.softmax(logits_of(kind, batch), axis=-1) for kind in (student, teacher))
    assert np.isfinite(q).all() and np.isfinite(p).all()
    mixed, mask, labels = (mixture * p + (1 - mixture) * q, *map(np.asarray, (batch["sampled_mask"], batch["labels"])))
    second, best = np.sort(mixed[mask], axis=-1)[:, -2:].T
    assert (best - second).min() > 1e-5  # float32 rounding decides nothing
    np.testing.assert_array_equal(mixed[mask].argmax(-1), labels[mask])
    assert mask.sum() > 12 and not mask[4].any() and not batch["attention_mask"][4].any()


@pytest.mark.slow
def test_padding_and_company_change_no_row():
    decoding = Decoding(max_new_tokens=NEW, temperature=1.0, top_p=0.9, end_ids=(9, 12), pad_id=PAD)

    def written(run, prompts, length=LENGTH, seed=0):
        params = (params_of("gpt2"), params_of("mistral"))
        return new_tokens(run(*params, prompts_for(prompts, length), jax.random.key(seed)))

    narrow, wide = (
        make_sampler(student=STUDENT, teacher=TEACHER, decoding=decoding, mixture=0.4, length=length)
        for length in (LENGTH, 12)
    )
    texts = written(narrow, PROMPTS)
    assert texts == written(wide, PROMPTS, 12)
    assert texts[:2] == written(narrow, [*PROMPTS[:2], [], PROMPTS[0]])[:2]
    assert texts != written(narrow, PROMPTS, seed=1)
    same = written(narrow, PROMPTS[:1] * 4)
    assert len({tuple(row) for row in same}) == 4  # a key a row


def test_masks_and_labels_of_rows_that_end_early():
    ends = (*range(45, 52), 64)
    prompts = [*PROMPTS, [], *PROMPTS]  # their last tokens, 50 and 64, are ends as well, and end nothing
    batch = {x: np.asarray(y) for x, y in sample(prompts, 0.4, temperature=2.0, end_ids=ends).items()}
    assert {(x.shape, x.dtype.name) for x in batch.values()} == {
        ((9, LENGTH + NEW), "int32"),
        ((9, LENGTH + NEW), "bool"),
    }
    lengths = []
    arrays = [batch[name] for name in ("input_ids", "attention_mask", "labels", "sampled_mask")]
    for prompt, ids, real, labels, sampled in zip(prompts, *arrays, strict=True):
        assert ids[:LENGTH].tolist() == [PAD] * (LENGTH - len(prompt)) + prompt
        tokens = ids[LENGTH:].tolist()
        length = next((i + 1 for i, token in enumerate(tokens) if token in ends), NEW) if prompt else 0
        lengths.append(length)
        assert tokens[length:] == [PAD] * (NEW - length)
        assert np.flatnonzero(real).tolist() == list(range(LENGTH - len(prompt), LENGTH + length))
        assert np.flatnonzero(sampled).tolist() == list(range(LENGTH - 1, LENGTH - 1 + length))
        assert labels[sampled].tolist() == tokens[:length]
        np.testing.assert_array_equal(labels[:-1], ids[1:])
    assert lengths[4] == 0 and len({*lengths}) > 3 and max(lengths) == NEW


@pytest.mark.slow
def test_rows_over_a_mesh_write_what_one_device_writes():
    mesh = sharding.make_mesh(data=4, fsdp=2)
    prompts = prompts_for([*PROMPTS, [], [9, 8], *PROMPTS, *PROMPTS, [7, 7], []])
    params = (params_of("gpt2"), params_of("mistral"))
    decoding = Decoding(max_new_tokens=NEW, temperature=1.0, top_k=50, end_ids=(9, 12), pad_id=PAD)
    run = make_sampler(student=STUDENT, teacher=TEACHER, decoding=decoding, mixture=0.4, length=LENGTH)
    one = run(*params, prompts, jax.random.key(5))
    placed = [jax.device_put(tree, sharding.by_rule(tree, mesh, smallest=64)) for tree in params]
    key = jax.device_put(jax.random.key(5), sharding.replicated(mesh))
    many = run(*placed, sharding.put_batch(prompts, mesh), key)
    for name, x in many.items():
        np.testing.assert_array_equal(x, one[name])
        assert x.sharding.is_equivalent_to(sharding.by_batch(mesh), 2), x.sharding


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"length": 13}, "prompts of 13 tokens and 8 new ones do not fit the student's 20 positions"),
        ({"student": tiny.model("gpt2", n_positions=30), "length": 13}, "do not fit the teacher's 20 positions"),
        ({"student": tiny.model("bert")}, "bert is a masked language model"),
        ({"teacher": tiny.model("bert")}, "bert is a masked language model"),
        ({"mixture": 1.5}, "is 1.5; it must be between 0 and 1"),
        ({"mixture": float("nan")}, "is nan"),
        ({"teacher": None}, "is 0.4, and there is no teacher"),
        ({"decoding": Decoding(temperature=-1)}, "temperature is -1"),
    ],
)
def test_bad_input(changed, message):
    right = {"student": STUDENT, "teacher": TEACHER, "mixture": 0.4, "length": 12}
    right["decoding"] = Decoding(max_new_tokens=NEW, pad_id=PAD)
    make_sampler(**right)  # 12 + 8 is 20
    with pytest.raises(UserError, match=message):
        make_sampler(**{**right, **changed})
