"""`jaxdistill report` of real runs: a distilled student, and one that was trained without the teacher."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_causal
import tiny_run

from jaxdistill import cli
from jaxdistill.jobs import report as reports_of_runs
from jaxdistill.jobs.report import make_report
from jaxdistill.report import page
from jaxdistill.run.records import read_records

PAGE = page.page


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not measured in a process for each model; tests/evaluate/test_footprint.py measures one."""
    monkeypatch.setattr(reports_of_runs, "measure_peak", lambda model, dtype, rows, length: model.width)


@pytest.fixture(scope="module")
def run(tiny: tiny_run.Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "distilled"
    tiny_run.train(tiny, folder, evaluate__prompts="('the [MASK] sees a small dog.',)", train__steps=2)
    return folder


@pytest.mark.slow
def test_models_are_measured_side_by_side(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run, in the place of a baseline, is a copy of the first: its figures must be the same."""
    copy = Path(shutil.copytree(run, tmp_path / "baseline"))
    reports = []
    monkeypatch.setattr(page, "page", lambda made: reports.append(made) or PAGE(made))
    out = tmp_path / "new" / "page.html"
    code, said, also = tiny_run.call(cli.main, ["report", str(run), str(copy), "--out", str(out)])
    assert (code, said) == (0, f"wrote {out} and {out.with_suffix('.md')}\n"), also
    html, text = out.read_text(), out.with_suffix(".md").read_text()
    assert str(run.parent) not in html + text  # the page is there to be passed on
    assert "jaxdistill report distilled baseline --out page.html" in text

    [report] = reports
    assert [one.name for one in report.portraits] == ["teacher", "distilled", "baseline"]
    teacher, student, other = (one.figures for one in report.portraits)
    measured = {record["step"]: record for record in read_records(run) if record["kind"] == "eval"}
    found = {
        "perplexity": student["perplexity"],
        "mlm_accuracy": student["accuracy"],
        "kl": student["kl"],
        "top1": student["top1"],
        "top5": student["top5"],
        "teacher_perplexity": teacher["perplexity"],
    }
    assert found == pytest.approx({name: measured[2][name] for name in found}, rel=1e-4)
    timed = ("latency",)
    assert {k: v for k, v in other.items() if k not in timed} == {k: v for k, v in student.items() if k not in timed}
    assert "kl" not in teacher and report.has_teacher and student["peak"] == report.portraits[0].figures["peak"]
    # The most frequent long words of the held-out text; a copied embedding has the same neighbours.
    assert report.neighbours and all(len(near.word) >= 5 and near.word in tiny_run.WORDS for near in report.neighbours)
    assert all(near.models["distilled"] == near.models["baseline"] for near in report.neighbours)
    assert dict(report.curves[0].evaluation["kl"]) == {step: record["kl"] for step, record in measured.items()}
    # One prompt of the recipe, and held-out rows whose word is known.
    assert report.examples[0].prompt == "the [MASK] sees a small dog." and len(report.examples) > 1
    for one in report.examples[1:]:
        assert one.expected in tiny_run.WORDS and one.prompt.split().count("[MASK]") == 1
        assert {name: len(words) for name, words in one.words.items()} == dict.fromkeys(one.words, 5)


@pytest.mark.slow
def test_a_causal_run_shows_what_its_models_write(tmp_path: Path) -> None:
    tiny = tiny_causal.make(tmp_path)
    run = tmp_path / "run"
    tiny_run.train(tiny, run, train__steps=2, evaluate__max_new_tokens=4)
    report = make_report([run], command="", words=["cat", "dog"], say=print)
    assert [(near.word, list(near.models)) for near in report.neighbours] == [
        (word, ["teacher", "run"]) for word in ("cat", "dog")
    ]
    assert report.examples and all(one.texts.keys() == {"teacher", "run"} and not one.words for one in report.examples)
    assert report.portraits[1].similarity is not None


def test_curves_need_no_model(tmp_path: Path) -> None:
    run = written_run(tmp_path / "run")
    report = make_report([run], command="", curves_only=True, say=print)
    assert report.curves[0].train == {"loss": [(1, 3.0), (2, 2.5)]} and report.portraits == ()
    assert report.made[0].changed == {"teacher.name": "teacher", "data.path": "text.txt", "train.steps": 7}


def written_run(folder: Path) -> Path:
    """As much of a run folder as its curves need; the last line is torn."""
    folder.mkdir()
    config = {"teacher": {"name": "/home/a/teacher"}, "data": {"path": "text.txt"}, "train": {"steps": 7}}
    (folder / "config.json").write_text(json.dumps(config))
    records = [{"step": step, "time": 0, "kind": "train", "loss": 3.5 - step / 2} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in records) + '{"step": 3, "ki')
    return folder


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{here}/nothing"], "is no run folder"),
        (["{run}", "{run}", "--curves-only"], "a run is named twice"),
        (["{run}"], "has no checkpoint yet; --curves-only shows what the run has written"),
        (["{run}", "--out=page.md"], "--out page.md names no .html file"),
        (["{run}", "--out={here}/folder.html"], "folder.html is a folder; name a file"),
        (["{run}", "--config.data.lenght=3"], "unknown config key 'data.lenght'"),
        (["{run}", "--curves-only", "--config.data.path=a"], "--curves-only measures none"),
        (["{run}", "--curves-only", "--words=war"], "--curves-only reads none"),
        (["{run}", "--curves-only", "--out={run}/config.json/page.html"], "cannot write"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "folder.html").mkdir()
    run = written_run(tmp_path / "run")
    here: dict[str, Any] = {"here": tmp_path, "run": run}
    code, out, err = tiny_run.call(cli.main, ["report", *(one.format(**here) for one in arguments)])
    last = err.splitlines()[-1]
    assert (code, out) == (2, "") and said in last and last.startswith("error: ")


def test_runs_of_one_folder_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
    runs = [written_run(tmp_path / parent / "run") for parent in ("a", "b")]
    assert [one.run for one in make_report(runs, command="", curves_only=True, say=print).curves] == list(
        map(str, runs)
    )
