"""`jaxdistill doctor`: findings about the machine, and gradients that add up to the gradient of the run."""

import json
import math

import pytest
import tiny_run

from jaxdistill import cli
from jaxdistill.jobs import doctor


def test_nothing_is_to_fix_where_the_suite_runs(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    code, out, err = tiny_run.call(cli.main, ["doctor", "--json"])
    found = json.loads(out)
    assert code == 0, err
    assert {"jaxdistill", "versions", "devices", "bfloat16", "cudnn", "libtpu", "prepared text"} <= {
        one["what"] for one in found
    }
    assert [one for one in found if one["verdict"] == "fix"] == []
    (devices,) = [one["found"] for one in found if one["what"] == "devices"]
    assert devices.startswith("8 x cpu (cpu)")


def test_a_look_that_fails_is_a_finding(monkeypatch):
    def broken():
        raise RuntimeError("no driver\nmore lines")
        yield

    monkeypatch.setattr(doctor, "LOOKS", {"devices": broken})
    code, out, err = tiny_run.call(cli.main, ["doctor"])
    assert code == 2 and out.startswith("! devices") and "RuntimeError: no driver" in out
    assert err == "error: 1 to fix: devices; the lines that begin with ! say how\n"


@pytest.mark.parametrize(
    ("versions", "wrong"),
    [
        ({"jax": "0.10.2", "jaxlib": "0.9.0"}, "jax 0.10.2 beside jaxlib 0.9.0"),
        ({"jaxlib": "0.10.2", "jax-cuda12-plugin": "0.8.1"}, "jaxlib 0.10.2 beside jax-cuda12-plugin"),
        ({"transformers": "4.57.6", "huggingface-hub": "1.2.0"}, "transformers 4.57.6 beside huggingface-hub"),
        ({"sentence-transformers": "6.0.0", "transformers": "4.57.6"}, "sentence-transformers 6.0.0 beside"),
        ({"numpy": "1.26.4"}, "numpy 1.26.4, and it must be"),
        ({}, ""),
    ],
)
def test_versions_that_do_not_go_together(versions, wrong, monkeypatch):
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name) or version(name))
    found = [one.found for one in doctor._requirements() if one.verdict == "fix"]
    assert any(wrong in one for one in found) if wrong else found == []


@pytest.mark.slow
def test_gradients_add_up_to_that_of_the_run(tiny, tmp_path):
    """The sum of all inner products is the square of the norm that the first step of a run without dropout logs."""
    still = "{'hidden_dropout_prob': 0.0, 'attention_probs_dropout_prob': 0.0}"
    values = {"student__overrides": still, "train__steps": 1, "loss__alpha_hidden_mse": 0.5}
    tiny_run.train(tiny, tmp_path / "run", **values)
    (step,) = tiny_run.records(tmp_path / "run", "train")
    argv = ["doctor", f"--config={tiny.recipe}", "--batches=1", "--json", *tiny_run.overrides(**values)]
    code, out, err = tiny_run.call(cli.main, argv)
    assert code == 0, err
    found = json.loads(out)
    losses, cosines = found["losses"], found["cosines"]
    assert list(losses) == ["ce", "mlm", "cos", "hidden_mse"] and found["rows"] == 16
    for name, one in losses.items():
        assert one["value"] == pytest.approx(step[name], rel=1e-4)
        assert cosines[name][name] == pytest.approx(1, abs=1e-5)
    square = sum(losses[a]["gradient"] * losses[b]["gradient"] * cosines[a][b] for a in losses for b in losses)
    assert math.sqrt(square) == pytest.approx(step["grad_norm"], rel=1e-4)


def test_flags_that_make_no_sense(tiny):
    for argv, message in (
        (["doctor", "--config.train.steps=3"], "is of a recipe; name one with --config"),
        (["doctor", f"--config={tiny.recipe}", "--batches=0"], "--batches 0 must be at least 1"),
    ):
        code, _, err = tiny_run.call(cli.main, argv)
        assert code == 2 and message in err
