"""A whole run with any of the supported versions of transformers, on the core and without torch."""

import json

import pytest
import tiny_causal
import tiny_run

from jaxdistill import cli, train

pytestmark = [pytest.mark.slow, pytest.mark.newest]


def test_trained_stopped_resumed_evaluated_exported_and_generating(tmp_path, monkeypatch):
    sizes = {"num_key_value_heads": 1, "rope_theta": 500.0}  # with another theta the Flax class cannot serve
    tiny = tiny_causal.make(tmp_path, kind="llama", begins=True, **sizes)
    values = {"checkpoint__every": 2}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    tiny_run.train(tiny, whole, **values)
    with monkeypatch.context() as patch, pytest.raises(tiny_run.Stopped):
        tiny_run.stop_after(patch, 3)
        train.main(tiny_run.arguments(tiny, stopped, **values))
    tiny_run.train(tiny, stopped, **values)
    tiny_run.assert_same_run(stopped, whole)

    folder, out = tmp_path / "exported", tmp_path / "completions.jsonl"
    commands = [
        ["evaluate", f"--workdir={whole}", "--metrics=perplexity,agreement,rouge"],
        ["export", "--to-pytorch", f"--workdir={whole}", f"--out={folder}"],
        [
            "generate",
            f"--model={folder}",
            f"--input={tiny_run.write_text(tmp_path / 'p.txt', ['the cat'])}",
            f"--out={out}",
            "--max-new-tokens=8",
        ],
    ]
    for command in commands:
        code, _, err = tiny_run.call(cli.main, command)
        assert code == 0, err
    assert json.loads(out.read_text())["tokens"] > 0
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == 500.0 and config.get("rope_parameters", config)["rope_theta"] == 500.0
