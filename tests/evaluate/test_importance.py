"""`init-student --width`: from a text to a narrower folder that PyTorch opens, and a run that begins with it."""

import json

import pytest
import tiny_run

from jaxdistill import cli, train


@pytest.mark.slow
def test_a_narrower_student_by_command(tiny, tmp_path):
    from transformers import AutoModelForMaskedLM

    whole = json.loads((tiny.teacher / "config.json").read_text())
    width, heads = whole["hidden_size"] // 2, whole["num_attention_heads"] // 2
    out = tmp_path / "narrow"
    argv = ["init-student", f"--teacher={tiny.teacher}", f"--width={width}", "--inner=20", "--layers=search:2"]
    code, said, err = tiny_run.call(cli.main, [*argv, f"--text={tiny.text}", f"--out={out}", "--json"])
    assert code == 0, err
    made = json.loads(said)
    assert made["sizes"] == {"width": width, "inner": 20, "heads": heads} and len(made["layers"]) == 2
    model, info = AutoModelForMaskedLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert model.num_parameters() == made["parameters"]
    changes = [f"--config.student.name={out}", "--config.student.layers=None", "--config.train.steps=2"]
    code, _, err = tiny_run.call(train.main, [*tiny_run.arguments(tiny, tmp_path / "run"), *changes])
    assert code == 0, err


def test_what_cannot_be_cut_is_refused_before_the_teacher_is_read(tiny, tmp_path):
    command = ["init-student", f"--teacher={tiny.teacher}", f"--out={tmp_path / 'out'}"]
    for flags, words in [
        ([], "nothing says what to cut"),
        (["--width=8"], "--text FILE"),
        (["--inner=99999", f"--text={tiny.text}"], "inner 99999"),
        (["--heads=-1", f"--text={tiny.text}"], "heads -1"),
    ]:
        code, out, err = tiny_run.call(cli.main, [*command, *flags])
        assert (code, out) == (2, "") and words in err.splitlines()[-1], err
    assert not (tmp_path / "out").exists()
