"""Mistakes of users: exit code 2, one line that names the rule and the value, and nothing written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_run

from jaxdistill import cli, train


@pytest.fixture(scope="module")
def run(tiny):
    workdir = tiny.folder / "run"
    tiny_run.train(tiny, workdir, train__steps=1, evaluate__metrics="('perplexity',)")
    return workdir


def refused(main, argv, *said: str) -> str:
    code, _, err = tiny_run.call(main, argv)
    assert code == 2, err
    assert err.endswith("\n") and err.splitlines()[-1].startswith("error: ") and err.count("error: ") == 1, err
    assert all(part in err for part in said), err
    return err


def refused_run(tiny, tmp_path, *said: str, **values) -> str:
    workdir = tmp_path / "run"
    err = refused(train.main, tiny_run.arguments(tiny, workdir, **values), *said)
    assert not workdir.exists()
    return err


@pytest.fixture
def text(tmp_path):
    def write(data: bytes, name: str = "text.txt") -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write


def test_unknown_key(tiny, tmp_path):
    refused_run(tiny, tmp_path, "'train.stesp'", "did you mean 'train.steps'", train__stesp=3)


def test_missing_recipe(tiny, tmp_path):
    refused(train.main, ["--config=nowhere.py", f"--workdir={tmp_path}/run"], "--config", "'nowhere.py'")


def test_missing_file(tiny, tmp_path):
    refused_run(tiny, tmp_path, "data.path", "'/nowhere/text.txt'", data__path="/nowhere/text.txt")


def test_a_glob_that_matches_nothing(tiny, tmp_path):
    refused_run(tiny, tmp_path, "data.path", "*.text", data__path=f"{tmp_path}/*.text")


def test_empty_file(tiny, tmp_path, text):
    path = text(b"")
    refused_run(tiny, tmp_path, str(path), "empty", data__path=path)


def test_no_usable_text(tiny, tmp_path, text):
    refused_run(tiny, tmp_path, "no usable text", "3 documents", "4 tokens", data__path=text(b"a\nthe\n \ncat\n"))


def test_binary_file(tiny, tmp_path, text):
    path = text(b"the cat\n\x00\x01\x02")
    refused_run(tiny, tmp_path, str(path), "offset 8", data__path=path)


def test_no_such_column(tiny, tmp_path, text):
    path = text(b'{"body": "the cat"}\n', "text.jsonl")
    refused_run(tiny, tmp_path, "'text'", "'body'", "data.column", data__path=path, data__source="jsonl")


def test_one_row_leaves_nothing_to_hold_out(tiny, tmp_path, text):
    refused_run(tiny, tmp_path, "1 row", data__path=text(b"the cat sees a dog and a bird near the river\n"))


def test_truncated_gzip(tiny, tmp_path, text):
    import gzip

    path = text(gzip.compress(tiny.text.read_bytes())[:-20], "text.txt.gz")
    refused_run(tiny, tmp_path, str(path), data__path=path)


def test_a_folder_that_is_not_prepared_text(tiny, tmp_path):
    refused_run(tiny, tmp_path, "not a folder of prepared data", data__path="", data__prepared=tiny.teacher)


@pytest.mark.slow
def test_prepared_text_of_another_length(tiny, run, tmp_path):
    prepared = tiny.folder / "cache" / tiny_run.saved(run)["notes"]["text"]
    refused_run(
        tiny, tmp_path, "max_length 32", "16", data__prepared=prepared, data__max_length=16, data__buckets="(16,)"
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"student__layers": "[0,9]"}, ["9 is out of range", "0 to 3"]),
        ({"student__remat": "some"}, ["student.remat='some'", "dots"]),
        ({"teacher__attention": "cudnn"}, ["16 bits", "teacher.dtype=float32"]),
        ({"student__attention": "cudnn"}, ["16 bits", "student.dtype=float32"]),
        ({"teacher__attention": "cudnn", "teacher__dtype": "bfloat16"}, ["teacher.attention", "NVIDIA", "cpu"]),
        ({"student__attention": "cudnn", "student__dtype": "bfloat16"}, ["student.attention", "NVIDIA", "cpu"]),
        (
            {
                "student__attention": "cudnn",
                "student__dtype": "bfloat16",
                "data__max_length": 31,
                "data__buckets": "(31,)",
            },
            ["even", "data.max_length=31"],
        ),
        ({"student__layers": "[1,1]"}, ["1 is repeated"]),
        ({"student__layers": "[2,1]"}, ["ascend"]),
        ({"student__layers": "5"}, ["5 layers", "the teacher has 4"]),
        ({"student__layers": "all"}, ["'all'"]),
        ({"student__layers": "3.5"}, ["3.5"]),
        ({"loss__alpha_ce": 0, "loss__alpha_mlm": 0, "loss__alpha_cos": 0}, ["no loss is enabled"]),
        ({"train__batch_size": 8}, ["config.train.batch_size=8", "8 devices", "16"]),
        ({"mesh__data": 3}, ["config.mesh.data=3", "8 devices"]),
        ({"data__max_length": 64, "data__buckets": "(64,)"}, ["config.data.max_length=64", "teacher's", "40"]),
        ({"evaluate__metrics": "('bleu',)"}, ["'bleu'", "perplexity"]),
        ({"evaluate__pruned": "('first:9',)"}, ["config.evaluate.pruned", "student's 2 layers", "first:9"]),
        ({"evaluate__pruned": "('first:1',)", "evaluate__metrics": "('agreement',)"}, ["pruned", "perplexity"]),
        ({"student__layer_drop": "1.0"}, ["config.student.layer_drop=1.0", "below 1"]),
        ({"student__layer_drop_depth": "cubic"}, ["'cubic'", "constant, linear"]),
        ({"evaluate__prompts": "('no mask here',)"}, ["'no mask here'", "[MASK]"]),
        ({"evaluate__prompts": f"('{'the ' * 40}[MASK]',)"}, ["43 tokens", "40"]),
        ({"loss__alpha_hidden_mse": 1, "loss__layer_map": "((0,9),)"}, ["config.loss.layer_map", "(0, 9)", "-1 to 3"]),
        ({"loss__alpha_attention": 1, "loss__layer_map": "((-1,-1),)"}, ["config.loss.layer_map", "embeddings"]),
        ({"checkpoint__best": "kl", "evaluate__metrics": "('perplexity',)"}, ["best='kl'", "perplexity, mlm_loss"]),
        ({"checkpoint__best": "clm_loss"}, ["best='clm_loss'", "a bert", "perplexity, mlm_loss, kl"]),
        ({"checkpoint__best": "pseudo_perplexity"}, ["best='pseudo_perplexity'", "evaluate.metrics"]),
        ({"evaluate__metrics": "('agreement',)"}, ["best='perplexity'", "kl, ''"]),
        ({"checkpoint__keep_epochs": True, "checkpoint__every": 7}, ["keep_epochs", "every=7", "divisor of"]),
        ({"student__overrides": "{'hidden_dropout_prob': 1.5}"}, ["hidden_dropout_prob is 1.5", "between 0 and 1"]),
        ({"student__overrides": "{'attention_probs_dropout_prob': -0.1}"}, ["is -0.1", "between 0 and 1"]),
        ({"student__overrides": "{'hidden_dropout_prob': 1e999}"}, ["hidden_dropout_prob is inf"]),
        ({"train__freeze": "('nothing_has_this',)"}, ["config.train.freeze", "'nothing_has_this'"]),
        ({"train__freeze": "('^bert/',)"}, ["config.train.freeze", "'^bert/'", "student/bert/"]),
        ({"train__freeze": "('.',)"}, ["config.train.freeze", "every parameter of the student"]),
        ({"optim__no_decay": "('LayerNorm/weight',)"}, ["config.optim.no_decay", "student/bert/"]),
        ({"student__init": "random", "student__overrides": "{'hiden_size':8}"}, ["'hiden_size'", "'hidden_size'"]),
        ({"student__init": "random", "student__overrides": "{'hidden_size':9}"}, ["9", "2 heads"]),
        ({"student__init": "random", "student__overrides": "{'vocab_size':7}"}, ["vocabular"]),
        ({"teacher__name": "no/such/thing/at/all"}, ["no/such/thing/at/all", "no such folder"]),
        ({"teacher__name": "nobody/no-such-model"}, ["nobody/no-such-model", "network"]),
        ({"tokenizer__name": "nobody/no-such-tokenizer"}, ["nobody/no-such-tokenizer", "network"]),
        ({"data__token_counts": "nowhere.npy"}, ["token counts", "nowhere.npy"]),
        ({"log__wandb": "project"}, ["config.log.wandb", "jaxdistill[wandb]"]),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items())[:60] if isinstance(value, dict) else "",
)
def test_values_that_do_not_fit_the_models(tiny, tmp_path, monkeypatch, values, said):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find(name, *rest))
    refused_run(tiny, tmp_path, *said, **values)


def model(tiny, folder: Path, **fields) -> Path:
    from transformers import AutoTokenizer

    return tiny_run.write_model(folder, AutoTokenizer.from_pretrained(tiny.teacher), **fields)


def test_vocabularies_that_differ(tiny, tmp_path):
    """With the teacher's tokenizer beside it, a larger student is only padded; without one, nothing says so."""
    student = model(tiny, tmp_path / "student", num_hidden_layers=1, vocab_size=300)
    for file in [*student.glob("*token*"), *student.glob("vocab*")]:
        file.unlink()
    refused_run(tiny, tmp_path, "vocabularies differ", "300", "save the student's tokenizer", student__name=student)


@pytest.mark.slow
def test_a_tokenizer_that_does_not_fit_the_model(tiny, tmp_path):
    teacher = model(tiny, tmp_path / "teacher", vocab_size=50)
    refused_run(tiny, tmp_path, "tokenizer does not fit the model", "50 entries", teacher__name=teacher)
    refused_run(tiny, tmp_path, "tokenizer does not fit the model", "50 entries", student__name=teacher)


@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_truncated_safetensors(tiny, tmp_path, left):
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny.teacher, teacher)
    file = teacher / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    refused_run(tiny, tmp_path, str(file), "truncated or damaged", teacher__name=teacher)


@pytest.mark.slow
def test_a_pickle_is_read_only_when_that_is_allowed(tiny, tmp_path):
    import torch
    from safetensors.numpy import load_file

    teacher = tmp_path / "teacher"
    shutil.copytree(tiny.teacher, teacher)
    file = teacher / "model.safetensors"
    tensors = {name: torch.tensor(np.array(array)) for name, array in load_file(file).items()}
    file.unlink()
    torch.save(tensors, teacher / "pytorch_model.bin")
    values = {"teacher__name": teacher, "train__steps": 1, "evaluate__metrics": "('perplexity',)"}
    refused_run(tiny, tmp_path, "pytorch_model.bin", "--allow-pickle", **values)
    workdir = tmp_path / "run"
    assert train.main([*tiny_run.arguments(tiny, workdir, **values), "--allow-pickle"]) == 0
    refused(cli.main, ["evaluate", f"--workdir={workdir}"], "--allow-pickle")
    # A pickle that would run code is refused even then.
    (teacher / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    other = tmp_path / "other"
    refused(train.main, [*tiny_run.arguments(tiny, other, **values), "--allow-pickle"], "pytorch_model.bin")
    assert not other.exists() and not Path("owned").exists()


def test_a_folder_without_a_model(tiny, tmp_path):
    refused_run(tiny, tmp_path, "config.json", teacher__name=tmp_path)


@pytest.mark.slow
def test_workdir_of_another_config(tiny, run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    before = tiny_run.bits(workdir)
    values = {"train__steps": 1, "evaluate__metrics": "('perplexity',)", "optim__learning_rate": 0.1}
    refused(
        train.main, tiny_run.arguments(tiny, workdir, **values),
        str(workdir), "config.optim.learning_rate=0.0005", "0.1", "--workdir",
    )  # fmt: skip
    assert tiny_run.bits(workdir) == before


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b'{"model_type": "bert"}', None])
def test_a_workdir_that_is_none(tiny, tmp_path, content):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "keep.txt").write_text("precious")
    if content is None:
        (workdir / "checkpoints").mkdir()
    else:
        (workdir / "config.json").write_bytes(content)
    before = tiny_run.bits(workdir)
    refused(train.main, tiny_run.arguments(tiny, workdir), str(workdir), "name another --workdir")
    assert tiny_run.bits(workdir) == before


def test_a_workdir_that_is_a_file(tiny, tmp_path):
    (tmp_path / "run").write_text("precious")
    refused(train.main, tiny_run.arguments(tiny, tmp_path / "run"), "is a file")
    assert (tmp_path / "run").read_text() == "precious"


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_a_workdir_that_is_not_there(tmp_path, command):
    rest = ["--to-pytorch", f"--out={tmp_path}/out"] if command == "export" else []
    refused(cli.main, [command, f"--workdir={tmp_path}/run", *rest], f"{tmp_path}/run", "no run folder")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_without_a_checkpoint(run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    shutil.rmtree(workdir / "checkpoints")
    refused(cli.main, ["evaluate", f"--workdir={workdir}"], "no checkpoint yet")
    (workdir / "checkpoints").mkdir()
    refused(cli.main, ["evaluate", f"--workdir={workdir}"], "no checkpoint yet")


@pytest.mark.slow
def test_evaluate_refuses(run):
    before = tiny_run.bits(run)
    refused(cli.main, ["evaluate", f"--workdir={run}", "--metrics=bleu"], "--metrics", "'bleu'", "perplexity")
    refused(cli.main, ["evaluate", f"--workdir={run}", "--step=3"], "no checkpoint of step 3", "[1]")
    refused(cli.main, ["evaluate", f"--workdir={run}", "--config.data.pth=x"], "'data.pth'", "'data.path'")
    refused(cli.main, ["evaluate", f"--workdir={run}", "--config.data.path=/nowhere.txt"], "'/nowhere.txt'")
    assert tiny_run.bits(run) == before


@pytest.mark.slow
def test_export_refuses(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "keep.txt").write_text("precious")
    refused(cli.main, ["export", "--to-pytorch", f"--workdir={run}", f"--out={out}"], str(out), "exists")
    assert tiny_run.bits(out) == {"keep.txt": b"precious"}
    refused(cli.main, ["export", "--to-flax", f"--workdir={run}", f"--out={tmp_path}/x", "--step=7"], "step 7", "[1]")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_init_student_refuses(tiny, tmp_path):
    out = tmp_path / "out"
    command = ["init-student", f"--teacher={tiny.teacher}", f"--out={out}"]
    refused(cli.main, [*command, "--layers=0,9"], "9 is out of range")
    refused(cli.main, [*command, "--layers=2", "--family=gpt2"], "'gpt2'")
    refused(cli.main, [*command, "--layers=search"], "--text")
    refused(cli.main, [*command, "--layers=2", f"--text={tiny.text}"], "--text")
    refused(cli.main, [*command, "--layers=search:9", f"--text={tiny.text}"], "9", "the teacher has 4")
    refused(cli.main, [*command, "--layers=search", "--text=/nowhere.txt"], "'/nowhere.txt'")
    assert not out.exists()


def test_prepare_refuses(tiny):
    refused(cli.main, ["prepare", f"--config={tiny.recipe}", "--config.data.path=/nowhere.txt"], "'/nowhere.txt'")
    refused(cli.main, ["prepare", f"--config={tiny.recipe}", "--config.teacher.name=/nowhere"], "/nowhere")


def test_unknown_arguments(tiny, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.main([*tiny_run.arguments(tiny, Path("run")), "--stpes=3"])
    assert "unknown flag '--stpes'; settings are given as --config.KEY=VALUE" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["export", "--to-pytorch", "--workdir=run", "--out=out", "--config.train.steps=3"])
    assert "'--config.train.steps=3'" in capsys.readouterr().err


# In a mount namespace of its own, a process can mount and fill a small disk, which is gone when the process ends.
ON_A_SMALL_DISK = """
set -e
mount -t tmpfs -o size={size}k none {disk}
cd {disk}
trap 'find . -type f | sort > {listing}; df -k . | tail -1 >> {listing}' EXIT
"$@"
"""
PYTHON = "import sys; from {module} import main; sys.exit(main(sys.argv[1:]))"


def on_a_small_disk(tmp_path: Path, size: int, module: str, argv: list[str]) -> tuple[int, str, list[str]]:
    """(exit code, stderr, files left) of an entry point that runs on a tmpfs of `size` KB, at tmp_path / "disk"."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("a small disk is a tmpfs in a mount namespace, which needs root and unshare")
    disk, listing = tmp_path / "disk", tmp_path / "listing"
    disk.mkdir()
    script = ON_A_SMALL_DISK.format(size=size, disk=disk, listing=listing)
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script, "-", sys.executable, "-c", PYTHON.format(module=module), *argv],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    return done.returncode, done.stderr, listing.read_text().splitlines()[:-1]


def assert_said(err: str, *said: str) -> None:
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert all(part in line for part in said), line
    assert "Traceback" not in err, err


@pytest.mark.slow
def test_disk_full_while_preparing(tiny, tmp_path):
    text = tiny_run.write_text(tmp_path / "long.txt", tiny_run.lines(8000))
    argv = [
        "prepare",
        f"--config={tiny.recipe}",
        f"--config.data.path={text}",
        f"--config.data.cache_dir={tmp_path}/disk",
    ]
    code, err, left = on_a_small_disk(tmp_path, 100, "jaxdistill.cli", argv)
    assert code == 2, err
    assert_said(err, "No space left on device", f"{tmp_path}/disk")
    assert [name for name in left if not name.endswith(".lock")] == []


@pytest.mark.slow
def test_disk_full_at_the_first_files(tiny, tmp_path):
    argv = tiny_run.arguments(tiny, tmp_path / "disk" / "run")
    code, err, left = on_a_small_disk(tmp_path, 8, "jaxdistill.train", argv)
    assert code == 2, err
    assert_said(err, "No space left on device", f"{tmp_path}/disk/run")
    assert "./run/config.json" not in left  # so that the next start is a new run


@pytest.mark.slow
def test_disk_full_at_a_checkpoint(tiny, tmp_path):
    argv = tiny_run.arguments(
        tiny, tmp_path / "disk" / "run", checkpoint__every=1, checkpoint__keep=99, train__steps=20
    )
    code, err, left = on_a_small_disk(tmp_path, 1600, "jaxdistill.train", argv)
    assert code == 2, err
    assert_said(err, "full", f"{tmp_path}/disk/run/checkpoints", "the last whole checkpoint is step ")
    whole = {name.split("/")[3] for name in left if name.startswith("./run/checkpoints/") and "tmp" not in name}
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    last = int(line.split("the last whole checkpoint is step ")[1].split(".")[0])
    assert last == max(int(name) for name in whole if name.isdigit()) >= 1


@pytest.mark.slow
def test_disk_full_at_an_export(tiny, run, tmp_path):
    argv = ["export", "--to-pytorch", f"--workdir={run}", f"--out={tmp_path}/disk/student"]
    code, err, left = on_a_small_disk(tmp_path, 24, "jaxdistill.cli", argv)
    assert code == 2, err
    assert_said(err, "No space left on device", f"{tmp_path}/disk/student")
    assert left == []


def test_figures_of_a_full_disk(tmp_path, monkeypatch):
    """metrics.jsonl on a device that is always full."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    from jaxdistill.errors import UserError
    from jaxdistill.run import writers

    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr(Path, "exists", lambda path: False)  # /dev/full can be read without end
    write, close = writers.jsonl(tmp_path / "metrics.jsonl", resume_at=0)
    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: No space left on device"):
        write(1, "train", {"loss": 1.0})
    close()


def test_a_torn_last_line_is_dropped(tmp_path):
    from jaxdistill.run import writers

    path = tmp_path / "metrics.jsonl"
    write, close = writers.jsonl(path, resume_at=0)
    for step in range(1, 5):
        write(step, "train", {"loss": 0.5})
    close()
    path.write_bytes(path.read_bytes()[:-9])
    write, close = writers.jsonl(path, resume_at=4)
    write(4, "train", {"loss": 0.25})
    close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_best_on_a_figure_of_a_teacher_that_is_not_there(tiny, tmp_path):
    values = {"teacher__name": "", "student__name": tiny.teacher, "checkpoint__best": "kl"}
    refused_run(tiny, tmp_path, "best='kl'", "without a teacher", "perplexity, mlm_loss, ''", **values)


def test_a_teacher_with_a_dropout_that_is_none(tiny, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny.teacher, teacher)
    fields = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(fields | {"hidden_dropout_prob": 7.0}))
    refused_run(tiny, tmp_path, "hidden_dropout_prob is 7.0", teacher__name=teacher)


@pytest.mark.slow
def test_an_evaluation_that_is_not_finite(tiny, tmp_path):
    from safetensors.numpy import load_file, save_file

    teacher = tmp_path / "teacher"
    shutil.copytree(tiny.teacher, teacher)
    tensors = load_file(teacher / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layer.1.output.dense.weight"))
    tensors[name] = np.full_like(tensors[name], 3e38)  # finite, but sums of it are not
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    values = {"teacher__name": teacher, "student__layers": "[0,2]"}
    said = ["kl is nan in the evaluation of step 0", "there is no good checkpoint", "check its weights"]
    code, _, err = tiny_run.call(train.main, tiny_run.arguments(tiny, tmp_path / "run", **values))
    line = err.splitlines()[-1]
    assert code == 2 and line.startswith("error: ") and all(part in line for part in said), err
    assert tiny_run.records(tmp_path / "run") == []


def test_metrics_are_json_whatever_the_figures_are(tmp_path):
    from jaxdistill.run import writers

    write, close = writers.jsonl(tmp_path / "metrics.jsonl", resume_at=0)
    write(1, "train", {"loss": 1.0, "a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": 0.5})
    close()
    strange: list[str] = []
    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=strange.append)
    assert strange == [] and {name: record[name] for name in "abcd"} == {"a": None, "b": None, "c": None, "d": 0.5}
