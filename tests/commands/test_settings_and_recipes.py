"""What a user finds in a terminal: settings, recipes by name, completion, and no control codes where nobody watches."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run

from jaxdistill import cli, console, recipe
from jaxdistill.config import Config, flat
from jaxdistill.errors import UserError
from jaxdistill.run import writers

CONFIGS = Path(__file__).parents[2] / "configs"


def test_settings_are_all_of_the_declarations():
    code, out, _ = tiny_run.call(cli.main, ["settings", "--json"])
    found = {one["key"]: one for one in json.loads(out)}
    assert code == 0 and list(found) == [key for key, _ in flat(Config().model_dump())]
    assert found["mask.fraction"]["default"] == Config().mask.fraction and all(x["explanation"] for x in found.values())


def test_settings_about_a_word(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    code, out, _ = tiny_run.call(cli.main, ["settings", "SMOOTHING"])
    assert code == 0 and "--config.mask.smoothing=0.7\n    Prefers rare tokens" in out
    assert "It must be at least 0." in out and max(map(len, out.splitlines())) <= 60
    code, out, err = tiny_run.call(cli.main, ["settings", "learnin_rate"])
    assert code == 2 and out == "" and "the nearest are optim.learning_rate" in err


def test_recipes_are_those_of_the_folder():
    code, out, _ = tiny_run.call(cli.main, ["recipes", "--json"])
    found = {one["name"]: one for one in json.loads(out)}
    assert code == 0 and set(found) == {path.stem for path in CONFIGS.glob("*.py")}
    assert found["gpt2_policy"]["variants"] == ["penalties", "lmops", "smoke"]
    assert all("smoke" in one["variants"] and one["explanation"] for one in found.values())
    for name in ("bert_mlm", "bert_mlm:smoke"):
        code, out, _ = tiny_run.call(cli.main, ["recipes", name])
        assert code == 0 and "arXiv:1910.01108" in out and str(CONFIGS / "bert_mlm.py") in out
        assert "--workdir runs/bert \\\n        --config.teacher" in out  # as in the file


@pytest.mark.parametrize("variant", ["", ":smoke"])
def test_a_recipe_has_a_name_in_any_folder(variant, tmp_path, monkeypatch):
    by_path = recipe.read(f"{CONFIGS / 'bert_mlm.py'}{variant}", ["--config.data.path=x"])
    monkeypatch.chdir(tmp_path)
    assert recipe.read(f"bert_mlm{variant}", ["--config.data.path=x"]) == by_path
    (tmp_path / "bert_mlm").write_text("a file of this name goes before the recipe of the package")
    with pytest.raises(UserError, match="bert_mlm: SyntaxError: invalid syntax"):
        recipe.read(f"bert_mlm{variant}", [])


@pytest.mark.parametrize(
    ("content", "variant", "said"),
    [
        ("x = (", "", "SyntaxError: '(' was never closed"),
        ("x = 1", "", "there is no function get_config"),
        ("1 / 0", "", "line 1: ZeroDivisionError: division by zero"),
        ("def get_config(): ...", "", ""),
        ("def get_config(variant=''): return {'': 1}[variant]", "", ""),
        ("def get_config(): ...", ":smoke", "the recipe has no variant 'smoke'; there are none"),
    ],
)
def test_a_recipe_of_ones_own_is_shown_or_refused_in_a_line(content, variant, said, tmp_path):
    (tmp_path / "mine.py").write_text(content)
    code, out, err = tiny_run.call(cli.main, ["recipes", f"{tmp_path / 'mine.py'}{variant}"])
    assert (code, err.count("error: ")) == ((2, 1) if said else (0, 0)) and said in err, err
    assert said or "variants: none" in out


def test_a_mistyped_recipe_is_answered_with_the_nearest():
    for name in ("bert_mml", "configs/bert_mml.py", "bert_mml:smoke"):
        with pytest.raises(UserError, match=r"no recipe of this name; did you mean 'bert_mlm'\? `jaxdistill recipes`"):
            recipe.read(name, [])


def test_a_shell_completes(tmp_path):
    code, script, _ = tiny_run.call(cli.main, ["completion"])
    assert code == 0
    (tmp_path / "script").write_text(script)
    for typed, completed in (
        (["jaxdistill", "neigh"], "neighbours"),
        (["jaxdistill", "export", "--to-p"], "--to-pytorch"),
        (["jaxdistill", "train", "--config.loss.div"], "--config.loss.divergence="),
        (["jaxdistill", "train", "--config.loss.divergence", "=", "js"], "jsd"),
        (["jaxdistill", "train", "--config.loss.ramp", "="], "linear cosine"),
        (["jaxdistill", "train", "--config", "=", "qwen"], "qwen3_kd"),
        (["jaxdistill", "export", "--config.loss"], ""),
    ):
        words = " ".join(f"'{word}'" for word in typed)
        ask = f"source {tmp_path / 'script'}; COMP_WORDS=({words}); COMP_CWORD={len(typed) - 1}; _jaxdistill"
        done = subprocess.run(["bash", "-c", f'{ask}; echo "${{COMPREPLY[*]}}"'], capture_output=True, text=True)
        assert done.stdout.strip() == completed, done.stderr


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environment", "controls", "colours"),
    [
        (Terminal, {}, True, True),
        (Terminal, {"NO_COLOR": "1"}, True, False),
        (Terminal, {"TERM": "dumb"}, False, False),
        (Terminal, {"CI": "true"}, False, False),
        (io.StringIO, {}, False, False),
        (io.StringIO, {"FORCE_COLOR": "1", "CI": "true"}, False, False),
    ],
)
def test_a_bar_is_drawn_where_somebody_watches(stream, environment, controls, colours, monkeypatch):
    for name in ("CI", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "100", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", err := stream())
    write, stop, report = writers.progress(total=2, start=0)
    report("a line")
    write(1, "train", {"loss": 1.5, "grad_norm": 1.0, "learning_rate": 1e-3})
    stop()
    said = err.getvalue()
    assert console.is_live() == controls and ("\x1b[" in said) == controls
    assert bool(re.search(r"\x1b\[[\d;]*3\d[\d;]*m", said)) == colours
    assert ("train 1/2: loss 1.5" in said) == (not controls) and "a line" in said
