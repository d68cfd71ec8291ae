"""What an update learns from where models write: who wrote it, where it is looked at, and the numbers beside it."""

import collections
import functools
import itertools
from types import SimpleNamespace
from typing import Any

import grids
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import tiny

from jaxdistill.losses import policy
from jaxdistill.models import intercept
from jaxdistill.models.inputs import Inputs
from jaxdistill.models.pair import Pair
from jaxdistill.sampling import on_policy
from jaxdistill.sampling.on_policy import (
    BatchLayout,
    as_training_batch,
    interleaved,
    make_rollouts,
    make_scorer,
    writer_of,
)
from jaxdistill.sampling.rollout import prompts_of
from jaxdistill.sampling.settings import SampleConfig
from jaxdistill.step import sharding
from jaxdistill.step.batch import micro_batches, undo_micro_batches

ROWS, LENGTH, NEW, PAD = 8, 4, 5, 1
STUDENT, TEACHER = tiny.model("gpt2"), tiny.model("mistral")
PAIR = Pair(STUDENT, None, TEACHER, None, SimpleNamespace(eos_token_id=PAD), None)  # the end token pads, as in runs
SAMPLE = SampleConfig(max_new_tokens=NEW)
SETTINGS = policy.PolicyConfig(
    semantics="paper",
    mixture=0.2,
    single_step=True,
    length_norm=True,
    clip=0.2,
    gamma=0.9,
    reward_scale=0.5,
    reward_clip=2.0,
    diversity_target=0.5,
    entropy_target=2.0,
)


REUSED = SETTINGS.model_copy(update={"reuse": 3})


def params_of(kind: str, factor: float = 3) -> Any:
    """tiny's with larger matrices: a model that does not say one word for ever, nor any two with like chances."""
    return jax.tree.map(lambda x: factor * x if x.ndim > 1 else x, tiny.params(kind))


def make_text(seed: int, *, width: int = 7, rows: int = ROWS) -> dict[str, np.ndarray]:
    """A batch of pairs, padded on the right: prompts of 1 to 3 tokens, of which nothing is predicted."""
    rng = np.random.default_rng(seed)
    lengths, prompts = rng.integers(4, width + 1, (rows, 1)), rng.integers(1, 4, (rows, 1))
    mask = np.arange(width) < lengths
    ids = np.where(mask, rng.integers(5, 101, mask.shape), PAD).astype(np.int32)
    predicted = (np.arange(width) >= prompts - 1) & (np.arange(width) < lengths - 1)
    labels = np.pad(ids[:, 1:], ((0, 0), (0, 1)), constant_values=PAD)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "label_mask": predicted}


def make_written(seed: int, *, width: int = LENGTH + NEW, rows: int = ROWS) -> dict[str, np.ndarray]:
    """Rows as a sampler returns them: prompts padded on the left, completions of 0 to NEW tokens."""
    rng = np.random.default_rng(seed)
    before, new = rng.integers(1, LENGTH + 1, (rows, 1)), rng.integers(0, width - LENGTH + 1, (rows, 1))
    place = np.arange(width)
    mask = (place >= LENGTH - before) & (place < LENGTH + new)
    ids = np.where(mask, rng.integers(5, 101, mask.shape), PAD).astype(np.int32)
    labels = np.pad(ids[:, 1:], ((0, 0), (0, 1)), constant_values=PAD)
    sampled = (place >= LENGTH - 1) & (place < LENGTH - 1 + new)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "sampled_mask": sampled}


def on_device(batch: Any) -> dict[str, jax.Array]:
    return {name: jnp.asarray(x) for name, x in batch.items()}


def host(batch: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(x) for name, x in batch.items()}


def test_the_shares_are_kept():
    sample = SampleConfig(student=0.5, teacher=0.2)
    steps = 6000
    drawn = [writer_of(step, seed=3, sample=sample) for step in range(steps)]
    counts = collections.Counter(drawn)
    for name, share in (("student", 0.5), ("teacher", 0.2), ("text", 0.3)):
        assert abs(counts[name] - share * steps) < 4 * (share * (1 - share) * steps) ** 0.5
    # Whoever wrote the last says nothing of the next.
    after = collections.Counter(b for a, b in itertools.pairwise(drawn) if a == "teacher")
    assert abs(after["teacher"] / after.total() - 0.2) < 0.05
    # Of the seed and the step alone.
    assert [writer_of(step, seed=3, sample=sample) for step in reversed(range(50))] == drawn[:50][::-1]
    assert [writer_of(step, seed=4, sample=sample) for step in range(50)] != drawn[:50]


@pytest.mark.parametrize(("student", "teacher", "only"), [(0, 0, "text"), (1, 0, "student"), (0, 1, "teacher")])
def test_a_share_of_one_is_every_update(student, teacher, only):
    sample = SampleConfig(student=float(student), teacher=float(teacher))
    assert {writer_of(step, seed=0, sample=sample) for step in range(500)} == {only}


@pytest.mark.parametrize("by", ["student", "teacher"])
def test_what_is_learnt_from_written_rows(by):
    """The divergence on every new token; the teacher's are labels too; nothing else is looked at."""
    written = make_written(0)
    got = host(as_training_batch(on_device(written), by=by))
    assert got.keys() == {"input_ids", "attention_mask", "labels", "label_mask", "head_mask", "own_mask"}
    for name in ("input_ids", "attention_mask", "labels"):
        np.testing.assert_array_equal(got[name], written[name])
    np.testing.assert_array_equal(got["head_mask"], written["sampled_mask"])
    np.testing.assert_array_equal(got["label_mask"], written["sampled_mask"] & (by == "teacher"))
    np.testing.assert_array_equal(got["own_mask"], written["sampled_mask"] & (by == "student"))
    assert written["sampled_mask"].any() and got["label_mask"].dtype == bool


@pytest.mark.parametrize("widths", [(4, 9), (9, 6), (7, 7)])
@pytest.mark.parametrize(("groups", "group"), [(3, 1), (2, 3)])
def test_text_and_written_rows_as_one_batch(widths, groups, group):
    seed, rows = sum(widths), groups * group
    text, written = make_text(seed, width=widths[0], rows=rows), make_written(seed, width=widths[1], rows=rows)
    scores = np.random.default_rng(seed).normal(size=written["input_ids"].shape).astype(np.float32)
    written["advantages"] = scores
    got = host(interleaved(on_device(text), on_device(written), group=group))
    width = max(widths)
    # In turn by groups: group 0 of the text, group 0 of what was written, group 1 of the text, ...
    place = np.arange(2 * rows).reshape(groups, 2, group)
    sides = {
        "text": (place[:, 0].ravel(), text, {"sampled_mask", "advantages"}),
        "written": (place[:, 1].ravel(), written, {"label_mask", "head_mask", "text_mask"}),
    }
    assert got.keys() == {
        "input_ids", "attention_mask", "labels", "label_mask", "head_mask", "text_mask", "sampled_mask", "advantages",
    }  # fmt: skip
    for at, side, without in sides.values():
        own = side["input_ids"].shape[1]
        for name, x in got.items():
            assert x.shape == (2 * rows, width)
            if name in without:
                assert not x[at].any(), name
            else:
                expected = side[{"head_mask": "label_mask", "text_mask": "attention_mask"}.get(name, name)]
                assert x.dtype == expected.dtype
                np.testing.assert_array_equal(x[at][:, :own], expected, err_msg=name)
                assert not x[at][:, own:].any(), name  # 0 and False: masked, whatever the id 0 stands for


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize(("groups", "group"), [(1, 1), (3, 2), (2, 3)])
def test_micro_batches_are_undone(accumulation, groups, group):
    rows = accumulation * groups * group
    batch = {"ids": np.arange(rows * 3).reshape(rows, 3), "row": np.arange(rows)}
    pieces = micro_batches({name: jnp.asarray(x) for name, x in batch.items()}, accumulation=accumulation, group=group)
    assert pieces["ids"].shape == (accumulation, groups * group, 3)
    back = host(undo_micro_batches(pieces, group=group))
    for name, x in batch.items():
        np.testing.assert_array_equal(back[name], x)
    # Groups stay whole, and are taken in turn.
    taken = np.arange(rows).reshape(groups, accumulation, group)
    np.testing.assert_array_equal(pieces["row"], taken.swapaxes(0, 1).reshape(accumulation, -1))


@functools.cache
def logits_of(kind: str) -> Any:
    f = lambda params, *rows: intercept.apply(tiny.model(kind), params, Inputs(*rows)).logits  # noqa: E731
    return jax.jit(f, compiler_options=tiny.QUICK)


def by_hand(kind: str, batch: dict[str, np.ndarray]) -> np.ndarray:
    """log-probability of each label, float64 from the logits; 0 where nothing was sampled."""
    logits = np.asarray(logits_of(kind)(params_of(kind), batch["input_ids"], batch["attention_mask"]), np.float64)
    labels = np.where(batch["sampled_mask"], batch["labels"], 0)
    picked = np.take_along_axis(scipy.special.log_softmax(logits, -1), labels[..., None], -1)[..., 0]
    return np.where(batch["sampled_mask"], picked, 0)


def advantages_by_hand(r: np.ndarray, mask: np.ndarray, semantics: str) -> np.ndarray:
    """Row by row, token by token, of the two definitions in `policy`."""
    result = np.zeros_like(r)
    for b, row in enumerate(mask):
        places = np.flatnonzero(row)
        for i, t in enumerate(places):
            if semantics == "paper":
                later = r[b, places[i + 1 :]]
                result[b, t] = later.sum() / max(len(later), 1)
            else:
                scaled = np.clip(r[b, places[i:]] / SETTINGS.reward_scale, -SETTINGS.reward_clip, SETTINGS.reward_clip)
                result[b, t] = (scaled * SETTINGS.gamma ** np.arange(len(scaled))).mean()
    if semantics == "lmops":
        centred = result - result[mask].mean()
        result = np.where(mask, centred / np.sqrt((centred[mask] ** 2).mean() + 1e-8), 0)
    return result


@pytest.mark.parametrize("semantics", ["paper", "lmops"])
@pytest.mark.parametrize(("accumulation", "group"), grids.everyday([(1, 1), (4, 1), (2, 2)], (2, 2)))
def test_scores_are_those_of_the_whole_batch(semantics, accumulation, group):
    """Against the formulas in NumPy on plain forward passes, in however many pieces they are taken."""
    written = make_written(1)
    score = make_scorer(
        STUDENT, TEACHER, SETTINGS.model_copy(update={"semantics": semantics}), accumulation=accumulation, group=group
    )
    got = host(score(params_of("gpt2"), params_of("mistral"), on_device(written)))
    mask = written["sampled_mask"]
    assert got.keys() == written.keys() | {"log_p", "old_log_q", "weights", "advantages"}
    for name, x in written.items():
        np.testing.assert_array_equal(got[name], x)
    log_p, log_q = by_hand("mistral", written), by_hand("gpt2", written)
    np.testing.assert_allclose(got["log_p"][mask], log_p[mask], atol=2e-5)
    np.testing.assert_allclose(got["old_log_q"][mask], log_q[mask], atol=2e-5)
    weights = 1 / (0.2 * np.exp(log_p - log_q) + 0.8)
    np.testing.assert_allclose(got["weights"][mask], weights[mask], rtol=1e-4)
    assert weights[mask].min() < 0.5 and weights[mask].max() > 1.2  # the two models do differ
    advantages = advantages_by_hand(log_p - log_q, mask, semantics)
    np.testing.assert_allclose(got["advantages"], advantages, atol=2e-4)
    assert np.abs(advantages).max() > 0.5


def test_without_a_teacher_there_is_no_reward():
    written = on_device(make_written(2))
    score = make_scorer(STUDENT, None, SETTINGS.model_copy(update={"mixture": 0.0}), accumulation=2, group=1)
    got = host(score(params_of("gpt2"), {}, written))
    np.testing.assert_array_equal(got["log_p"], got["old_log_q"])
    assert not got["advantages"].any() and (got["weights"] == 1).all()
    mask = got["sampled_mask"]
    np.testing.assert_allclose(got["old_log_q"][mask], by_hand("gpt2", host(written))[mask], atol=2e-5)


def rollouts_of(*, settings: policy.PolicyConfig | None = None, seed: int = 0, **fields: Any) -> Any:
    sample = SAMPLE.model_copy(update=fields)
    mesh = sharding.make_mesh(data=-1, fsdp=1)
    layout = BatchLayout(max_length=LENGTH + NEW, accumulation=1, group=1, mesh=mesh)
    return make_rollouts(sample, settings, PAIR, layout, seed=seed)


@pytest.fixture(scope="module")
def pair() -> SimpleNamespace:
    other = jax.tree.map(lambda x: -x, params_of("gpt2"))
    return SimpleNamespace(student=params_of("gpt2"), later=other, teacher=params_of("mistral"))


def of_written(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: x[1::2] for name, x in batch.items()}


@pytest.mark.slow
def test_a_sample_serves_as_many_updates_as_it_should(pair, monkeypatch):
    """Drawn and scored by the student of its first update; the text is each update's own."""
    drawn = []
    make = on_policy.make_sampler

    def counting(**arguments: Any) -> Any:
        write = make(**arguments)
        return lambda *inputs: drawn.append(1) or write(*inputs)

    monkeypatch.setattr(on_policy, "make_sampler", counting)
    rollouts = rollouts_of(settings=REUSED)
    students = [pair.student, pair.later, pair.later, pair.later, pair.student, pair.student]
    got, calls = [], []
    for step, student in enumerate(students):
        got.append(host(rollouts(step, make_text(step), student, pair.teacher)))
        calls.append(len(drawn))
    assert calls == [1, 1, 1, 2, 2, 2]
    for step, batch in enumerate(got):
        text = make_text(step)
        assert not batch["sampled_mask"][::2].any() and not batch["label_mask"][1::2].any()
        for name, x in text.items():
            np.testing.assert_array_equal(batch[name][::2][:, : x.shape[1]], x)
        for name, x in of_written(got[step - step % 3]).items():
            np.testing.assert_array_equal(of_written(batch)[name], x, err_msg=name)
    # Another sample then, of other prompts, and of the student as it is by then.
    assert (of_written(got[0])["input_ids"] != of_written(got[3])["input_ids"]).any()
    fourth = {name: x[:, : LENGTH + NEW] for name, x in of_written(got[3]).items()}
    prompts = prompts_of(make_text(3), length=LENGTH, prompt_tokens=0, eos=PAD)
    np.testing.assert_array_equal(fourth["input_ids"][:, :LENGTH], prompts["input_ids"])
    score = make_scorer(STUDENT, TEACHER, SETTINGS, accumulation=1, group=1)
    scored = host(score(pair.later, pair.teacher, on_device(fourth)))
    for name in ("old_log_q", "log_p", "weights", "advantages"):
        np.testing.assert_allclose(fourth[name], scored[name], atol=1e-5)
    # A run that goes on at a sample's first update draws the same; between two of them it cannot.
    again = rollouts_of(settings=REUSED)
    for name, x in host(again(3, make_text(3), pair.later, pair.teacher)).items():
        np.testing.assert_array_equal(x, got[3][name], err_msg=name)
    with pytest.raises(AssertionError, match="between two samples"):
        rollouts_of(settings=REUSED)(4, make_text(4), pair.later, pair.teacher)


@pytest.mark.slow
def test_updates_are_of_the_text_or_of_written_rows(pair):
    sample = SampleConfig(student=0.4, teacher=0.3)
    rollouts = rollouts_of(student=0.4, teacher=0.3, seed=1)
    seen = {}
    for step in range(12):
        text = make_text(step)
        batch = host(rollouts(step, text, pair.student, pair.teacher))
        name = seen[step] = writer_of(step, seed=1, sample=sample)
        if name == "text":
            assert batch.keys() == text.keys()
            for key, x in text.items():
                np.testing.assert_array_equal(batch[key], x)
            continue
        prompts = prompts_of(text, length=LENGTH, prompt_tokens=0, eos=PAD)
        np.testing.assert_array_equal(batch["input_ids"][:, :LENGTH], prompts["input_ids"])
        assert batch["input_ids"].shape == (ROWS, LENGTH + NEW)
        assert batch["head_mask"].any(axis=1).all() and not batch["head_mask"][:, : LENGTH - 1].any()
        np.testing.assert_array_equal(batch["label_mask"], batch["head_mask"] & (name == "teacher"))
    assert set(seen.values()) == {"text", "student", "teacher"}
    # As a function of the step: a run that is resumed writes it again.
    again = rollouts_of(student=0.4, teacher=0.3, seed=1)
    for name in ("student", "teacher"):
        alone: dict[str, Any] = {name: 1.0}
        step = next(step for step in reversed(seen) if seen[step] == name)
        first, second, other = (
            host(f(at, make_text(step), pair.student, pair.teacher))
            for f, at in ((rollouts, step), (again, step), (rollouts_of(**alone, seed=2), step))
        )
        np.testing.assert_array_equal(first["input_ids"], second["input_ids"])
        assert (first["input_ids"] != other["input_ids"]).any()  # another seed


@pytest.mark.slow
def test_each_writes_what_is_likely_to_it(pair):
    """Who draws from what: the mean log-probability of new tokens is that of their own writer."""
    text = make_text(0)
    means = {}
    for name in ("student", "teacher"):
        alone: dict[str, Any] = {name: 1.0}
        rollouts = rollouts_of(**alone)
        batch, later = (host(rollouts(step, text, pair.student, pair.teacher)) for step in (0, 1))
        # Drawn anew at every step, of the same prompts too.
        np.testing.assert_array_equal(batch["input_ids"][:, :LENGTH], later["input_ids"][:, :LENGTH])
        assert (batch["input_ids"] != later["input_ids"]).any()
        batch["sampled_mask"] = batch["head_mask"]
        for kind in ("gpt2", "mistral"):
            means[name, kind] = by_hand(kind, batch)[batch["head_mask"]].mean()
    assert means["student", "gpt2"] > means["student", "mistral"] + 0.5
    assert means["teacher", "mistral"] > means["teacher", "gpt2"] + 0.5
