"""Results go to standard output, all else to standard error; help, silence, Ctrl-C; what a script reads."""

import json
import time
from pathlib import Path

import pytest
import tiny_run

from jaxdistill import cli, console, train
from jaxdistill.run import writers


def test_prepare_prints_the_folder_alone(tiny):
    for said in ("tokenising ", "reusing "):
        code, out, err = tiny_run.call(cli.main, ["prepare", f"--config={tiny.recipe}"])
        assert code == 0 and out.count("\n") == 1 and (Path(out[:-1]) / "tokens.bin").is_file()
        assert said in err


def test_init_student_prints_json_for_a_script(tiny, tmp_path):
    out_folder = tmp_path / "student"
    code, out, _ = tiny_run.call(
        cli.main, ["init-student", f"--teacher={tiny.teacher}", "--layers=1,3", f"--out={out_folder}", "--json"]
    )
    made = json.loads(out)
    assert code == 0 and made["layers"] == [1, 3] and made["folder"] == str(out_folder) and made["candidates"] == []


@pytest.mark.parametrize("command", ["train", *(name for name, one in cli.COMMANDS.items() if one.TAKES_CONFIG)])
def test_help_says_how_settings_are_given_and_where_they_are_listed(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    out = capsys.readouterr().out
    assert "--config.KEY=VALUE" in out and "docs/settings.md" in out and "config.json" in out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_ctrl_c_says_what_it_leaves_behind(name, monkeypatch, tmp_path):
    """Only a run has checkpoints to go on from."""

    def interrupted(flags, overrides):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.COMMANDS[name], "main", interrupted)
    required = {
        "prepare": ["--config=x"],
        "init-student": ["--teacher=x", "--layers=1", "--out=x"],
        "evaluate": [],
        "export": ["--workdir=x", "--to-flax", "--out=x"],
        "plan": ["--config=x"],
        "generate": ["--model=x"],
        "cache": ["--config=x", "--out=x"],
        "report": ["x"],
        "neighbours": ["--words=x"],
    }
    code, out, err = tiny_run.call(cli.main, [name, *required.get(name, [])])
    assert code == 130 and out == "" and err == f"interrupted; {cli.COMMANDS[name].INTERRUPTED}\n"
    assert "checkpoint" not in err


def test_only_what_takes_long_is_said(monkeypatch, capsys):
    monkeypatch.setattr(console, "PATIENCE", 0.05)
    with console.taking("something quick"):
        pass
    with console.taking("something slow"):
        time.sleep(0.3)
    assert capsys.readouterr() == ("", "something slow ...\n")


def test_the_libraries_are_not_loaded_in_silence(tiny, tmp_path, monkeypatch):
    """Neither by training nor by any command: each one says so, if it takes long."""
    began = []

    def taking(what):
        began.append(what)
        raise KeyboardInterrupt

    for module in (train, *cli.COMMANDS.values()):
        monkeypatch.setattr(module, "taking", taking)
    run = f"--workdir={tmp_path / 'run'}"
    for argv in (
        ["train", f"--config={tiny.recipe}", run],
        ["prepare", f"--config={tiny.recipe}"],
        ["init-student", f"--teacher={tiny.teacher}", "--layers=1", "--out=x"],
        ["evaluate", run],
        ["export", run, "--to-flax", "--out=x"],
        ["plan", f"--config={tiny.recipe}"],
        ["generate", f"--model={tiny.teacher}"],
        ["neighbours", f"--model={tiny.teacher}", "--words=x"],
        ["doctor"],
        ["recipes"],
        ["settings"],
        ["completion"],
    ):
        tiny_run.call(cli.main, argv)
        assert began.pop() == console.LOADING, argv


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["evaluate"], "--workdir RUN measures the student of a run"),
        (["evaluate", "--workdir=r", "--config=c"], "--model FOLDER --config RECIPE"),
        (["evaluate", "--workdir=r", "--revision=v1"], "--model FOLDER --config RECIPE"),
        (["evaluate", "--model=m"], "give --workdir or --config"),
        (["evaluate", "--model=m", "--workdir=r", "--config=c"], "give --workdir or --config"),
        (["evaluate", "--model=m", "--config=c", "--step=3"], "--step 3 is of the run in --workdir"),
        (["evaluate", "--workdir=r", "--step=first"], "--step first is no step: give a number, best or last"),
        (["evaluate", "--workdir=r", "--step=best"], "r is no run folder"),
        (["export", "--workdir=r", "--to-flax", "--out=o", "--step=-1"], "--step -1 is no step"),
        (["generate", "--model=.", "--input=/dev/null", "--step=3"], "/dev/null holds no prompt"),
    ],
)
def test_flags_that_do_not_go_together(argv, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = tiny_run.call(cli.main, argv)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and said in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "name a command"),
        (["trian"], "unknown command 'trian' (did you mean 'train'?)"),
        (["--vresion"], "unknown flag '--vresion' (did you mean '--version'?)"),
        (["-x"], "unknown flag '-x'"),
        (["train", "--confg=c", "--workdir=w"], "unknown flag '--confg' (did you mean '--config'?)"),
        (["train", "--config=c"], "required: --workdir"),
        (["train", "--config=c", "--workdir=w", "--steps", "3"], "unknown flag '--steps'; settings are given as"),
        (["train", "--config=c", "--workdir=w", "--config.train.steps", "3"], "'--config.train.steps' has no value"),
        (["train", "--config=c", "--workdir=ftp://a/b"], "addresses begin with gs:// or s3://"),
        (["evaluate", "--workdir=w", "--stpe=best"], "unknown flag '--stpe' (did you mean '--step'?)"),
        (["export", "--workdir=w", "--out"], "--out: expected one argument"),
        (["export", "more", "--workdir=w", "--out=o"], "unknown argument 'more'"),
        (["generate", "--model=m", "--max-new-tokens=many"], "invalid int value: 'many'"),
        (["recipes", "--config.train.steps=3"], "'--config.train.steps=3': this command has no settings"),
    ],
)
def test_a_mistake_in_the_flags_is_one_line(argv, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv)
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err and "--help` explains" in err


def test_a_flag_may_be_shortened_where_the_command_has_no_settings(capsys, tmp_path):
    code, _, err = tiny_run.call(cli.main, ["export", "--to-py", f"--work={tmp_path}", f"--out={tmp_path / 'out'}"])
    assert code == 2 and "is no run folder" in err


def test_a_step_is_of_a_run(tiny, tmp_path):
    (tmp_path / "prompts.txt").write_text("the cat\n")
    argv = ["generate", f"--model={tiny.teacher}", f"--input={tmp_path / 'prompts.txt'}", "--step=3"]
    code, _, err = tiny_run.call(cli.main, argv)
    assert code == 2 and "--step 3 is of a run folder" in err


@pytest.mark.parametrize("role", ["teacher", "tokenizer"])
def test_a_run_folder_is_no_model_and_says_how_to_make_one(tiny, tmp_path, role):
    run = tmp_path / "run"
    (run / "student").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    argv = [*tiny_run.arguments(tiny, tmp_path / "other"), f"--config.{role}.name={run}"]
    code, _, err = tiny_run.call(train.main, argv)
    assert code == 2 and f"jaxdistill export --to-pytorch --workdir {run} --out DIR" in err
    assert not (tmp_path / "other").exists()


def test_wandb_ids_are_of_the_run_and_not_of_its_path(tmp_path):
    first, second, old = tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "old"
    for folder in (first, second, old / "wandb"):
        folder.mkdir(parents=True)
    assert writers._wandb_id(first) != writers._wandb_id(second)
    assert writers._wandb_id(first) == writers._wandb_id(first)
    moved = first.rename(tmp_path / "moved")
    assert writers._wandb_id(moved) == (moved / writers.WANDB_ID).read_text()
    # A run of 0.1.0 goes on with the curves that it has.
    assert writers._wandb_id(old) == str(old).replace("/", "-").strip("-")


@pytest.mark.parametrize("live", [False, True])
def test_long_work_counts_what_is_done(live, monkeypatch, capsys):
    """A second each: on a terminal one line that is drawn again, elsewhere lines after 2, 4, 8, 16 ... seconds."""
    clock = iter(range(1000))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(console, "PATIENCE", 2.0)
    monkeypatch.setattr(console, "_draws", lambda: live)
    assert list(console.counted(range(100), "measuring", unit="batches")) == list(range(100))
    said = capsys.readouterr().err
    if live:
        *lines, last = said.split("\r\x1b[2K")[1:]
        assert lines[0] == "measuring: 1 of 100 batches, 198 s left".replace("198 s", "3 min") and last == ""
        assert len(lines) == 99 and "\n" not in said
    else:
        assert [line.split(",")[0].split(" ")[1] for line in said.splitlines()] == ["1", "3", "7", "15", "31", "63"]


def test_short_work_is_silent(monkeypatch, capsys):
    monkeypatch.setattr(console, "PATIENCE", 600.0)
    assert list(console.counted("abc", "measuring", unit="letters")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""
