"""Tiny runs through the user's own commands, from text to a folder that plain PyTorch opens."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import grids
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from jaxdistill import cli, train
from jaxdistill import recipe as recipes
from jaxdistill.run import training
from jaxdistill.run.assemble import assemble

TEACHER_NAMES = {"teacher_mlm_loss", "teacher_perplexity", "teacher_mlm_accuracy"}
CLI_NAMES = {"mlm_loss", "perplexity", "mlm_accuracy", "kl", "top1", "top5", *TEACHER_NAMES}
PSEUDO_NAMES = {"pseudo_perplexity", "teacher_pseudo_perplexity"}
TRAIN_NAMES = {"step", "time", "kind", "loss", "ce", "mlm", "cos", "grad_norm", "learning_rate"}
TIMED_NAMES = {"tokens_per_s", "input_wait"}
PROMPT = "the cat [MASK] the dog."


@pytest.fixture(scope="module")
def run(tiny):
    """One run of the recipe, for all tests that only read its folder."""
    workdir = tiny.folder / "run"
    code, out, err = tiny_run.call(
        train.main, [*tiny_run.arguments(tiny, workdir, checkpoint__every=2, evaluate__prompts=(PROMPT,))]
    )
    assert code == 0, err
    (tiny.folder / "run.out").write_text(out)
    (tiny.folder / "run.err").write_text(err)
    return workdir


def figures_of(out: str) -> dict[str, float]:
    rows = [line.split() for line in out.splitlines()]
    return {row[0]: float(row[1]) for row in rows if len(row) == 2 and row[0] in CLI_NAMES | PSEUDO_NAMES}


def test_the_folder_of_a_run(run):
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock", "checkpoints", "config.json", "metrics.jsonl", "origin.json", "probe.json", "student",
    ]  # fmt: skip
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["2", "4"]
    assert not list(run.rglob("*.part"))


def test_what_is_said(tiny, run):
    err = (tiny.folder / "run.err").read_text().splitlines()
    (built,) = [line for line in err if line.startswith("teacher bert")]
    for part in ("-> student bert", "(layers 0,3)", "8 cpu device(s)", "tokens an epoch", "4 steps of 16 rows"):
        assert part in built
    assert [line for line in err if "warning" in line.lower()] == []
    assert all("\x1b" not in line for line in err)  # no terminal, no control codes
    prompt = err.index(PROMPT)
    assert err[prompt + 1].startswith("  teacher: ") and err[prompt + 2].startswith("  student: ")
    assert all(len(re.findall(r"\S+ \d+%", line)) == 5 for line in err[prompt + 1 : prompt + 3])


def test_metrics_have_stable_names(run):
    trained, evaluated = tiny_run.records(run, "train"), tiny_run.records(run, "eval")
    assert [record["step"] for record in trained] == [1, 2, 3, 4]
    assert [record["step"] for record in evaluated] == [0, 4]
    for record in trained:
        assert record.keys() - TIMED_NAMES == TRAIN_NAMES
        assert 0 <= record.get("input_wait", 0.0) <= 1
    assert all(record.keys() >= TIMED_NAMES for record in trained[1:])
    for record in evaluated:
        assert record.keys() == {"step", "time", "kind"} | CLI_NAMES
        assert math.isclose(record["perplexity"], math.exp(record["mlm_loss"]))
    assert all(math.isfinite(v) for r in trained + evaluated for k, v in r.items() if k != "kind")
    assert trained[0]["loss"] == pytest.approx(5 * trained[0]["ce"] + 2 * trained[0]["mlm"] + trained[0]["cos"])


def test_evaluate_gives_the_figures_of_the_run(run, tmp_path):
    path = tmp_path / "figures.json"
    code, out, err = tiny_run.call(cli.main, ["evaluate", f"--workdir={run}", f"--json={path}"])
    assert code == 0, err
    last = tiny_run.records(run, "eval")[-1]
    figures = json.loads(path.read_text())
    assert figures == pytest.approx({name: last[name] for name in CLI_NAMES}, rel=2e-6)
    # The command prints six digits, which is less than the tolerance of 2e-6 for figures near 1.
    assert figures_of(out) == {name: float(f"{value:.6g}") for name, value in figures.items()}
    assert [line for line in err.splitlines() if not line.startswith("reusing ")] == []


def test_evaluate_takes_a_step_metrics_and_a_file(run, tmp_path):
    before = tiny_run.bits(run)
    path = tmp_path / "figures.json"
    code, out, _ = tiny_run.call(
        cli.main,
        ["evaluate", f"--workdir={run}", "--step=2", "--metrics=pseudo_perplexity", f"--json={path}",
         "--config.evaluate.pseudo_rows=4"],
    )  # fmt: skip
    figures = json.loads(path.read_text())
    assert code == 0 and figures.keys() == PSEUDO_NAMES
    assert 1 < figures["pseudo_perplexity"] < 1000
    assert figures_of(out) == pytest.approx(figures, rel=1e-5)
    assert tiny_run.bits(run) == before


@pytest.mark.slow
def test_the_teachers_own_figures_are_those_of_the_teacher_measured_by_itself(tiny, run, tmp_path):
    """They stand beside the student's in every evaluation; any model is measured on the same masks."""
    evaluated = tiny_run.records(run, "eval")
    (own,) = {tuple(record[name] for name in sorted(TEACHER_NAMES)) for record in evaluated}  # it does not change
    argv = ["evaluate", f"--model={tiny.teacher}", "--metrics=perplexity", "--json"]
    for where in (f"--config={tiny.recipe}", f"--workdir={run}"):
        code, out, err = tiny_run.call(cli.main, [*argv, where])
        assert code == 0, err
        alone = json.loads(out)
        assert [alone[name.removeprefix("teacher_")] for name in sorted(TEACHER_NAMES)] == pytest.approx(own, rel=1e-6)
        assert alone["perplexity"] == pytest.approx(alone["teacher_perplexity"], rel=1e-6)
    # The student of the run, exported, has the figures that the run gave it.
    code, out, err = tiny_run.call(cli.main, ["evaluate", f"--model={run}", f"--config={tiny.recipe}", "--json"])
    assert code == 0 and json.loads(out) == pytest.approx({name: evaluated[-1][name] for name in CLI_NAMES}, rel=2e-6)


def test_perplexity_needs_no_teacher(run, tmp_path):
    gone = f"--config.teacher.name={tmp_path / 'gone'}"
    code, out, err = tiny_run.call(cli.main, ["evaluate", f"--workdir={run}", "--metrics=perplexity", "--json", gone])
    figures, last = json.loads(out), tiny_run.records(run, "eval")[-1]
    assert code == 0 and figures.keys() == CLI_NAMES - TEACHER_NAMES - {"kl", "top1", "top5"}
    assert figures == pytest.approx({name: last[name] for name in figures}, rel=2e-6)
    assert "without the teacher's own figures" in err and str(tmp_path / "gone") in err
    for metrics in ((), ("--metrics=agreement",)):
        code, _, err = tiny_run.call(cli.main, ["evaluate", f"--workdir={run}", *metrics, gone])
        assert code == 2 and "there is no such folder" in err


def test_the_best_step_is_named(tiny, run, tmp_path):
    """The last evaluation is that of the last step; one of an earlier step with a lower figure is then the best."""
    assert "the best checkpoint is that of step 4, with perplexity" in (tiny.folder / "run.err").read_text()
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    best = json.loads((copy / "checkpoints" / "4" / "notes" / "metadata").read_text())["metrics"]["perplexity"]
    change_notes(copy / "checkpoints" / "2", metrics={"perplexity": best / 2})
    code, out, _ = tiny_run.call(
        cli.main, ["export", "--to-flax", f"--workdir={copy}", f"--out={tmp_path / 'out'}", "--step=best", "--json"]
    )
    assert code == 0 and json.loads(out)["step"] == 2
    code, _, err = tiny_run.call(cli.main, ["evaluate", f"--workdir={copy}", "--step=worst"])
    assert code == 2 and "--step worst is no step" in err


def change_notes(checkpoint: Path, **values) -> None:
    """Writes other notes into a checkpoint, as the run itself would have written them."""
    from jaxdistill.run.checkpoint import _digest

    path = checkpoint / "notes" / "metadata"
    notes = {**json.loads(path.read_text()), **values}
    notes.pop("digest")
    path.write_text(json.dumps({**notes, "digest": _digest(notes)}))


def test_no_tensor_of_the_teacher_is_stored(tiny, run):
    """The teacher's layers 1 and 2 are in no checkpoint; the student's optimizer state is."""
    from safetensors.numpy import load_file

    teacher = load_file(tiny.teacher / "model.safetensors")
    saved = tiny_run.saved(run)
    stored = {array.tobytes() for name, array in saved.items() if name != "notes"}
    stored |= {array.T.tobytes() for name, array in saved.items() if name != "notes"}
    left_out = [name for name in teacher if ".layer.1." in name or ".layer.2." in name]
    assert len(left_out) == 32 and [name for name in left_out if teacher[name].tobytes() in stored] == []
    names = {re.match(r"student|rest\['\w+'\]", name)[0] for name in saved if name != "notes"}  # type: ignore[index]
    assert names == {"student", "rest['step']", "rest['opt_state']"}


@pytest.mark.slow
def test_export_opens_in_torch(run, tmp_path):
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

    from jaxdistill.models.inputs import Inputs
    from jaxdistill.models.intercept import apply
    from jaxdistill.run import folder as folders

    out = tmp_path / "exported" / "student"
    code, said, err = tiny_run.call(cli.main, ["export", "--to-pytorch", f"--workdir={run}", f"--out={out}"])
    assert code == 0 and f"exported step 4 of {run} to {out} (pytorch)" in said, err
    theirs = AutoModelForMaskedLM.from_pretrained(out).eval()
    ours = folders.load_student(run, report=print)
    inputs = AutoTokenizer.from_pretrained(out)(tiny_run.lines(8, seed=3), return_tensors="np", padding=True)
    ids, mask = inputs["input_ids"], inputs["attention_mask"].astype(bool)
    outputs = apply(ours.model, ours.params, Inputs(jnp.asarray(ids, jnp.int32), jnp.asarray(mask)))
    logits = np.asarray(outputs.logits)
    with torch.no_grad():
        got = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask.astype(int))).logits.numpy()
    np.testing.assert_allclose(got[mask], logits[mask], atol=1e-4)
    assert len(pipeline("fill-mask", model=str(out))(PROMPT)) == 5
    card = (out / "README.md").read_text()
    assert f"| perplexity | {ours.figures['perplexity']:.4g} |" in card and '"temperature": 2.0' in card

    flax = tmp_path / "exported" / "flax"
    code, _, err = tiny_run.call(cli.main, ["export", "--to-flax", f"--workdir={run}", f"--out={flax}", "--step=2"])
    assert code == 0 and (flax / "flax_model.msgpack").is_file(), err
    assert sorted(path.name for path in out.parent.iterdir()) == ["flax", "student"]


@pytest.mark.slow
def test_stopped_and_run_again(tiny, run, tmp_path, monkeypatch):
    """The short form of test_resume."""
    workdir = tmp_path / "run"
    arguments = tiny_run.arguments(tiny, workdir, checkpoint__every=2, evaluate__prompts=(PROMPT,))  # as `run`
    with monkeypatch.context() as patch, pytest.raises(tiny_run.Stopped):
        tiny_run.stop_after(patch, 3)
        train.main(arguments)
    assert [record["step"] for record in tiny_run.records(workdir, "train")][-1] >= 2
    assert train.main(arguments) == 0
    tiny_run.assert_same_run(workdir, run)


@pytest.mark.slow
def test_prepare_then_train_from_the_prepared_folder(tiny, run, tmp_path):
    code, out, err = tiny_run.call(cli.main, ["prepare", f"--config={tiny.recipe}"])
    assert code == 0, err
    folder = Path(out.removesuffix("\n"))
    assert (folder / "tokens.bin").is_file() and folder.parent == tiny.folder / "cache"
    workdir = tmp_path / "run"
    tiny_run.train(tiny, workdir, data__path="", data__prepared=folder)
    a, b = tiny_run.saved(workdir), tiny_run.saved(run)
    assert all(a[name].tobytes() == b[name].tobytes() for name in a if name.startswith("student"))


def test_init_student(tiny, tmp_path):
    from safetensors.numpy import load_file

    out = tmp_path / "student"
    code, said, err = tiny_run.call(
        cli.main, ["init-student", f"--teacher={tiny.teacher}", "--layers=1,3", f"--out={out}"]
    )
    assert code == 0 and "layers 1,3" in said, err
    teacher, student = (load_file(folder / "model.safetensors") for folder in (tiny.teacher, out))
    for new, old in ((0, 1), (1, 3)):
        name = "bert.encoder.layer.{}.output.dense.weight"
        np.testing.assert_array_equal(student[name.format(new)], teacher[name.format(old)])


@pytest.mark.slow
def test_a_run_begins_from_the_folder_of_init_student(tiny, tmp_path):
    from safetensors.numpy import load_file

    out, workdir = tmp_path / "student", tmp_path / "run"
    argv = ["init-student", f"--teacher={tiny.teacher}", "--layers=1,3", f"--out={out}"]
    assert tiny_run.call(cli.main, argv)[0] == 0
    student = load_file(out / "model.safetensors")
    tiny_run.train(tiny, workdir, student__name=out, train__steps=1, optim__warmup=1.0)
    kernel = tiny_run.saved(workdir)["student['bert']['encoder']['layer']['1']['output']['dense']['kernel']"]
    np.testing.assert_array_equal(kernel.T, student["bert.encoder.layer.1.output.dense.weight"])  # its rate was 0


@pytest.mark.weekly  # test_core_students and test_search have both by the logits
def test_the_figures_of_a_sub_network_are_those_of_the_student_cut_out(tiny, tmp_path):
    """Through the commands: measured in the whole model, then cut out, and measured again."""
    plain = {"student__layers": "[0,1,2,3]", "train__steps": 1, "optim__warmup": 1.0}  # its rate is 0
    whole = tmp_path / "whole"
    tiny_run.train(tiny, whole, **plain, evaluate__pruned="('every_other','first:1')")
    measured = tiny_run.records(whole, "eval")[-1]
    for spec in ("every_other", "first:1"):
        out = tmp_path / spec / "student"
        code, _, err = tiny_run.call(
            cli.main, ["init-student", f"--teacher={tiny.teacher}", f"--layers={spec}", f"--out={out}"]
        )
        assert code == 0, err
        code, printed, err = tiny_run.call(
            cli.main, ["evaluate", f"--model={out}", f"--config={tiny.recipe}", "--metrics=perplexity", "--json"]
        )
        assert code == 0, err
        cut = json.loads(printed)
        for name in ("mlm_loss", "perplexity"):
            assert measured[f"{name}/{spec}"] == pytest.approx(cut[name], rel=1e-6)
        assert measured["mlm_loss"] != pytest.approx(cut["mlm_loss"], rel=1e-3)


@pytest.mark.slow
def test_a_layer_drop_teacher_is_trained_cut_and_distilled(tiny, tmp_path):
    """The steps of configs/bert_layerdrop_teacher.py: train without a teacher, cut, open the cut in torch, distil."""
    from transformers import BertForMaskedLM

    scratch = {
        "model_type": "bert", "vocab_size": 200, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 40,
    }  # fmt: skip
    teacher, out = tmp_path / "teacher", tmp_path / "cut"
    tiny_run.train(
        tiny, teacher, teacher__name="", tokenizer__name=tiny.teacher, student__init="random",
        student__overrides=scratch, student__layer_drop=0.5, student__layer_drop_depth="linear",
        student__layer_drop_schedule="linear", evaluate__pruned="('every_other',)", train__steps=12,
        export__to="('pytorch',)",
    )  # fmt: skip
    depths = [record["layers"] for record in tiny_run.records(teacher, "train")]
    assert depths[0] == 3 and min(depths) < 3  # the rate grows from 0
    folder = teacher / "export-pytorch"
    assert tiny_run.call(
        cli.main, ["init-student", f"--teacher={folder}", "--layers=every_other", f"--out={out}"]
    )[0] == 0  # fmt: skip
    assert BertForMaskedLM.from_pretrained(out).config.num_hidden_layers == 2
    student = tmp_path / "student"
    tiny_run.train(tiny, student, teacher__name=folder, student__name=out, train__freeze="('position_embeddings',)")
    assert tiny_run.records(student, "eval")[-1]["step"] == 4


def test_a_student_of_another_vocabulary_is_refused(tiny, tmp_path):
    """The vocabulary has the teacher's size and other tokens, which a comparison of sizes would not notice."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.teacher)
    other = tmp_path / "student"
    tiny_run.write_model(other, tokenizer, num_hidden_layers=1)
    file = other / "tokenizer.json"
    vocabulary = json.loads(file.read_text())
    ids = vocabulary["model"]["vocab"]
    ids["cat"], ids["dog"] = ids["dog"], ids["cat"]
    file.write_text(json.dumps(vocabulary))
    workdir = tmp_path / "run"
    code, _, err = tiny_run.call(train.main, tiny_run.arguments(tiny, workdir, student__name=other))
    assert code == 2 and "vocabularies differ" in err and err.count("\n") == 1
    assert not workdir.exists()


@pytest.mark.slow
def test_a_student_from_another_run(tiny, run, tmp_path):
    workdir = tmp_path / "run"
    tiny_run.train(tiny, workdir, student__name=run, train__steps=1, optim__warmup=1.0)
    a, b = tiny_run.saved(workdir), tiny_run.saved(run)
    assert all(a[name].tobytes() == b[name].tobytes() for name in a if name.startswith("student"))


ALL_AT_ONCE = {
    "train__accumulation": 2,
    "train__batch_size": 32,
    "data__batching": "packed",
    "student__dtype": "bfloat16",
    "teacher__dtype": "bfloat16",
    "loss__tokens": "masked",
    "loss__alpha_mse": 0.1,
    "loss__alpha_hidden_mse": 1.0,
    "loss__alpha_hidden_cos": 1.0,
    "loss__alpha_attention": 1.0,
    "loss__layer_map": "((-1,-1),(0,1),(1,3))",
    "student__init": "random",
    "student__overrides": '{"hidden_size":8,"num_hidden_layers":2,"intermediate_size":12}',
    "train__freeze": "('embeddings',)",
    "log__tensorboard": True,
    "export__to": "('pytorch',)",
    "mesh__fsdp": 2,
}


@pytest.mark.slow
def test_everything_at_once(tiny, tmp_path):
    """Accumulation, bfloat16, packed rows, masked positions only, all losses, a narrower random student, fsdp."""
    workdir = tmp_path / "run"
    tiny_run.train(tiny, workdir, **ALL_AT_ONCE)
    trained = tiny_run.records(workdir, "train")
    names = {"loss", "ce", "mlm", "mse", "cos", "hidden_mse", "hidden_cos", "attention", "grad_norm", "learning_rate"}
    assert all(record.keys() - TIMED_NAMES - {"step", "time", "kind"} == names for record in trained)
    saved = tiny_run.saved(workdir)
    projections = {name for name in saved if name.startswith("rest['projections']")}
    assert len(projections) == 3  # one for each pair of the map; the last pair is also that of the last hidden states
    assert all(saved[name].shape == (8, 16) and saved[name].dtype == np.float32 for name in projections)
    assert {saved[name].dtype for name in saved if name.startswith("student")} == {np.dtype(np.float32)}
    assert [name for name in saved if "opt_state" in name and "embeddings" in name and saved[name].size > 1] == []
    # `evaluate` gives the figures that the run wrote, in the dtypes of the run.
    code, out, err = tiny_run.call(cli.main, ["evaluate", f"--workdir={workdir}"])
    assert code == 0, err
    last = tiny_run.records(workdir, "eval")[-1]
    assert figures_of(out) == pytest.approx({name: last[name] for name in CLI_NAMES}, rel=1e-4)
    # TensorBoard's file has the events, under the names of metrics.jsonl.
    (events,) = (workdir / "tensorboard").glob("events.out.tfevents.*")
    text = events.read_bytes()
    assert all(f"train/{name}".encode() in text for name in names) and b"eval/perplexity" in text
    # Started again, the run is finished and leaves its export as it is.
    before = tiny_run.bits(workdir / "export-pytorch")
    assert "model.safetensors" in before
    tiny_run.train(tiny, workdir, **ALL_AT_ONCE)
    assert tiny_run.bits(workdir / "export-pytorch") == before


@pytest.mark.slow
def test_without_a_teacher(tiny, tmp_path):
    workdir = tmp_path / "run"
    tiny_run.train(
        tiny,
        workdir,
        teacher__name="",
        tokenizer__name=tiny.teacher,
        student__init="random",
        student__overrides='{"model_type":"bert","vocab_size":200,"hidden_size":16,"num_hidden_layers":1,'
        '"num_attention_heads":2,"intermediate_size":16,"max_position_embeddings":40}',
        train__steps=60,
        optim__learning_rate=0.02,
        checkpoint__every=60,
        evaluate__every=60,
    )
    trained, evaluated = tiny_run.records(workdir, "train"), tiny_run.records(workdir, "eval")
    assert trained[0].keys() - TIMED_NAMES == TRAIN_NAMES - {"ce", "cos"}
    assert evaluated[-1].keys() == {"step", "time", "kind", "mlm_loss", "perplexity", "mlm_accuracy"}
    assert evaluated[-1]["mlm_loss"] < evaluated[0]["mlm_loss"] - 1  # it learns
    code, out, err = tiny_run.call(cli.main, ["evaluate", f"--workdir={workdir}"])
    assert code == 0 and figures_of(out).keys() == {"mlm_loss", "perplexity", "mlm_accuracy"}, err
    code, _, err = tiny_run.call(cli.main, ["evaluate", f"--workdir={workdir}", "--metrics=agreement"])
    assert code == 2 and "no teacher" in err
    code, _, err = tiny_run.call(cli.main, ["export", "--to-pytorch", f"--workdir={workdir}", f"--out={tmp_path}/out"])
    assert code == 0, err


def test_compiled_programs_are_kept_for_the_next_run(tmp_path):
    """As a user starts a run, without naming a cache: compiled programs are kept under the home folder."""
    code = "import jax; jax.jit(lambda x: x + 1)(1.0)"
    main = f"import sys; from jaxdistill import train; sys.exit(train.guarded(lambda: exec({code!r})))"
    env = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    env |= {"HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    env |= {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    subprocess.run([sys.executable, "-c", main], check=True, env=env)
    assert list((tmp_path / ".cache" / "jaxdistill" / "compiled").iterdir())


@pytest.mark.slow
def test_distilling_brings_the_student_to_its_teacher(tiny, tmp_path):
    workdir = tmp_path / "run"
    tiny_run.train(
        tiny, workdir, student__init="random", student__overrides='{"num_hidden_layers":2}', train__steps=80,
        loss__alpha_mlm=0.0, optim__learning_rate=0.01, evaluate__every=80, checkpoint__every=80, log__every=20,
    )  # fmt: skip
    first, last = tiny_run.records(workdir, "eval")
    assert last["kl"] < first["kl"] / 2 and last["top1"] > first["top1"]


@pytest.mark.weekly  # test_not_finite has such a run that goes on at a lower rate
def test_a_loss_that_is_not_finite_stops_the_run(tiny, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    make = training.make_train_step

    def make_breaking(*args, **arguments):
        step = make(*args, **arguments)

        def breaking(state, *inputs):
            if int(state.step) == 3:
                broken = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(np.nan), state.params)
                state = state._replace(params=broken)
            return step(state, *inputs)

        return breaking

    monkeypatch.setattr(training, "make_train_step", make_breaking)
    code, _, err = tiny_run.call(
        train.main, tiny_run.arguments(tiny, workdir, checkpoint__every=2, train__steps=6, evaluate__every=2)
    )
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "nan" in line and "at step 4" in line and "the last good checkpoint is that of step 2" in line
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2"]
    assert [record["step"] for record in tiny_run.records(workdir)][-1] == 3
    # From there the run goes on, once the cause is fixed.
    monkeypatch.undo()
    assert train.main(tiny_run.arguments(tiny, workdir, checkpoint__every=2, train__steps=6, evaluate__every=2)) == 0
    assert [record["step"] for record in tiny_run.records(workdir, "train")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_checkpoints_of_every_epoch_and_limits(tiny, tmp_path):
    workdir = tmp_path / "run"
    tiny_run.train(
        tiny, workdir, train__steps=0, train__epochs=3.0, train__limit_batches=2, checkpoint__keep_epochs=True,
        checkpoint__keep=1, checkpoint__best="", evaluate__metrics="('perplexity',)", log__every=4,
    )  # fmt: skip
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "4", "6"]
    assert [record["step"] for record in tiny_run.records(workdir, "eval")] == [0, 2, 4, 6]


@pytest.mark.slow
@pytest.mark.parametrize("gone", ["student", "rest"])
def test_a_run_whose_files_are_gone(run, tmp_path, gone):
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    for step in ("2", "4"):
        shutil.rmtree(workdir / "checkpoints" / step / gone)
    code, out, err = tiny_run.call(cli.main, ["evaluate", f"--workdir={workdir}"])
    assert code == (2 if gone == "student" else 0)  # evaluating reads the student alone
    if gone == "student":
        assert err.splitlines()[-1].startswith("error: no checkpoint in ") and out == ""
        assert err.count("is damaged") == 2


CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.py"))
# The recipes of the README's first commands, and that of a method which no other whole run trains; `quickstart` is
# trained by test_notebooks.
TRAINED = ("bert_mlm", "gpt2_kd", "minilmv2_bert")


def of_smoke(recipe, tmp_path):
    """The smoke variant and its flags; eight devices share its 16 rows."""
    flags = [f"--config.data.cache_dir={tmp_path / 'cache'}", "--config.mask.group=1"]
    return f"{CONFIGS / recipe}.py:smoke", flags


@pytest.mark.slow
@pytest.mark.parametrize("recipe", grids.everyday(RECIPES, *TRAINED))
def test_every_recipe_has_a_smoke_variant_that_runs_offline(recipe, tmp_path):
    name, flags = of_smoke(recipe, tmp_path)
    code, _, err = tiny_run.call(train.main, [f"--config={name}", f"--workdir={tmp_path / 'run'}", *flags])
    assert code == 0, err
    assert tiny_run.records(tmp_path / "run", "eval")[-1]["step"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe not in TRAINED])
def test_every_other_smoke_variant_is_made_ready_to_train(recipe, tmp_path):
    """Its text is prepared and its models are read, so that nothing is left but updates as in the runs above."""
    name, flags = of_smoke(recipe, tmp_path)
    assert assemble(recipes.read(name, flags), tmp_path / "run", allow_pickle=False).steps == 4
