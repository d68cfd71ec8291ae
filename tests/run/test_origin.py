"""What a run says that its student was made from: found when it begins, and kept in its folder."""

import json
import shutil
from typing import Any

import pytest
import tiny_run
from huggingface_hub import ModelCard

from jaxdistill import cli, recipe
from jaxdistill.config import Config, base
from jaxdistill.errors import UserError
from jaxdistill.export.origin import Source
from jaxdistill.run import folder as folders
from jaxdistill.run.origin import origin_of, read_origin, source_named


def folder(path, *, head: str):
    path.mkdir()
    (path / "README.md").write_text(f"---\n{head}\n---\n")
    return path


@pytest.fixture
def models(tmp_path):
    """Two models with a licence, and the folder of a run that was made from the first of them."""
    teacher = folder(tmp_path / "teacher", head="license: mit\nbase_model: user/teacher")
    start = folder(tmp_path / "start", head="license: apache-2.0")
    run = tmp_path / "run"
    (run / "student").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    origin = origin_of(config(teacher=teacher), layers=(0,))
    (run / folders.ORIGIN).write_text(origin.model_dump_json())
    return {"teacher": teacher, "start": start, "run": run}


def config(*, teacher: Any = "", student: Any = "", **values: Any) -> Config:
    one: Any = base()
    one.teacher.name, one.student.name, one.data.path = str(teacher), str(student), "text.txt"
    one.update_from_flattened_dict({key.replace("__", "."): value for key, value in values.items()})
    return recipe.validated(one.to_dict())


def test_the_kinds_of_runs(models):
    teacher, start, run = (str(models[name]) for name in ("teacher", "start", "run"))
    scratch = {"student__init": "random", "student__family": "distilbert", "tokenizer__name": "x"}
    only_labels = {"loss__alpha_ce": 0.0, "loss__alpha_cos": 0.0}
    for one, layers, said in (
        (config(teacher=teacher), (0, 2), f"distilled from `{teacher}`, starting at layers 0, 2 of `{teacher}`"),
        (config(teacher=teacher, student=start), None, f"distilled from `{teacher}`, starting at `{start}`"),
        (config(teacher=teacher, student=run), None, f"distilled from `{teacher}`, starting at `{run}`"),
        (config(teacher=teacher, student__init="random"), None, f"distilled from `{teacher}`, starting at random"),
        (
            config(teacher=teacher, teacher__also=(start, run), student__init="random"),
            None,
            f"distilled from `{teacher}`, `{start}` and `{run}`, starting at random",
        ),
        (config(student=start), None, f"fine-tuned from `{start}`"),
        (config(**scratch), None, "trained from scratch"),
        # A teacher that no loss listens to taught nothing.
        (config(teacher=teacher, student=start, **only_labels), None, f"fine-tuned from `{start}`"),
        (config(teacher=teacher, **only_labels), (1,), f"fine-tuned from layer 1 of `{teacher}`"),
    ):
        origin = origin_of(one, layers=layers)
        assert origin.sentence().startswith(said)
        assert origin.model_validate_json(origin.model_dump_json()) == origin


def test_licences_and_base_models_are_kept(models):
    assert source_named(str(models["teacher"])) == Source(
        name=str(models["teacher"]), licence={"license": "mit"}, base_models=("user/teacher",)
    )
    # Of a run, those of what it was made from.
    of_run = source_named(str(models["run"]))
    assert (of_run.licence, of_run.base_models) == ({"license": "mit"}, ("user/teacher",))
    same = origin_of(config(teacher=models["teacher"], student=models["run"]), layers=None)
    assert (same.licence, same.base_models) == ({"license": "mit"}, ["user/teacher"])
    other = origin_of(config(teacher=models["teacher"], student=models["start"]), layers=None)
    assert (other.licence, other.base_models) == ({}, ["user/teacher"])


def test_a_run_that_began_before_its_origin_was_kept(tmp_path):
    values = json.loads(config(teacher="user/teacher").model_dump_json())
    origin = read_origin(tmp_path, values)
    assert origin.sentence() == "distilled from `user/teacher`, starting at layers of `user/teacher`"
    assert origin.base_models == ["user/teacher"] and origin.licence == {}
    values = json.loads(config(student="user/start").model_dump_json())
    assert read_origin(tmp_path, values).sentence() == "fine-tuned from `user/start`"
    (tmp_path / folders.ORIGIN).write_text('{"how": "dreamt"}')
    with pytest.raises(UserError, match="is damaged"):
        read_origin(tmp_path, values)


@pytest.mark.slow
def test_cards_of_a_run_and_of_a_student_that_is_cut(tiny, tmp_path):
    """Through the commands: cut, distilled from there, fine-tuned from that; the licence of the teacher stays."""
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny.teacher, teacher)
    (teacher / "README.md").write_text("---\nlicense: mit\nbase_model: user/teacher\n---\n")
    cut = tmp_path / "cut"
    argv = ["init-student", f"--teacher={teacher}", "--layers=1,3", f"--out={cut}"]
    assert tiny_run.call(cli.main, argv)[0] == 0
    short = {"train__steps": 2, "evaluate__every": 1, "checkpoint__every": 2, "export__to": "('pytorch',)"}
    run, tuned = tmp_path / "run", tmp_path / "tuned"
    tiny_run.train(tiny, run, teacher__name=teacher, student__name=cut, **short)
    exported = run / "export-pytorch"
    tiny_run.train(tiny, tuned, teacher__name="", student__name=exported, tokenizer__name=teacher, **short)
    for folder, said in (
        (cut, "cut from `teacher` (layers 1, 3) and not trained. It was made with"),
        (exported, "distilled from `teacher`, starting at `cut`, in 2 updates."),
        (tuned / "export-pytorch", "fine-tuned from `export-pytorch`, in 2 updates."),
    ):
        text = (folder / "README.md").read_text()
        assert f"A masked language model {said}" in text
        assert ModelCard(text).data.to_dict().items() >= {"license": "mit", "base_model": "user/teacher"}.items()
        assert str(tmp_path) not in text
    text = exported.joinpath("README.md").read_text()
    assert "After 2 updates, on at most 16 rows of the 10 % of `text.txt` that were held out:" in text
    last = tiny_run.records(run, "eval")[-1]
    assert f"| perplexity | {last['perplexity']:.4g} | {last['teacher_perplexity']:.4g} |" in text
