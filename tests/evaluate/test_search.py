"""The search for layers to keep: its figures against students that are really cut out, and whom it picks."""

import itertools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import tiny as tiny_models
import tiny_run
from transformers import AutoTokenizer

from jaxdistill import cli, recipe
from jaxdistill.data import text as texts
from jaxdistill.evaluate import search
from jaxdistill.evaluate.evaluator import make_context
from jaxdistill.models import intercept
from jaxdistill.models.inputs import Inputs
from jaxdistill.models.model import build_model
from jaxdistill.models.student import albert_choices, cut_student, student_config
from jaxdistill.run.assemble import held_out_of
from jaxdistill.run.models import load_pair
from jaxdistill.step import sharding


@pytest.fixture(scope="module")
def measured(tiny):
    """The tiny teacher of four layers, and a context that measures it on held-out lines."""
    config = recipe.read(str(tiny.recipe), ["--config.student.layers=4", "--config.evaluate.batches=1"])
    pair = load_pair(config, allow_pickle=False, report=print)
    source = texts.open_text(config.data)
    text = texts.prepare_text(config.data, source, pair.tokenizer, causal=False, report=print)
    held_out = held_out_of(config, text)
    mesh = sharding.make_mesh(data=-1, fsdp=1)
    context = make_context(config.evaluate, config.mask, pair, text, held_out, mesh=mesh)
    params = jax.device_put(pair.student_params, sharding.replicated(mesh))
    return SimpleNamespace(context=context, params=params, model=pair.student, batch=held_out[0])


def by_cutting(measured, layers: tuple[int, ...]) -> tuple[float, float]:
    """(mlm_loss, kl) of the student cut out, in NumPy float64 from all its logits."""

    def log_probabilities(model, params) -> np.ndarray:
        inputs = Inputs(*(jnp.asarray(measured.batch[name]) for name in ("input_ids", "attention_mask")))
        logits = jax.jit(lambda params: intercept.apply(model, params, inputs).logits)(params)
        return scipy.special.log_softmax(np.asarray(logits, np.float64), -1)[measured.batch["label_mask"]]

    params = jax.device_get(measured.params)
    student = build_model(student_config(measured.model.config, family="bert", layers=layers))
    p = log_probabilities(measured.model, params)
    q = log_probabilities(student, cut_student(params, teacher=measured.model, student=student, layers=layers))
    labels = measured.batch["labels"][measured.batch["label_mask"]]
    return -q[np.arange(len(labels)), labels].mean(), np.sum(np.exp(p) * (p - q), axis=-1).mean()


@pytest.mark.slow
def test_scores_are_those_of_students_cut_out(measured):
    chosen = [(0, 1, 2, 3), (1, 3), (2,)]
    for layers, score in zip(chosen, search.make_scorer(measured.context)(measured.params, chosen), strict=True):
        loss, kl = by_cutting(measured, layers)
        assert score.layers == layers
        assert score.loss == pytest.approx(loss, rel=1e-5)
        assert score.kl == pytest.approx(kl, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_few_subsets_are_all_scored(measured):
    whole, scores = search.search_layers(measured.context, measured.params, count=2)
    assert whole.layers == (0, 1, 2, 3) and whole.kl == pytest.approx(0, abs=1e-6)
    assert {score.layers for score in scores} == set(itertools.combinations(range(4), 2))
    assert [score.kl for score in scores] == sorted(score.kl for score in scores)


@pytest.mark.slow
def test_many_subsets_are_eliminated_backward(measured, monkeypatch):
    monkeypatch.setattr(search, "EXHAUSTIVE", 1)
    _, scores = search.search_layers(measured.context, measured.params, count=2)
    found = {score.layers for score in scores}
    assert found >= set(search.usual_choices(2, of=4)) == {(0, 2), (0, 1), (2, 3), (0, 3)}
    # The first to go is the one whose loss costs least; the rest are its neighbours.
    threes = list(itertools.combinations(range(4), 3))
    best = min(search.make_scorer(measured.context)(measured.params, threes), key=lambda s: s.kl).layers
    assert found == set(itertools.combinations(best, 2)) | set(search.usual_choices(2, of=4))


@pytest.mark.slow
def test_init_student_prints_the_table_and_cuts_the_best(tiny, tmp_path):
    from safetensors.numpy import load_file

    out = tmp_path / "student"
    argv = ["init-student", f"--teacher={tiny.teacher}", "--layers=search:2", f"--text={tiny.text}", f"--out={out}"]
    code, said, err = tiny_run.call(cli.main, argv)
    assert code == 0, err
    lines = said.splitlines()
    start = next(i for i, line in enumerate(lines) if "candidates" in line)
    rows = [line.split() for line in lines[start + 1 : start + 8]]
    assert rows[0] == ["0.0000", rows[0][1], "all", "4"]
    assert len(rows) == 7 and {row[3] for row in rows[1:] if len(row) > 3} == {"every_other", "first", "last", "spread"}
    best = rows[1][2]
    assert f"layers {best} of {tiny.teacher}" in said
    teacher, student = (load_file(folder / "model.safetensors") for folder in (tiny.teacher, out))
    for new, old in enumerate(best.split(",")):
        name = "bert.encoder.layer.{}.output.dense.weight"
        np.testing.assert_array_equal(student[name.format(new)], teacher[name.format(old)])


def cut_albert(tiny, tmp_path, count: int, **fields) -> tuple[int, str, str]:
    tokenizer = AutoTokenizer.from_pretrained(tiny.teacher)
    teacher = tiny_run.write_model(tmp_path / "albert", tokenizer, kind="albert", embedding_size=8, **fields)
    out = tmp_path / "student"
    argv = ["init-student", f"--teacher={teacher}", f"--layers=search:{count}", f"--text={tiny.text}", f"--out={out}"]
    return tiny_run.call(cli.main, [*argv, "--json"])


@pytest.mark.parametrize(("count", "said"), [(2, "1 shared group"), (3, "give --layers 3")])
def test_where_there_is_one_student_there_is_nothing_to_choose(tiny, tmp_path, count, said):
    code, out, err = cut_albert(tiny, tmp_path, count, num_hidden_groups=1)
    assert code == 2 and said in err and "nothing to choose" in err and out == ""
    assert not (tmp_path / "student").exists()


def test_all_layers_are_one_choice(tiny, tmp_path):
    argv = ["init-student", f"--teacher={tiny.teacher}", "--layers=search:4", f"--text={tiny.text}"]
    code, _, err = tiny_run.call(cli.main, [*argv, f"--out={tmp_path / 'out'}"])
    assert code == 2 and "there is one student of 4 layers alone" in err


def test_a_choice_of_each_student_that_an_albert_gives():
    config = tiny_models.config("albert", num_hidden_layers=6, num_hidden_groups=3)
    assert albert_choices(config, 1) == [(0,), (2,), (4,)]
    assert albert_choices(config, 2) == [(0, 1), (2, 3), (4, 5), (0, 2), (0, 4), (2, 4)]
    assert albert_choices(config, 3) == [(0, 2, 4)]
    assert albert_choices(config, 4) == [(0, 1, 2, 3), (0, 1, 4, 5), (2, 3, 4, 5)]
    for count in range(1, 7):
        for layers in albert_choices(config, count):
            assert student_config(config, family="albert", layers=layers).num_hidden_layers == count


@pytest.mark.slow
def test_a_search_scores_each_student_of_an_albert_once(tiny, tmp_path):
    code, out, err = cut_albert(tiny, tmp_path, 2, num_hidden_groups=2)
    assert code == 0, err
    made = json.loads(out)
    assert {tuple(one["layers"]) for one in made["candidates"]} == {(0, 1), (2, 3), (0, 2)}
    assert made["layers"] == made["candidates"][0]["layers"]
