"""Values on the command line, and recipes, that can mean nothing: refused while the recipe is read, in one line."""

from pathlib import Path

import pytest
import tiny_run
from refusal import refused

from jaxdistill import cli, recipe
from jaxdistill.run import mirror

RECIPE = """
from jaxdistill.config import base


def get_config(variant=""):
    config = base()
    config.teacher.name = "teacher"
    config.data.path = "text"
    return config
"""


@pytest.fixture
def read(tmp_path):
    def read(*overrides, text=RECIPE):
        (tmp_path / "recipe.py").write_text(text)
        return recipe.read(str(tmp_path / "recipe.py"), [f"--config.{override}" for override in overrides])

    return read


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("loss.end=[1]", "config.loss.end"),
        ("loss.end={1: 2}", "config.loss.end"),
        ("loss.end={'temperature': 'x'}", "config.loss.end"),
        ("loss.end={'alpha_ce': [1]}", "config.loss.end"),
        ("student.overrides=[1]", "config.student.overrides"),
        ("student.overrides=3", "config.student.overrides"),
        ("student.overrides={1: 2}", "config.student.overrides"),
        ("train.batch_size=1099511627776", "config.train.batch_size=1099511627776: must lie between 1 and 1048576"),
        ("train.batch_size=2**40", "train.batch_size"),
        ("evaluate.batch_size=1099511627776", "config.evaluate.batch_size"),
        ("train.steps=99999999999", "config.train.steps"),
        ("train.epochs=1e308", "config.train.epochs"),
        ("data.threads=1000000", "config.data.threads"),
        (
            "data.limit=99999999999999999999",
            "config.data.limit=99999999999999999999: must be a number of at most 64 bits",
        ),
        ("data.max_document_bytes=99999999999999999999", "64 bits"),
        ("checkpoint.keep=99999999999999999999", "64 bits"),
        ("data.buckets=(99999999999999999999,)", "64 bits"),
        ("optim.no_decay=('" + "(" * 5000 + "',)", "config.optim.no_decay"),
        ("train.steps.x=3", "'train.steps.x'"),
        ("=3", "''"),
    ],
)
def test_values_that_mean_nothing(read, override, said):
    refused(lambda: read(override), said)


@pytest.mark.parametrize("command", ["generate", "init-student"])
def test_a_seed_of_more_than_64_bits(tmp_path, command):
    folder = tiny_run.write_model(tmp_path / "model", tiny_run.make_tokenizer(["the session"]), kind="gpt2")
    (tmp_path / "prompts").write_text("the\n")
    flags = {
        "generate": [f"--model={folder}", f"--input={tmp_path / 'prompts'}"],
        "init-student": [f"--teacher={folder}", "--layers=1", f"--out={tmp_path / 'out'}"],
    }
    for seed in (2**64, -(10**20)):
        code, _, err = tiny_run.call(cli.main, [command, *flags[command], f"--seed={seed}"])
        assert (code, err) == (2, f"error: seed is {seed}; it must be a number of at most 64 bits\n")


@pytest.mark.parametrize("name", ["~nosuchuser/x", "x" * 300, "a\0b"])
def test_a_name_with_a_revision(read, name):
    refused(lambda: read(f"teacher.name={name}", "teacher.revision=main"), "is not a path of this machine")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise SystemExit(3)", "line 1: SystemExit: 3"),
        ("def get_config(variant=''):\n    raise SystemExit(0)", "line 2: SystemExit"),
        ("def get_config(variant=''):\n    return get_config(variant)", "RecursionError"),
        ("x = " + "(" * 5000, "recipe.py"),
        ("\0", "recipe.py"),
    ],
)
def test_recipes_that_end_the_program(read, text, said):
    refused(lambda: read(text=text), said)


def test_names_of_recipes():
    for name in ("x" * 300 + ".py", "~nosuchuser/x.py", "a\0b.py"):
        refused(lambda name=name: recipe.read(name, []), "is not a path of this machine")


@pytest.mark.parametrize("name", ["~nosuchuser/x", "a\0b", "x" * 300])
@pytest.mark.parametrize(
    "argv", [["generate", "--model=x", "--input"], ["export", "--to-pytorch", "--workdir=x", "--out"]]
)
def test_flags_that_are_paths(argv, name):
    """~ is the home folder in them, as a shell leaves it in --out=~/student."""
    code, _, err = tiny_run.call(cli.main, [*argv[:-1], f"{argv[-1]}={name}"])
    assert code == 2 and err.startswith(f"error: {argv[-1]}={name!r} is not a path of this machine: ")


def test_a_run_folder_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert mirror.folder("~/run") == tmp_path / "run"
    assert mirror.folder("~nosuchuser/run") == Path("~nosuchuser/run")  # refused where it is read
