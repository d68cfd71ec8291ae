"""The script that writes a cache of a PyTorch teacher, by the documented format alone, against our own."""

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_causal
import tiny_run

from jaxdistill import cli
from jaxdistill.data import teacher_cache as caches

SCRIPT = Path(__file__).parents[1] / "scripts" / "write_teacher_cache.py"


@pytest.mark.slow
def test_a_pytorch_teacher_gives_the_same_answers(tmp_path: Path, monkeypatch: Any) -> None:
    tiny = tiny_causal.make(tmp_path)
    values = [*tiny_run.overrides(cache__kind="topk", cache__k=5), f"--config={tiny.recipe}"]
    assert tiny_run.call(cli.main, ["cache", f"--out={tmp_path / 'ours'}", *values])[0] == 0
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), f"--out={tmp_path / 'theirs'}", "--k=5", *values])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    ours, theirs = (caches.open_cache(tmp_path / name) for name in ("ours", "theirs"))
    assert len(ours) == len(theirs) > 0
    for number, key in enumerate(ours.shards[0].keys):
        place = theirs.find(key.tobytes())
        assert place is not None
        for name in ("log_probs", "tails"):
            np.testing.assert_allclose(theirs.read(place, name), ours.read((0, number), name), atol=2e-2)
    run = tiny_run.arguments(
        tiny, tmp_path / "run", teacher__cache=tmp_path / "theirs", student__name=tmp_path / "student", train__steps=1
    )
    assert tiny_run.call(cli.main, ["train", *run])[0] == 0
