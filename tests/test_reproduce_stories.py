"""scripts/reproduce_stories.py: how it counts repetition, and one short run by its command."""

import itertools
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "reproduce_stories.py"


@pytest.mark.parametrize(
    ("text", "share"),
    [("", 0), ("a b c", 0), ("a b c d e f", 0), ("a b c d a b c d", 1 / 5), ("a a a a a a", 2 / 3)],
)
def test_repetition_is_the_share_of_4_grams_that_stood_before(text, share):
    assert runpy.run_path(str(SCRIPT))["repeated"](text) == pytest.approx(share)


def test_the_time_of_an_update_is_a_mean_of_the_second_half():
    """On policy, every other update may take five times as long; a median would count one kind of update alone."""
    ticks = list(itertools.accumulate([30.0, 1.0, 1.0, 5.0, 1.0, 5.0, 1.0, 5.0]))  # the first one compiles
    assert runpy.run_path(str(SCRIPT))["after_compilation"](ticks) == pytest.approx((5 + 1 + 5) / 3)


@pytest.mark.weekly  # training, text and figures are those of commands
def test_one_objective_runs_and_its_stories_are_judged_by_the_teacher(tmp_path):
    stories = tmp_path / "stories.json"
    stories.write_text(
        json.dumps([f"We must work for peace, for the {n}th year, and for all nations." for n in range(50)])
    )
    teacher = ["--teacher", str(ROOT / "configs" / "quickstart" / "llama3"), "--student-layers", "1"]
    steps = ["--seeds", "0", "--seconds", "0.01", "--probed", "4", "--rows", "4", "--length", "32"]
    sizes = [*steps, "--prompt-tokens", "4", "--new-tokens", "8", "--continued", "4"]
    command = [sys.executable, str(SCRIPT), *teacher, "--stories", str(stories), "--arms", "reverse KL", *sizes]
    done = subprocess.run([*command, "--workdir", str(tmp_path / "runs")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "runs" / "seed0" / "reverse-KL" / "result.json").read_text())
    (seconds,) = json.loads((tmp_path / "runs" / "times.json").read_text()).values()
    assert found["updates"] == max(int(0.01 / seconds), 1) and found["milliseconds"] == 1000 * seconds
    assert found["greedy_perplexity"] > 1 and 0 <= found["sampled_repeated"] < 1
