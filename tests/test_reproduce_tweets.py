"""scripts/reproduce_tweets.py: its tokenizer, and one short experiment by its command."""

import argparse
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from experiment import folder_of

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "reproduce_tweets.py"
TWEETS = "lmao this is so good @user\nI can't even today lol so tired\nYeah we are all at the park af\n" * 60


def test_the_tokenizer_frames_texts_as_robertas(tmp_path):
    from jaxdistill.models.tokenizer import load_tokenizer

    (tmp_path / "tweets.txt").write_text(TWEETS)
    text = dict.fromkeys(("text", "tweets"), tmp_path / "tweets.txt")
    flags = argparse.Namespace(workdir=tmp_path, vocabulary=320)
    tokenizer = load_tokenizer(runpy.run_path(str(SCRIPT))["write_tokenizer"](flags, text))
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 4]) == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    ids = tokenizer("so <mask> lmao")["input_ids"]
    assert (ids[0], ids[-1], ids.count(tokenizer.mask_token_id)) == (0, 2, 1)


@pytest.mark.weekly  # each of its models is a run of a recipe
def test_base_teacher_and_student_are_made_measured_and_compared(tmp_path):
    (tmp_path / "tweets.txt").write_text(TWEETS)
    same = [option for name in ("tweets", "dev", "text") for option in (f"--{name}", str(tmp_path / "tweets.txt"))]
    sizes = ["--vocabulary", "320", "--width", "32", "--layers", "2", "--rows", "8", "--batches", "1", "--top", "2"]
    steps = ["--base-steps", "2", "--teacher-steps", "2", "--steps", "2", "--seeds", "0,1", "--arms", "student"]
    command = [sys.executable, str(SCRIPT), *same, *sizes, *steps, "--workdir", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    of_runs = json.loads((folder_of(tmp_path / "runs", 0, "student") / "result.json").read_text())
    of_teacher = json.loads((tmp_path / "runs" / "measured" / "teacher" / "result.json").read_text())
    assert of_teacher["kl"] == pytest.approx(0, abs=1e-5) and of_teacher["top1"] == 1  # to itself
    assert of_teacher["mlm_loss"] == pytest.approx(of_runs["teacher_mlm_loss"])  # with the same masks
    lines = (tmp_path / "runs" / "results.md").read_text().splitlines()
    assert "| word | teacher | student | base |" in lines
    assert any(line.startswith("| lmao | ") and line.count("(") == 6 for line in lines)
