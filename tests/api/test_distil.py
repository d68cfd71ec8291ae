"""Runs from a Python program: text in memory, callbacks, losses of its own, figures as rows, errors that are raised."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

import jaxdistill
from jaxdistill.api import distil
from jaxdistill.api import text as texts
from jaxdistill.errors import UserError
from jaxdistill.losses.term import Signals

SHORT = {"data.max_length": 32, "data.min_tokens": 4, "data.buckets": (32,), "train.batch_size": 16, "mask.group": 2}
SHORT |= {"evaluate.batches": 2, "evaluate.batch_size": 8, "log.every": 1, "train.steps": 4, "checkpoint.every": 2}
SHORT |= {"mask.smoothing": 0.0}  # so that masks do not depend on which text is counted


def settings(tiny: tiny_run.Tiny, **values: Any) -> dict[str, Any]:
    cache = {"data.cache_dir": str(tiny.folder / "cache")}
    return {**SHORT, **cache, **{key.replace("__", "."): value for key, value in values.items()}}


def logit_distance(x: Any) -> Any:
    return jnp.abs(x.student.logits - x.teacher.logits).mean(-1)


@pytest.fixture(scope="module")
def run(tiny):
    """A run with everything that a program can add, and what its callbacks saw."""
    seen: dict[str, list] = {"step": [], "eval": [], "checkpoint": []}
    lines = tiny.text.read_text().splitlines()
    done = jaxdistill.distil(
        teacher=str(tiny.teacher),
        student=jaxdistill.cut(str(tiny.teacher), [0, 2]),
        text=lines[:180],
        held_out=lines[180:],
        settings=settings(tiny),
        losses={"distance": (logit_distance, 0.5)},
        on_step=lambda step, figures: seen["step"].append((step, figures)),
        on_evaluation=lambda step, figures: seen["eval"].append((step, figures)),
        on_checkpoint=lambda step, folder: seen["checkpoint"].append((step, (folder / "student").is_dir())),
        workdir=tiny.folder / "from-python",
    )
    return done, seen


@pytest.mark.slow
def test_a_run_from_python(tiny, run):
    done, seen = run
    assert not done.stopped and done.figures["perplexity"] > 1
    assert seen["checkpoint"] == [(2, True), (4, True)]  # whole when the callback sees it
    assert [step for step, _ in seen["eval"]] == [0, 4]
    trained = [record for record in done.metrics if record["kind"] == "train"]
    assert [step for step, _ in seen["step"]] == [record["step"] for record in trained] == [1, 2, 3, 4]
    for record in trained:
        parts = 5 * record["ce"] + 2 * record["mlm"] + record["cos"] + 0.5 * record["distance"]
        assert record["loss"] == pytest.approx(parts, rel=1e-5)
    config = json.loads((done.workdir / "config.json").read_text())
    assert config["student"]["layers"] == [0, 2] and config["data"]["source"] == "jsonl"
    assert Path(config["data"]["path"]).parent == done.workdir / "text"


@pytest.mark.slow
def test_own_loss_alone_is_its_gradient_by_hand(tiny):
    """An own loss that is the cross entropy of the labels trains to the bits of nearly the same run with alpha_mlm."""

    def cross_entropy(x: Any) -> Any:
        logits = x.student.logits.astype(jnp.float32)
        return -jnp.take_along_axis(
            jnp.log(jnp.exp(logits) / jnp.exp(logits).sum(-1, keepdims=True)), x.labels[..., None], -1
        )[..., 0]

    off = {"loss.alpha_ce": 0.0, "loss.alpha_cos": 0.0, "loss.tokens": "labels", "train.steps": 2}
    ran = []
    for name, weight, losses in (("by-setting", 2.0, {}), ("own", 0.0, {"own": (cross_entropy, 2.0)})):
        ran.append(
            jaxdistill.distil(
                teacher=str(tiny.teacher),
                text=tiny.text,
                settings=settings(tiny, **{"loss.alpha_mlm": weight}) | off,
                losses=losses,
                workdir=tiny.folder / name,
            )
        )
    kept = [[record["loss"] for record in one.metrics if record["kind"] == "train"] for one in ran]
    assert kept[0] == pytest.approx(kept[1], rel=1e-4)


@pytest.mark.slow
def test_a_run_goes_on_with_the_own_losses_that_it_was_begun_with(tiny):
    workdir = tiny.folder / "own-loss"
    common: dict[str, Any] = {"teacher": str(tiny.teacher), "text": tiny.text, "workdir": workdir}
    steps = {"optim.schedule": "constant", "optim.warmup": 0.0}
    jaxdistill.distil(
        **common, settings=settings(tiny, train__steps=2) | steps, losses={"distance": (logit_distance, 0.5)}
    )
    with pytest.raises(UserError, match=r"begun with the program's own loss distance x 0.5, and now there is no loss"):
        jaxdistill.distil(**common, settings=settings(tiny) | steps)


@pytest.mark.slow
def test_a_callback_stops_a_run_which_goes_on(tiny):
    workdir = tiny.folder / "stopped"
    common: dict[str, Any] = {"teacher": str(tiny.teacher), "text": tiny.text, "workdir": workdir}
    common["settings"] = settings(tiny, train__steps=6)

    class Own(Exception):
        pass

    def raises(step: int, figures: Any) -> None:
        if step == 2:
            raise Own

    with pytest.raises(Own):
        jaxdistill.distil(**common, on_step=raises)
    first = jaxdistill.distil(**common, on_checkpoint=lambda step, folder: step == 4)
    assert first.stopped and first.metrics[-1]["step"] == 5
    whole = jaxdistill.distil(**common)
    assert not whole.stopped
    assert [record["step"] for record in whole.metrics if record["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_figures_of_models(tiny, run):
    done, _ = run
    figures = jaxdistill.evaluate(done.student)
    last = [record for record in done.metrics if record["kind"] == "eval"][-1]
    assert figures == pytest.approx({name: last[name] for name in figures})
    lines = tiny.text.read_text().splitlines()[180:]
    student = jaxdistill.cut(str(tiny.teacher), [0, 2])
    begun = jaxdistill.evaluate(student, lines, settings=settings(tiny))
    assert begun["kl"] == pytest.approx(done.metrics[0]["kl"], rel=1e-4)
    alone = jaxdistill.evaluate(str(tiny.teacher), lines, metrics=["perplexity"], settings=settings(tiny))
    assert alone["perplexity"] == pytest.approx(begun["teacher_perplexity"], rel=1e-4)


def test_errors_are_raised_before_anything_is_written(tiny, tmp_path):
    common: dict[str, Any] = {"teacher": str(tiny.teacher), "text": tiny.text, "workdir": tmp_path / "run"}
    own = {"needs": jaxdistill.Loss(logit_distance)}
    for wrong, message in (
        ({"settings": {"train.step": 3}}, r"unknown config key 'train.step'; did you mean 'train.steps'"),
        ({"settings": {"train.steps": "3"}}, r"config.train.steps='3'"),
        ({"losses": {"ce": (logit_distance, 1.0)}}, r"losses holds 'ce'"),
        ({"losses": {"mine": (logit_distance, -1.0)}}, r"weight -1.0; it must be a number above 0"),
        ({"losses": own, "teacher": None, "student": str(tiny.teacher)}, r"losses\['needs'\] needs a teacher"),
        ({"teacher": str(tmp_path), "student": jaxdistill.cut(str(tiny.teacher), 2)}, r"the student is cut from"),
        ({"workdir": "ftp://host/run"}, r"ftp://host/run: addresses begin with gs:// or s3://"),
        ({"config": 3}, r"config is of type int; it must be a recipe"),
        ({"held_out": ["one"]}, r"give both in the same way"),
        ({"text": ["one"], "settings": {"train.steps": -1}}, r"config.train.steps=-1: must lie"),
    ):
        with pytest.raises(UserError, match=message):
            jaxdistill.distil(**{**common, **wrong})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([logit_distance], r"losses is of type list; give a dictionary"),
        (
            {"mine": logit_distance},
            r"is <function .*; give \(function, weight\), or a jaxdistill.Loss",
        ),
        ({"mine": (3, 1.0)}, r"losses\['mine'\] is 3; give a function"),
        ({"mine": (logit_distance, "1")}, r"has the weight '1'; it must be a number above 0"),
        ({"mine": (logit_distance, math.nan)}, r"has the weight nan; it must be a number above 0"),
        (
            {"mine": (logit_distance, 1.0, "logit")},
            r"sees 'logit'; a loss sees one of logits, hidden",
        ),
        ({3: (logit_distance, 1.0)}, r"losses holds 3: a name must be a Python name"),
    ],
)
def test_a_loss_that_is_none_is_refused(losses, message):
    """By the function that takes any value: under tests, annotations are checked before `distil` is called."""
    with pytest.raises(UserError, match=message):
        distil._own_losses(losses)


def test_arguments_of_another_type_are_refused():
    with pytest.raises(UserError, match="settings is of type list; give a dictionary"):
        distil._given(["train.steps"])
    with pytest.raises(UserError, match="settings has the key 3; give dotted keys"):
        distil._given({3: 100})
    with pytest.raises(UserError, match="text is of type int; give a path, or texts"):
        next(texts._rows(3, "text", column="text", prompt_column=""))


def test_a_loss_of_another_shape_is_named():
    masks: Any = {"head": np.ones((2, 4), bool), "tokens": np.ones((2, 3), bool)}
    signals = Signals(student=cast(Any, None), teacher=None, labels=masks["head"], masks=masks, projections={})
    for sees, shape in (("logits", (2, 4)), ("hidden_states", (2, 3))):
        own = {"right": (lambda x, shape=shape: np.ones(shape), 1.0, sees), "wrong": (lambda x: np.ones(()), 1.0, sees)}
        right, wrong = (cast(Any, one.row.per_token) for one in distil._own_losses(own).values())
        assert right(None, signals).shape == shape
        with pytest.raises(UserError, match=r"losses\['wrong'\] returns the shape \(\); it must return one value"):
            wrong(None, signals)


ROWS = ["the cat\nsees", "a “dog”"]


def in_memory(kind: str) -> tuple[Any, dict[str, str]]:
    if kind == "list":
        return ROWS, {}
    if kind == "generator":
        return iter(ROWS), {}
    if kind == "rows":
        return [{"body": row, "id": 1} for row in ROWS], {"column": "body"}
    if kind == "datasets":
        import datasets

        return datasets.Dataset.from_dict({"body": ROWS}), {"column": "body"}
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"body": ROWS, "id": [1, 2]})
    return (frame["body"], {}) if kind == "series" else (frame, {"column": "body"})


@pytest.mark.parametrize("kind", ["list", "generator", "rows", "datasets", "series", "frame"])
def test_text_in_memory(kind, tmp_path):
    text, columns = in_memory(kind)
    named, files = texts.settings_of(
        text, held_out=None, **{"column": "text", "prompt_column": "", **columns}, folder=tmp_path
    )
    assert named["data.source"] == "jsonl" and named["data.prompt_column"] == ""
    assert not list(tmp_path.iterdir())
    texts.write(files)
    (path,) = tmp_path.iterdir()
    assert str(path) == named["data.path"]
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == ROWS


def test_pairs_and_what_is_no_text(tmp_path):
    def of(text: Any, held_out: Any = None, **columns: str) -> dict[str, Any]:
        return texts.settings_of(
            text, held_out=held_out, **{"column": "text", "prompt_column": "", **columns}, folder=tmp_path
        )[0]

    pairs = [("Why?", "Because.")]
    named = of(pairs)
    assert (named["data.prompt_column"], named["data.column"]) == ("prompt", "text")
    assert of([{"q": "Why?", "a": "Because."}], column="a", prompt_column="q") == named
    for text, message in (
        (["fine", float("nan")], r"text\[1\] is nan; it must be a text"),
        (["fine", None], r"text\[1\] is None"),
        ([], "text is empty"),
        (["fine", ("a", "b")], "both texts and pairs"),
        ([{"body": "x"}], r"text\[0\] is \(None,\)"),
        ({"train": ["x"]}, "text is a dict with train; give one of its values"),
    ):
        with pytest.raises(UserError, match=message):
            of(text)
    with pytest.raises(UserError, match="must both be texts, or both pairs"):
        of(["text"], pairs)


def test_importing_the_package_imports_no_library():
    code = (
        "import sys, jaxdistill\n"
        "assert 'distil' in dir(jaxdistill) and set(jaxdistill.__all__) <= set(dir(jaxdistill))\n"
        "print(*sorted({'jax', 'numpy', 'transformers', 'pydantic', 'flax'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_functions_are_not_hidden_by_folders_of_the_same_name():
    from jaxdistill.evaluate import EVALUATORS
    from jaxdistill.export.card import model_card

    assert callable(model_card) and "perplexity" in EVALUATORS
    for name in jaxdistill.__all__:
        assert getattr(jaxdistill, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'distill'"):
        _ = jaxdistill.distill
