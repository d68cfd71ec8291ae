"""`init-student --width`: from a text to a narrower folder that PyTorch opens, and a run that begins with it."""

import json

import numpy as np
import pytest
import tiny_run

from jaxdistill import cli, train
from jaxdistill.jobs import cut


@pytest.mark.weekly  # test_importance_init compares what the command makes with what a run makes
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


@pytest.mark.slow
def test_a_teacher_that_is_split_over_devices_gives_the_same_student(tiny, tmp_path, monkeypatch):
    """Wide enough to be split; layers by search, units and heads by importance."""
    from safetensors.numpy import load_file

    sizes = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 256}
    wide = tiny_run.write_model(tmp_path / "wide", tiny_run.make_tokenizer(tiny.text.read_text().splitlines()), **sizes)
    made, shares, score = [], [], cut.to_score

    def scored(*arguments):
        context, params = score(*arguments)
        shares.append(tiny_run.largest_share(params))
        return context, params

    monkeypatch.setattr(cut, "to_score", scored)
    argv = [
        "init-student",
        f"--teacher={wide}",
        "--layers=search:2",
        "--width=64",
        "--inner=100",
        f"--text={tiny.text}",
    ]
    for name, mesh in (("whole", []), ("split", ["--fsdp=4", "--tensor=2"])):
        code, said, err = tiny_run.call(cli.main, [*argv, *mesh, f"--out={tmp_path / name}", "--json"])
        assert code == 0, err
        made.append(json.loads(said)["candidates"])
    assert shares[:2] == [1, 1] and max(shares[2:]) < 0.2
    for one, other in zip(*made, strict=True):
        assert one["layers"] == other["layers"]
        assert one["kl"] == pytest.approx(other["kl"], rel=1e-4)
    whole, split = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "split"))
    for name in whole:  # bit for bit, but for norms, which are scaled by sums over devices
        np.testing.assert_allclose(whole[name], split[name], rtol=1e-5 if "LayerNorm" in name else 0, err_msg=name)


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
