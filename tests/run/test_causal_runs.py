"""Causal models from text to export: losses against torch, whole and resumed runs, and settings that are refused."""

import csv
import functools
import json
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import grids
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import tiny_causal
import tiny_run

from jaxdistill import cli, recipe, train
from jaxdistill.config import DIVERGENCES, Config
from jaxdistill.data.masking import masked_capacity
from jaxdistill.data.text import Text, open_text, prepare_text
from jaxdistill.losses import terms
from jaxdistill.losses.objective import make_objective
from jaxdistill.losses.term import Objective
from jaxdistill.models import intercept, torch_names
from jaxdistill.models.inputs import Inputs
from jaxdistill.models.pair import Pair
from jaxdistill.run import folder as workdirs
from jaxdistill.run.assemble import rollouts_of, train_batches_of
from jaxdistill.run.models import load_pair
from jaxdistill.run.training import make_training
from jaxdistill.sampling import on_policy
from jaxdistill.sampling.settings import SampleConfig
from jaxdistill.step import sharding
from jaxdistill.step.forward import Distillation, loss_fn

SLOW = pytest.mark.slow
# For comparisons with torch: no dropout.
STILL: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
IGNORED = -100


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """GPT-2 as teacher and, beside it, as student; no dropout."""
    return tiny_causal.make(tmp_path_factory.mktemp("gpt2"), **STILL)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Llama, whose tokenizer puts a token before every text."""
    return tiny_causal.make(tmp_path_factory.mktemp("llama"), kind="llama", begins=True, num_key_value_heads=1)


def fine_tuning(tiny: tiny_run.Tiny) -> dict[str, Any]:
    return {"teacher__name": "", "student__name": tiny.folder / "student", "loss__alpha_clm": 1.0}


def distilling(tiny: tiny_run.Tiny) -> dict[str, Any]:
    return {"student__name": tiny.folder / "student"}


POLICY = {
    "loss__alpha_policy": 1.0,
    "loss__alpha_repetition": 0.1,
    "loss__alpha_diversity": 0.1,
    "loss__alpha_entropy": 0.02,
    # Targets so high that both hinges are active.
    "policy__diversity_target": 1.5,
    "policy__entropy_target": 6.0,
}


class Parts(NamedTuple):
    config: Config
    models: Pair
    text: Text
    objective: Objective
    batches: list[dict[str, np.ndarray]]  # the first two of training


def parts_of(tiny: tiny_run.Tiny, **values: Any) -> Parts:
    c = recipe.read(str(tiny.recipe), tiny_run.overrides(**values))
    quiet = lambda line: None  # noqa: E731
    models = load_pair(c, allow_pickle=False, report=quiet)
    text = prepare_text(c.data, open_text(c.data), models.tokenizer, causal=True, report=quiet)
    batches = iter(train_batches_of(c, text, steps=4))
    return Parts(c, models, text, make_objective(c.loss, c.policy, models), [next(batches) for _ in range(2)])


def gradient_of(parts: Parts, batch: Any, **changes: Any) -> Any:
    """((loss, means), gradient) of the step's loss without dropout, on one device."""
    objective, m = parts.objective._replace(**changes), parts.models
    capacity = lambda width: masked_capacity(fraction=parts.config.mask.fraction, group=1, width=width)  # noqa: E731
    distillation = Distillation(m.student, m.teacher, objective, group=1, capacity=capacity)
    batch = {name: jnp.asarray(x) for name, x in batch.items()}
    counts = terms.token_counts(terms.masks_of(objective, batch))
    params = {"student": m.student_params, "projections": {}}
    f = functools.partial(loss_fn, distillation=distillation)
    return jax.jit(jax.value_and_grad(f, has_aux=True))(params, m.teacher_params, batch, counts)


def in_torch(folder: Path) -> Any:
    """The folder as transformers' own class opens it, in float64."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double().eval()


def labels_of(tiny: tiny_run.Tiny, batch: dict[str, np.ndarray], *, prompt_loss: bool = False) -> np.ndarray:
    """torch's labels of a batch's rows, from the CSV: a row's own ids, IGNORED for its prompt and padding.

    Whole texts are tokenised, and the characters of a token tell whether it belongs to the completion. An article that
    is too long for a row loses its end.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.teacher)
    with tiny.text.open(newline="") as file:
        rows = [(row["article"], row["highlights"]) for row in csv.DictReader(file)]
    expected = {}
    for article, highlights in rows:
        encoded = tokenizer(f"{article} => {highlights}", return_offsets_mapping=True)
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
        start = len(f"{article} =>")
        labels = [id if end > start or prompt_loss else IGNORED for id, (_, end) in zip(ids, spans, strict=True)]
        ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
        if (over := len(ids) - 32) > 0:
            place = next(i for i, (_, end) in enumerate(spans) if end > len(article))
            del ids[place - over : place], labels[place - over : place]
        expected[tuple(ids)] = labels
    result = np.full(batch["input_ids"].shape, IGNORED)
    for row, ids, mask in zip(result, batch["input_ids"], batch["attention_mask"], strict=True):
        own = expected[tuple(ids[mask].tolist())]
        row[: len(own)] = own
    return result


def torch_inputs(batch: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    return {
        "input_ids": torch.tensor(np.asarray(batch["input_ids"])).long(),
        "attention_mask": torch.tensor(np.asarray(batch["attention_mask"])).long(),
    }


@SLOW
@pytest.mark.parametrize(("kind", "prompt_loss"), grids.covering(["gpt2", "llama"], [False, True]))
def test_fine_tuning_is_torchs(kind, prompt_loss, request):
    """Loss and gradient of every tensor are those of transformers' own class with labels made from the CSV."""
    import torch

    tiny = request.getfixturevalue("tiny" if kind == "gpt2" else "llama")
    parts = parts_of(tiny, **fine_tuning(tiny), data__prompt_loss=prompt_loss)
    assert parts.objective.weights == {"clm": 1.0}
    batch = parts.batches[0]
    (loss, _), gradient = gradient_of(parts, batch)
    model = in_torch(tiny.folder / "student")
    labels = torch.tensor(labels_of(tiny, batch, prompt_loss=prompt_loss))
    theirs = model(**torch_inputs(batch), labels=labels).loss
    theirs.backward()
    np.testing.assert_allclose(loss, theirs.item(), rtol=1e-5)
    named = dict(model.named_parameters())
    ours = torch_names.to_torch(gradient["student"])
    assert ours.keys() <= named.keys() and len(ours) > 20
    largest = max(float(np.abs(x).max()) for x in ours.values())
    for name, x in ours.items():
        grad = named[name].grad
        np.testing.assert_allclose(x, grad.numpy(), atol=1e-5 * largest, err_msg=name)


def divergence(name: str, student: np.ndarray, teacher: np.ndarray, t: float, beta: float) -> np.ndarray:
    """The definitions, in float64 from logits."""
    p, q = scipy.special.softmax(teacher / t, -1), scipy.special.softmax(student / t, -1)
    kl = lambda a, b: (a * np.log(a / b)).sum(-1)  # noqa: E731
    m = beta * p + (1 - beta) * q
    if name == "total_variation":
        return t / 2 * np.abs(p - q).sum(-1)
    return (
        t**2
        * {
            "forward_kl": lambda: kl(p, q),
            "reverse_kl": lambda: kl(q, p),
            "symmetric_kl": lambda: kl(p, q) + kl(q, p),
            "jsd": lambda: (beta * kl(p, m) + (1 - beta) * kl(q, m)) / (beta * (1 - beta)),
            "skewed_kl": lambda: kl(p, beta * p + (1 - beta) * q),
            "skewed_reverse_kl": lambda: kl(q, (1 - beta) * p + beta * q),
        }[name]()
    )


@functools.cache
def logits_in_torch(folder: Path, ids: bytes, mask: bytes, shape: tuple[int, int]) -> np.ndarray:
    import torch

    batch = {"input_ids": np.frombuffer(ids, np.int32), "attention_mask": np.frombuffer(mask, bool)}
    batch = {name: x.reshape(shape) for name, x in batch.items()}
    with torch.no_grad():
        return in_torch(folder)(**torch_inputs(batch)).logits.numpy()


@pytest.fixture(scope="module")
def distilled(tiny) -> Parts:
    return parts_of(tiny, **distilling(tiny), loss__temperature=1.7, loss__beta=0.3)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "forward_kl" else SLOW) for n in DIVERGENCES])
def test_distilling_is_the_divergence_at_the_labelled_tokens(tiny, distilled, name):
    """The loss is that of the definitions in NumPy, of torch's logits, where the completion's tokens are predicted."""
    batch = distilled.batches[1]
    (loss, means), gradient = gradient_of(distilled, batch, divergence=name)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    student, teacher = (
        logits_in_torch(folder, ids.tobytes(), mask.tobytes(), ids.shape)
        for folder in (tiny.folder / "student", tiny.teacher)
    )
    labels = labels_of(tiny, batch)[:, 1:]
    at = labels != IGNORED
    expected = divergence(name, student[:, :-1][at], teacher[:, :-1][at], 1.7, 0.3).mean()
    np.testing.assert_allclose(means["ce"], expected, rtol=1e-5)
    assert expected > 0.05
    chosen = np.take_along_axis(scipy.special.log_softmax(student[:, :-1], -1)[at], labels[at][:, None], -1)
    np.testing.assert_allclose(means["clm"], -chosen.mean(), rtol=1e-5)
    np.testing.assert_allclose(loss, 5 * expected - 2 * chosen.mean(), rtol=1e-5)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


@SLOW
def test_packed_text_is_documents_one_by_one(tiny):
    """The loss of rows with several documents is torch's loss of the documents one by one."""
    import torch

    values = {"data__batching": "packed", "data__prompt_column": "", "data__column": "article"}
    parts = parts_of(tiny, **fine_tuning(tiny), **values)
    batch = parts.batches[0]
    (loss, _), _ = gradient_of(parts, batch)
    end = parts.models.tokenizer.eos_token_id
    model, nll, count, several = in_torch(tiny.folder / "student"), 0.0, 0, 0
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        row = ids[mask]
        documents = np.split(row, np.flatnonzero(row[:-1] == end) + 1)
        several += len(documents) > 1
        for document in documents:
            if len(document) > 1:
                inputs = torch.tensor(document[None]).long()
                with torch.no_grad():
                    nll += model(input_ids=inputs, labels=inputs).loss.item() * (len(document) - 1)
                count += len(document) - 1
    assert several > 10
    np.testing.assert_allclose(loss, nll / count, rtol=1e-5)


def updated(parts: Parts, batch: dict[str, Any], *, devices: int, accumulation: int, group: int) -> Any:
    """(metrics, what one update adds to the student) of the step as the loop makes it."""
    c = parts.config.changed(train={"accumulation": accumulation}, mask={"group": group})
    mesh = sharding.make_mesh(data=-1, fsdp=1, devices=jax.devices()[:devices])
    training = make_training(c, parts.models, parts.objective, sharding.Meshes(mesh, mesh), steps=4)
    state = training.init(parts.models.student_params)
    teacher_params = jax.device_put(parts.models.teacher_params, training.teacher_shardings)
    state, metrics = training.step(state, teacher_params, sharding.put_batch(batch, mesh), jax.random.key(0))
    change = jax.tree.map(
        lambda new, old: np.asarray(new) - old, state.params["student"], dict(parts.models.student_params)
    )
    return {name: float(x) for name, x in metrics.items()}, change


def wider(batch: dict[str, np.ndarray], by: int) -> dict[str, np.ndarray]:
    """The batch with more columns, all outside the masks, whose content must not count."""
    more = {}
    for name, x in batch.items():
        fill = {"b": False, "i": 7, "f": 3.0}[x.dtype.kind]
        more[name] = np.pad(x, ((0, 0), (0, by)), constant_values=fill)
    return more


@SLOW
@pytest.mark.parametrize("kind", ["distilling", "policy"])
def test_pieces_devices_and_padding_change_no_update(tiny, kind):
    plain = {"optim__name": "sgd", "optim__learning_rate": 0.5, "optim__schedule": "constant", "optim__warmup": 0.0}
    plain["optim__clip"] = 1.0
    parts = parts_of(tiny, **distilling(tiny), **plain, **(POLICY if kind == "policy" else {}))
    batch = parts.batches[0]
    if kind == "policy":
        rollouts = rollouts_of(parts.config, parts.models, parts.objective, mesh=sharding.make_mesh(data=-1, fsdp=1))
        assert rollouts is not None
        # The sample is drawn by another student than the one that learns, so that ratios are not 1.
        before = jax.tree.map(lambda x: 0.7 * x, parts.models.student_params)
        batch = {n: np.asarray(x) for n, x in rollouts(0, batch, before, parts.models.teacher_params).items()}
        assert len(batch["input_ids"]) == 32 and np.abs(batch["advantages"]).max() > 0.1
    metrics, change = updated(parts, batch, devices=8, accumulation=1, group=1)
    assert metrics["grad_norm"] > 1  # clipped
    terms = ("policy", "repetition", "diversity", "entropy") if kind == "policy" else ("ce", "clm")
    assert all(metrics[name] for name in terms)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(change))
    assert largest > 1e-3
    every = ((1, 1, 1, 0), (1, 2, 1, 0), (1, 4, 1, 0), (8, 2, 1, 0), (1, 2, 2, 0), (1, 1, 1, 6))
    for case in every if grids.FULL else every[3:]:
        devices, accumulation, group, padding = case
        other, moved = updated(parts, wider(batch, padding), devices=devices, accumulation=accumulation, group=group)
        assert other == pytest.approx(metrics, rel=2e-5, abs=1e-6), case
        for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(change), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5 * largest, err_msg=str(case))


LOGGED = {"step", "time", "kind", "loss", "grad_norm", "learning_rate", "tokens_per_s", "input_wait"}
OF_TEACHER = {"teacher_clm_loss", "teacher_perplexity", "teacher_clm_accuracy"}
FIGURES = {"step", "time", "kind", "clm_loss", "perplexity", "clm_accuracy", "kl", "top1", "top5", *OF_TEACHER}
SAMPLES = {
    "sample/effective_sample_size", "sample/clip_fraction", "sample/repetition_rate", "sample/reward", "sample/length",
}  # fmt: skip
LEARNING = {"train__steps": 30, "optim__learning_rate": 0.01, "evaluate__every": 30, "checkpoint__every": 30}


def mean_of(records: list[dict[str, Any]], name: str) -> float:
    return sum(record[name] for record in records) / len(records)


@SLOW
def test_fine_tuning_without_a_teacher(tiny, tmp_path):
    import torch

    tiny_run.train(tiny, tmp_path / "run", **fine_tuning(tiny), **LEARNING)
    trained, evaluated = tiny_run.records(tmp_path / "run", "train"), tiny_run.records(tmp_path / "run", "eval")
    assert trained[1].keys() == LOGGED | {"clm"}
    assert evaluated[-1].keys() == FIGURES - {"kl", "top1", "top5"} - OF_TEACHER
    assert all(record["loss"] == pytest.approx(record["clm"], rel=1e-6) for record in trained)
    assert mean_of(trained[-5:], "loss") < trained[0]["loss"] - 1
    assert evaluated[-1]["perplexity"] == pytest.approx(math.exp(evaluated[-1]["clm_loss"]))
    assert evaluated[-1]["clm_loss"] < evaluated[0]["clm_loss"] - 1
    # The first figures in the log are torch's figures of the first batch.
    batch = parts_of(tiny, **fine_tuning(tiny), **LEARNING).batches[0]
    model = in_torch(tiny.folder / "student")
    loss = model(**torch_inputs(batch), labels=torch.tensor(labels_of(tiny, batch))).loss
    loss.backward()
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters()))
    assert (trained[0]["loss"], trained[0]["grad_norm"]) == pytest.approx((loss.item(), norm), rel=1e-5)


@SLOW
def test_distilling(tiny, tmp_path):
    """With a temperature and a weight that move, and a prompt that both models continue at the end."""
    workdir = tmp_path / "run"
    end, prompt = '{"temperature":1.0,"alpha_clm":0.1}', "the cat sees =>"
    values = {**distilling(tiny), **LEARNING, "loss__alpha_clm": 0.0, "loss__end": end}
    argv = tiny_run.arguments(tiny, workdir, **values, evaluate__prompts=(prompt,))
    code, _, err = tiny_run.call(train.main, argv)
    assert code == 0, err
    shown = err.splitlines()
    at = shown.index(prompt)
    assert shown[at + 1].startswith("  teacher: ") and shown[at + 2].startswith("  student: ")
    trained, evaluated = tiny_run.records(workdir, "train"), tiny_run.records(workdir, "eval")
    assert trained[1].keys() == LOGGED | {"ce", "clm", "ramp/temperature", "ramp/clm"}
    assert evaluated[-1].keys() == FIGURES
    for i, record in enumerate(trained):
        assert record["ramp/temperature"] == pytest.approx(2 - i / 29, rel=1e-5)
        assert record["ramp/clm"] == pytest.approx(0.1 * i / 29, abs=1e-6)
        assert record["loss"] == pytest.approx(5 * record["ce"] + record["ramp/clm"] * record["clm"], rel=1e-5)
    assert evaluated[-1]["kl"] < evaluated[0]["kl"] * 0.7 and evaluated[-1]["top1"] > evaluated[0]["top1"]


@SLOW
def test_half_of_the_updates_on_the_students_own_text(tiny, tmp_path):
    values = {"sample__student": 0.5, "loss__alpha_clm": 0.1}
    tiny_run.train(tiny, tmp_path / "run", **distilling(tiny), **LEARNING, **values)
    trained, evaluated = tiny_run.records(tmp_path / "run", "train"), tiny_run.records(tmp_path / "run", "eval")
    sample = SampleConfig(student=0.5)
    own = {step for step in range(30) if on_policy.writer_of(step, seed=0, sample=sample) == "student"}
    # The student's own text has no labels, so `clm` is 0 there.
    assert {record["step"] - 1 for record in trained if record["clm"] == 0} == own and 8 < len(own) < 22
    assert all(record["ce"] > 0 for record in trained)
    assert trained[1].keys() == LOGGED | {"ce", "clm"}
    assert evaluated[-1]["kl"] < evaluated[0]["kl"] * 0.8


@SLOW
def test_all_updates_on_the_teachers_text(tiny, tmp_path):
    """Sequence-level distillation: the student sees the teacher's words, and none of its logits."""
    tiny_run.train(tiny, tmp_path / "run", **distilling(tiny), **LEARNING, sample__teacher=1.0, loss__alpha_ce=0.0)
    trained, evaluated = tiny_run.records(tmp_path / "run", "train"), tiny_run.records(tmp_path / "run", "eval")
    assert trained[1].keys() == LOGGED | {"clm"}
    assert evaluated[-1]["kl"] < evaluated[0]["kl"] - 0.02
    assert mean_of(trained[-5:], "clm") < mean_of(trained[:5], "clm")


@pytest.mark.weekly  # each penalty is by hand in test_policy, and samples that are used again are in the stopped runs
def test_policy_gradient_with_all_penalties(tiny, tmp_path):
    alone = {"loss__alpha_ce": 0.0, "loss__alpha_clm": 0.0}
    values = {**distilling(tiny), **LEARNING, **POLICY, **alone, "policy__reuse": 2}
    tiny_run.train(tiny, tmp_path / "run", **values)
    trained, evaluated = tiny_run.records(tmp_path / "run", "train"), tiny_run.records(tmp_path / "run", "eval")
    assert trained[1].keys() == LOGGED | {"policy", "repetition", "diversity", "entropy"} | SAMPLES
    weights = {"policy": 1.0, "repetition": 0.1, "diversity": 0.1, "entropy": 0.02}
    for record in trained:
        assert record["loss"] == pytest.approx(sum(w * record[name] for name, w in weights.items()), rel=1e-4)
        assert 0 < record["sample/effective_sample_size"] <= 1 and 0 <= record["sample/clip_fraction"] <= 1
        assert 0 <= record["sample/repetition_rate"] < 1 and 1 <= record["sample/length"] <= 8
    assert evaluated[-1]["kl"] < evaluated[0]["kl"] * 0.8
    assert mean_of(trained[-6:], "sample/reward") > mean_of(trained[:6], "sample/reward")
    # Two updates share a sample, so both have the figures of the time of sampling.
    for name in ("sample/reward", "sample/length", "sample/effective_sample_size", "sample/repetition_rate"):
        pairs = [(a[name], b[name]) for a, b in zip(trained[::2], trained[1::2], strict=True)]
        assert all(a == pytest.approx(b, rel=1e-5) for a, b in pairs) and len({a for a, _ in pairs}) > 2, name
    # The first figures are those of the first update's sample.
    parts = parts_of(tiny, **values)
    rollouts = rollouts_of(parts.config, parts.models, parts.objective, mesh=sharding.make_mesh(data=-1, fsdp=1))
    assert rollouts is not None
    m = parts.models
    batch = {n: np.asarray(x) for n, x in rollouts(0, parts.batches[0], m.student_params, m.teacher_params).items()}
    mask = batch["sampled_mask"]
    w = batch["weights"][mask].astype(np.float64)
    assert {name: trained[0][name] for name in SAMPLES} == pytest.approx(
        {
            "sample/effective_sample_size": w.sum() ** 2 / (len(w) * (w**2).sum()),
            # Before the first update the ratio is the weight.
            "sample/clip_fraction": (np.abs(w - 1) > 0.2).mean(),
            "sample/repetition_rate": np.mean(
                [id in row[:i] for row in map(np.ndarray.tolist, map(np.compress, mask, batch["labels"]))
                 for i, id in enumerate(row)]
            ),
            "sample/reward": (batch["log_p"] - batch["old_log_q"])[mask].mean(),
            "sample/length": mask.sum() / mask.any(axis=1).sum(),
        },
        rel=1e-4,
    )  # fmt: skip


@SLOW
def test_what_the_student_wrote_is_as_likely_when_it_is_learnt_from(tmp_path):
    """Without a mixture the first ratio is 1: dropout, on one side of it alone, would clip most tokens."""
    tiny = tiny_causal.make(tmp_path, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    values = {"loss__alpha_policy": 1.0, "policy__mixture": 0.0, "policy__clip": 0.01, "train__steps": 1}
    tiny_run.train(tiny, tmp_path / "run", **values)
    (record,) = tiny_run.records(tmp_path / "run", "train")
    assert record["sample/clip_fraction"] == 0 and record["sample/effective_sample_size"] == pytest.approx(1.0)


@pytest.mark.weekly  # every semantics is by hand in test_policy, and micro-batches are in the test of pieces
@pytest.mark.parametrize("semantics", ["paper", "lmops"])
def test_policy_gradient_beside_the_text(tiny, tmp_path, semantics):
    """Together with the losses on the text, in micro-batches."""
    tiny_run.train(
        tiny, tmp_path / "run", **distilling(tiny), **LEARNING, loss__alpha_policy=1.0, train__accumulation=2,
        policy__semantics=semantics,
    )  # fmt: skip
    trained, evaluated = tiny_run.records(tmp_path / "run", "train"), tiny_run.records(tmp_path / "run", "eval")
    assert trained[1].keys() == LOGGED | {"ce", "clm", "policy"} | SAMPLES
    # The losses on the text outweigh those of a random teacher.
    assert mean_of(trained[-5:], "clm") < mean_of(trained[:5], "clm") - 0.5
    assert evaluated[-1]["clm_loss"] < evaluated[0]["clm_loss"] - 0.5


@SLOW
def test_packed_text(tiny, tmp_path):
    values = {"data__batching": "packed", "data__prompt_column": "", "data__column": "article"}
    tiny_run.train(tiny, tmp_path / "run", **distilling(tiny), **LEARNING, **values)
    trained, evaluated = tiny_run.records(tmp_path / "run", "train"), tiny_run.records(tmp_path / "run", "eval")
    assert mean_of(trained[-5:], "loss") < trained[0]["loss"] - 2
    assert evaluated[-1]["clm_loss"] < evaluated[0]["clm_loss"] - 1
    # The first tokens of documents have no labels in the run either: the first loss in the log is that of the rows.
    parts = parts_of(tiny, **distilling(tiny), **LEARNING, **values)
    (loss, _), _ = gradient_of(parts, parts.batches[0])
    assert trained[0]["loss"] == pytest.approx(float(loss), rel=1e-5)


@pytest.fixture(scope="module")
def dropping(tmp_path_factory):
    """As `tiny`, with the default dropout."""
    return tiny_causal.make(tmp_path_factory.mktemp("dropping"))


# name -> (settings, number of updates before the run is stopped, checkpoint that it resumes from).
RESUMED: dict[str, tuple[dict[str, Any], int, int]] = {
    "policy": ({**POLICY, "train__steps": 7, "checkpoint__every": 3, "train__accumulation": 2}, 5, 3),
    "policy, reused": ({**POLICY, "train__steps": 8, "checkpoint__every": 2, "policy__reuse": 2}, 5, 4),
    "on-policy": ({"sample__student": 0.5, "sample__teacher": 0.25, "train__steps": 12, "checkpoint__every": 4}, 7, 4),
}


@SLOW
@pytest.mark.parametrize("kind", grids.everyday(RESUMED, "policy, reused", "on-policy"))
def test_stopped_and_run_again(dropping, tmp_path, monkeypatch, capsys, kind):
    values, updates, checkpoint = RESUMED[kind]
    values = {**distilling(dropping), **values, "optim__learning_rate": 0.01, "evaluate__every": 4}
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    tiny_run.train(dropping, whole, **values)
    with monkeypatch.context() as patch, pytest.raises(tiny_run.Stopped):
        tiny_run.stop_after(patch, updates)
        train.main(tiny_run.arguments(dropping, torn, **values))
    assert len(tiny_run.records(torn, "train")) >= updates - 1
    tiny_run.train(dropping, torn, **values)
    assert f"resumed {torn} at step {checkpoint} of {values['train__steps']}" in capsys.readouterr().err
    tiny_run.assert_same_run(torn, whole)
    if kind == "on-policy":  # updates after the checkpoint learn from every kind of text
        sample = SampleConfig(student=0.5, teacher=0.25)
        assert {on_policy.writer_of(step, seed=0, sample=sample) for step in range(4, 12)} == {
            "student", "teacher", "text",
        }  # fmt: skip


@pytest.fixture(scope="module")
def varied(tiny):
    """A short run of a student with larger matrices, which does not repeat one word for ever."""
    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(tiny.folder / "student", tiny.folder / "larger")
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: 4 * x if x.ndim > 1 else x for name, x in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    workdir = tiny.folder / "varied"
    tiny_run.train(tiny, workdir, student__name=folder, train__steps=2, optim__learning_rate=1e-3)
    return workdir


@pytest.fixture(scope="module")
def exported(tiny, varied):
    out = tiny.folder / "exported"
    code, _, err = tiny_run.call(cli.main, ["export", "--to-pytorch", f"--workdir={varied}", f"--out={out}"])
    assert code == 0, err
    return out


def greedy_in_torch(model: Any, tokenizer: Any, prompt: str, new: int) -> list[int]:
    import torch

    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return out[0, ids.shape[1] :].tolist()


PROMPTS = ["the cat sees =>", "a big old red house. =>", "never =>", " ".join(tiny_run.WORDS[:8]) + ". =>"]


@SLOW
def test_what_is_exported_is_the_student_and_writes_as_it(varied, exported, tmp_path):
    """torch opens the folder, and has the run's logits and the same greedy text token for token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported).eval(), AutoTokenizer.from_pretrained(exported)
    found = workdirs.load_student(varied, report=lambda line: None)
    ids = np.random.default_rng(0).integers(0, len(tokenizer), (3, 20)).astype(np.int32)
    ours = intercept.apply(found.model, found.params, Inputs(jnp.asarray(ids), jnp.ones(ids.shape, bool))).logits
    with torch.no_grad():
        theirs = model(torch.tensor(ids).long()).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    argv = [f"--model={exported}", f"--input={tmp_path}/prompts.txt", f"--out={tmp_path}/out.jsonl"]
    code, _, err = tiny_run.call(cli.main, ["generate", *argv, "--max-new-tokens=12"])
    assert code == 0, err
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["prompt"] for record in written] == PROMPTS
    # The run folder itself writes the same.
    code, _, err = tiny_run.call(cli.main, ["generate", f"--model={varied}", *argv[1:], "--max-new-tokens=12"])
    assert code == 0 and [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == written
    seen = set()
    for record, prompt in zip(written, PROMPTS, strict=True):
        tokens = greedy_in_torch(model, tokenizer, prompt, 12)
        assert record["tokens"] == len(tokens)
        assert record["stop"] == ("end" if tokens[-1] == tokenizer.eos_token_id else "length")
        before = tokenizer(prompt)["input_ids"]
        assert prompt + record["completion"] == tokenizer.decode([*before, *tokens], skip_special_tokens=True)
        seen.add(tuple(tokens))
    assert len(seen) > 1 and any(len(set(tokens)) > 3 for tokens in seen)


@SLOW
def test_evaluating_with_predictions(varied, exported, tmp_path):
    """On other pairs: rouge's figures are those of rouge-score on the predictions, which are torch's completions."""
    from rouge_score import rouge_scorer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = tiny_causal.pairs(24, seed=9)
    other = tiny_causal.write_pairs(tmp_path / "other.csv", rows)
    before = tiny_run.bits(varied)
    argv = [
        "evaluate",
        f"--workdir={varied}",
        "--metrics=rouge,perplexity,agreement",
        f"--predictions={tmp_path}/predictions.json",
        f"--json={tmp_path}/figures.json",
        *tiny_run.overrides(data__eval_path=other, evaluate__rouge_rows=0),
    ]
    code, out, err = tiny_run.call(cli.main, argv)
    assert code == 0, err
    assert tiny_run.bits(varied) == before
    figures = json.loads((tmp_path / "figures.json").read_text())
    of_texts = {"rouge1", "rouge2", "rougeL", "completion_tokens", "completion_ends"}
    assert figures.keys() == (FIGURES - {"step", "time", "kind"}) | of_texts | {f"teacher_{name}" for name in of_texts}
    assert all(name in out for name in figures)
    predictions = json.loads((tmp_path / "predictions.json").read_text())
    assert len(predictions) == len(rows)
    for record, (article, highlights) in zip(predictions, rows, strict=True):
        assert record.keys() == {"prompt", "completion", "reference"}
        assert record["reference"] == highlights
        # An article that is too long for a row loses its end.
        article_part = record["prompt"].removesuffix(" =>")
        assert record["prompt"] != article_part and article_part and article.startswith(article_part)
    assert any(record["prompt"] == f"{article} =>" for record, (article, _) in zip(predictions, rows, strict=True))
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = [scorer.score(record["reference"], record["completion"]) for record in predictions]
    for kind in ("rouge1", "rouge2", "rougeL"):
        assert figures[kind] == pytest.approx(sum(score[kind].fmeasure for score in scores) / len(scores))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported).eval(), AutoTokenizer.from_pretrained(exported)
    tokens = [greedy_in_torch(model, tokenizer, record["prompt"], 8) for record in predictions]
    texts = [tokenizer.decode(one, skip_special_tokens=True).strip() for one in tokens]
    assert [record["completion"] for record in predictions] == texts and len(set(texts)) > 1
    assert figures["completion_tokens"] == pytest.approx(sum(map(len, tokens)) / len(tokens))
    ends = [one[-1] == tokenizer.eos_token_id for one in tokens]
    assert figures["completion_ends"] == pytest.approx(sum(ends) / len(ends))


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    return tiny_run.make(tmp_path_factory.mktemp("masked"))


SAMPLED = {"sample__student": 0.5, "sample__prompt_tokens": 4, "sample__max_new_tokens": 4}
REFUSED: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "masked tokens": ("causal", ("gpt2", "config.loss.tokens", "labels"), {"loss__tokens": "masked"}),
    "no loss": (
        "causal",
        ("no loss", "config.loss.alpha_clm"),
        {"loss__alpha_ce": 0.0, "loss__alpha_clm": 0.0, "loss__alpha_cos": 0.0},
    ),
    "no such column": ("causal", ("'abstract'", "article"), {"data__prompt_column": "abstract"}),
    "rouge of plain text": (
        "causal",
        ("rouge", "config.data.prompt_column"),
        {"evaluate__metrics": "('rouge',)", "data__prompt_column": ""},
    ),
    "pseudo-perplexity": (
        "causal",
        ("gpt2", "pseudo_perplexity", "masked"),
        {"evaluate__metrics": "('pseudo_perplexity',)"},
    ),
    "a masked teacher": (
        "causal",
        ("teacher bert (masked)", "student gpt2 (causal)"),
        {"teacher__name": "MASKED", "student__name": "STUDENT", "data__prompt_column": ""},
    ),
    "too long": (
        "causal",
        ("config.data.max_length=48", "40 positions"),
        {"data__max_length": 48, "data__buckets": "()"},
    ),
    "a prompt that is too long": (
        "causal",
        ("config.evaluate.prompts", "config.evaluate.max_new_tokens=36"),
        {"evaluate__max_new_tokens": 36, "evaluate__prompts": ("the cat sees the dog.",)},
    ),
    "completions that do not fit": (
        "causal",
        ("config.evaluate.max_new_tokens=30", "40 positions", "config.data.max_length"),
        {"evaluate__metrics": "('rouge',)", "checkpoint__best": "", "evaluate__max_new_tokens": 30},
    ),
    "samples of packed rows": (
        "causal",
        ("config.data.batching", "length"),
        {"data__batching": "packed", "sample__student": 0.5},
    ),
    "a sample across checkpoints": (
        "causal",
        ("config.checkpoint.every=3", "policy.reuse=2"),
        {"loss__alpha_policy": 1.0, "policy__reuse": 2, "checkpoint__every": 3},
    ),
    "samples without a divergence": (
        "causal",
        ("sample.student", "alpha_ce"),
        {"sample__student": 0.5, "loss__alpha_ce": 0.0},
    ),
    "a prompt column": (
        "masked",
        ("bert", "config.data.prompt_column", "causal"),
        {"data__source": "csv", "data__path": "PAIRS", "data__column": "highlights", "data__prompt_column": "article"},
    ),
    "samples of a masked model": ("masked", ("bert", "config.sample"), {**SAMPLED, "loss__tokens": "labels"}),
    "rouge of a masked model": ("masked", ("bert", "rouge", "causal"), {"evaluate__metrics": "('rouge',)"}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(tiny, masked, tmp_path, what):
    """One line names the key, and no run folder is made."""
    of, said, values = REFUSED[what]
    paths = {"MASKED": masked.teacher, "STUDENT": tiny.folder / "student", "PAIRS": tiny.text}
    values = {key: paths.get(value, value) if isinstance(value, str) else value for key, value in values.items()}
    made, workdir = tiny if of == "causal" else masked, tmp_path / "run"
    code, _, err = tiny_run.call(train.main, tiny_run.arguments(made, workdir, **values))
    assert code == 2, err
    assert err.splitlines()[-1].startswith("error: ") and err.count("error: ") == 1, err
    assert all(part in err for part in said), err
    assert not workdir.exists()
