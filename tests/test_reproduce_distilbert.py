"""The report of scripts/reproduce_distilbert.py, from figures that are made up, and one short run by its command."""

import argparse
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from experiment import folder_of

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "reproduce_distilbert.py"
LOST = {"without the divergence": 0.03, "without the cosine": 0.01, "random start": 0.12}


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


def test_the_report(script, tmp_path, monkeypatch):
    """The arm that loses most by the paper comes first, and its loss here is a mean over seeds."""
    for seed in (0, 1):
        for arm in script["PARTS"]:
            folder = folder_of(tmp_path, seed, arm)
            folder.mkdir(parents=True)
            figures = dict.fromkeys(script["COLUMNS"].values(), 1.0 + seed)
            figures |= {"mlm_accuracy": 0.5 - LOST.get(arm, 0) * (1 + 0.1 * seed), "teacher_mlm_accuracy": 0.75}
            (folder / "result.json").write_text(json.dumps(figures))
            losses = {"mlm_loss": 2.5, "teacher_mlm_loss": 2.0}
            lines = [{"step": step, "kind": "eval", **losses} for step in (0, 1, 2)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setitem(script["report"].__globals__, "size_and_time", lambda flags: ["teacher 2 M", "student 1 M"])
    out = tmp_path / "results.md"
    flags = argparse.Namespace(workdir=tmp_path, out=out, length=64, section="distilbert")
    flags.arms = ";".join(script["PARTS"])
    script["report"](flags)
    lines = out.read_text().splitlines()
    assert any(line.startswith("| teacher |  | 0.750 |") and line.endswith("| 2.000 |  |") for line in lines)
    order = lines[next(i for i, line in enumerate(lines) if "GLUE score" in line) + 2 :][:4]
    assert order == [
        "| random start | -3.69 | -12.60 |",
        "| without the divergence | -2.96 | -3.15 |",
        "| without the cosine | -1.46 | -1.05 |",
        "| without masked language modelling | -0.31 | +0.00 |",
    ]
    assert (tmp_path / "distilbert.png").read_bytes().startswith(b"\x89PNG")


def test_the_full_size_is_that_of_the_paper_and_says_what_it_takes(script):
    """8 arms x 3 seeds x 50,000 updates x 256 rows x 128 tokens, at 3.2 hours a billion tokens."""
    given = ["--full", "--train=a", "--valid=b", "--test=c", "--workdir=w"]
    flags = script["flags_of"](given)
    assert (flags.teacher, flags.student_layers, flags.dtype) == ("bert-base-uncased", 6, "bfloat16")
    assert script["size_of"](flags) == "24 runs of 1.6 billion tokens, some 126 hours of one H200"
    flags = script["flags_of"]([*given, "--steps=5", "--teacher=mine"])
    assert (flags.teacher, flags.steps, flags.rows) == ("mine", 5, 256)
    assert script["flags_of"](given[1:]).steps == 1000


@pytest.mark.weekly  # an arm is a run of bert_mlm with other settings, and a measurement by `evaluate`
def test_arms_of_other_methods_run_and_are_measured(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("We must work for peace and for the good of all nations of the world today.\n" * 200)
    same = [option for name in ("train", "valid", "test") for option in (f"--{name}", str(text))]
    steps = ["--student-layers", "2", "--seeds", "0", "--steps", "2", "--rows", "8", "--length", "32"]
    sizes = [*steps, "--batches", "1", "--pseudo-rows", "1"]
    narrow = ["--width", "64", "--inner", "256", "--heads", "2", "--relation-heads", "16"]
    arms = ["--arms", "self-attention relations;narrow by importance"]
    teacher = ["--teacher", str(ROOT / "configs" / "quickstart" / "teacher"), *arms, *narrow]
    command = [sys.executable, str(SCRIPT), *teacher, *same, *sizes, "--workdir", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "1 complete seed(s)" in done.stdout
    config = json.loads(
        (folder_of(tmp_path / "runs", 0, "narrow by importance") / "student" / "config.json").read_text()
    )
    assert (config["hidden_size"], config["num_hidden_layers"]) == (64, 4)
    found = json.loads((folder_of(tmp_path / "runs", 0, "self-attention relations") / "result.json").read_text())
    assert found["share"] == found["mlm_accuracy"] / found["teacher_mlm_accuracy"] and found["minutes"] > 0
