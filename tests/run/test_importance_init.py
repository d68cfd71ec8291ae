"""Runs whose student is cut out of the teacher by importance: as `init-student` cuts it, and again when resumed."""

import jax
import numpy as np
import pytest
import tiny_run

from jaxdistill import cli, recipe
from jaxdistill.models import hub, weights
from jaxdistill.models.model import build_model
from jaxdistill.run import folder as folders
from jaxdistill.run.assemble import assemble
from jaxdistill.run.origin import read_origin

NARROW = {
    "student__init": "importance",
    "student__width": 8,
    "student__inner": 12,
    "student__layers": "[0,2]",
    "loss__alpha_cos": 0.0,
}


@pytest.mark.slow
def test_it_is_the_student_of_init_student(tiny, tmp_path):
    out = tmp_path / "student"
    sizes = ["--width=8", "--inner=12", "--layers=0,2"]
    argv = ["init-student", f"--teacher={tiny.teacher}", *sizes, f"--text={tiny.text}", f"--out={out}"]
    assert tiny_run.call(cli.main, argv)[0] == 0
    assert "with 8 channels, 12 inner units and 1 heads chosen by importance" in (out / "README.md").read_text()
    # The whole text is trained on, in the rows that `init-student` makes of it and scores.
    values = {**NARROW, "data__eval_path": tiny.text, "data__min_tokens": 12}
    config = recipe.read(str(tiny.recipe), tiny_run.overrides(**values))
    pair = assemble(config, tmp_path / "run", allow_pickle=False).pair
    model = build_model(hub.load_config(out))
    assert pair.layers == (0, 2) and pair.student.config.hidden_size == model.config.hidden_size == 8
    for (path, found), expected in zip(
        jax.tree_util.tree_leaves_with_path(pair.student_params),
        jax.tree.leaves(weights.open_params(out, model, allow_pickle=False)),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_to_the_same_bits(tiny, tmp_path, monkeypatch):
    values = {**NARROW, "checkpoint__every": 1, "student__score_rows": 40}
    tiny_run.train(tiny, tmp_path / "whole", **values)
    with monkeypatch.context() as patch:
        tiny_run.stop_after(patch, 2)
        with pytest.raises(tiny_run.Stopped):
            tiny_run.train(tiny, tmp_path / "run", **values)
    tiny_run.train(tiny, tmp_path / "run", **values)
    tiny_run.assert_same_run(tmp_path / "run", tmp_path / "whole")
    origin = read_origin(tmp_path / "run")
    assert origin.sizes == {"width": 8, "inner": 12, "heads": 1}
    kept = "layers 0, 2, with 8 channels, 12 inner units and 1 heads chosen by importance"
    assert origin.sentence() == f"distilled from `{tiny.teacher}`, starting at {kept}, of `{tiny.teacher}`"
    assert folders.load_student(tmp_path / "run", report=print).model.config.hidden_size == 8


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"student__width": 12}, ["config.student.width", "a width of 8 with 1 heads"]),
        ({"student__heads": 3, "student__width": 0}, ["width 24", "choose 1 to 16"]),
        ({"student__layers": "[0,9]"}, ["9"]),
        ({"teacher__cache": "somewhere"}, ["no teacher is read", "jaxdistill init-student"]),
        ({"teacher__name": ""}, ["nothing to cut a student from"]),
        ({"student__init": "teacher"}, ["config.student.width=8, config.student.inner=12", "init=importance"]),
        ({"student__width": 0, "student__inner": 0}, ["nothing says what to cut"]),
    ],
)
def test_what_cannot_be_cut_is_refused(tiny, tmp_path, values, words):
    arguments = tiny_run.arguments(tiny, tmp_path / "run", **{**NARROW, **values})
    code, _, err = tiny_run.call(cli.main, ["train", *arguments])
    last = err.strip().splitlines()[-1]
    assert code == 2 and all(word in last for word in words), err
    assert not (tmp_path / "run").exists()
