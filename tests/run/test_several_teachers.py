"""Runs with several teachers, live or cached: refused by name, resumed to the bit, and told on cards."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny_run

from jaxdistill import cli, train

pytestmark = pytest.mark.slow

VALUES: dict[str, Any] = {
    "teacher__combine": "probabilities",
    "loss__tokens": "masked",
    "loss__divergence": "jsd",
    "loss__alpha_cos": 0.0,
    "mask__group": 1,
    "mask__epochs": 2,
    "student__init": "random",
    "checkpoint__every": 2,
}


class Two(NamedTuple):
    tiny: tiny_run.Tiny
    other: Path
    live: Path  # a run with both
    words: int  # of the tokenizer

    def values(self, **values: Any) -> dict[str, Any]:
        student = {"student__overrides": f"{{'num_hidden_layers':1,'vocab_size':{self.words}}}"}
        both = {"teacher__also": (str(self.other),), "teacher__weights": (1.0, 3.0)}
        return {**VALUES, **student, **both, **values}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Two:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("two")
    tiny = tiny_run.make(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny.teacher)
    more = {"num_hidden_layers": 1, "hidden_size": 24, "vocab_size": len(tokenizer) + 5}
    other = tiny_run.write_model(folder / "other", tokenizer, seed=7, **more)
    made = Two(tiny, other, folder / "live", len(tokenizer))
    tiny_run.train(tiny, made.live, **made.values())
    return made


def refused(two: Two, workdir: Path, **values: Any) -> str:
    code, _, err = tiny_run.call(train.main, tiny_run.arguments(two.tiny, workdir, **values))
    assert code == 2, err
    return err.strip().splitlines()[-1]


def figures(workdir: Path) -> list[list[float]]:
    return [[one[name] for name in ("loss", "ce", "grad_norm")] for one in tiny_run.records(workdir, "train")]


def test_a_stopped_run_goes_on_to_the_same_bits_and_no_other_teachers(
    two: Two, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    tiny_run.stop_after(monkeypatch, 3)
    with pytest.raises(tiny_run.Stopped):
        tiny_run.train(two.tiny, run, **two.values())
    monkeypatch.undo()
    before = tiny_run.bits(run)
    for values, said in (
        ({"teacher__weights": (1.0, 2.0)}, "config.teacher.weights=[1.0, 3.0], and now it is [1.0, 2.0]"),
        ({"teacher__combine": "losses"}, "config.teacher.combine='probabilities', and now it is 'losses'"),
        ({"teacher__also": (str(two.tiny.teacher),)}, "the list of further teachers of config.teacher.also="),
        ({"teacher__also": (), "teacher__weights": ()}, "config.teacher.weights="),
    ):
        assert said in refused(two, run, **two.values(**values)), values
    assert tiny_run.bits(run) == before
    (two.other.parent / "link").symlink_to(two.other)
    tiny_run.train(two.tiny, run, **two.values(teacher__also=(str(two.other.parent / "link"),)))
    a, b = tiny_run.saved(run), tiny_run.saved(two.live)
    assert [name for name in a if name != "notes" and a[name].tobytes() != b[name].tobytes()] == []


def test_all_teachers_are_told(two: Two, tmp_path: Path) -> None:
    origin = json.loads((two.live / "origin.json").read_text())
    assert [origin["teacher"]["name"], *(one["name"] for one in origin["also"])] == [
        str(two.tiny.teacher),
        str(two.other),
    ]
    code, _, err = tiny_run.call(
        cli.main, ["export", f"--workdir={two.live}", "--to-pytorch", f"--out={tmp_path / 'out'}"]
    )
    assert code == 0, err
    assert "distilled from `teacher` and `other`, starting at random" in (tmp_path / "out" / "README.md").read_text()
    code, out, err = tiny_run.call(cli.main, ["evaluate", f"--workdir={two.live}", "--metrics=agreement"])
    assert code == 0 and "kl" in out, err


def test_what_does_not_fit_is_refused_before_anything_is_written(two: Two, tmp_path: Path) -> None:
    foreign = tiny_run.make_tokenizer(tiny_run.lines(30, seed=9)[:3])
    short = {"max_position_embeddings": 20}
    tokenizer = tiny_run.make_tokenizer(tiny_run.lines(200))
    others = {
        "vocabularies differ: the teacher's": tiny_run.write_model(tmp_path / "foreign", foreign),
        f"longer than the teacher {tmp_path / 'short'}'s 20 positions": tiny_run.write_model(
            tmp_path / "short", tokenizer, **short
        ),
        "a causal language model, which masks nothing": tiny_run.write_model(
            tmp_path / "causal", tokenizer, kind="gpt2", n_layer=1, n_head=2, n_embd=16, n_positions=40
        ),
        str(tmp_path / "nothing"): tmp_path / "nothing",
    }
    for said, other in others.items():
        line = refused(two, tmp_path / "run", **two.values(teacher__also=(str(other),)))
        assert said in line, line
    assert not (tmp_path / "run").exists()


def test_two_whole_caches_train_as_the_two_teachers_that_run(two: Two, tmp_path: Path) -> None:
    """By the mixture, and by the mean of losses; every cache is checked, and named where it does not fit."""
    whole = {"cache__kind": "topk", "cache__k": 10_000, "cache__dtype": "float32"}
    caches = {}
    for name, teacher, kind in (
        ("first", two.tiny.teacher, whole),
        ("second", two.other, whole),
        ("sampled", two.other, {"cache__samples": 3}),
        ("unlike", two.other, {**whole, "mask__seed": 3}),
    ):
        argv = tiny_run.overrides(**two.values(**kind, teacher__name=teacher, teacher__also=(), teacher__weights=()))
        code, _, err = tiny_run.call(
            cli.main, ["cache", f"--config={two.tiny.recipe}", f"--out={tmp_path / name}", *argv]
        )
        assert code == 0, err
        caches[name] = str(tmp_path / name)

    def values(*names: str, **more: Any) -> dict[str, Any]:
        cached = {"teacher__name": "", "teacher__also": (), "teacher__cache": tuple(caches[name] for name in names)}
        return two.values(**{**cached, **more})

    tiny_run.train(two.tiny, tmp_path / "cached", **values("first", "second"))
    for ours, theirs in zip(figures(tmp_path / "cached"), figures(two.live), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)
    forward = {"teacher__combine": "losses", "loss__divergence": "forward_kl"}
    tiny_run.train(two.tiny, tmp_path / "drawn", **values("first", "sampled", **forward))
    for names, more, said in (
        (("first", "sampled"), {}, f"config.teacher.cache={caches['sampled']!r} cannot serve config.loss.alpha_ce"),
        (("first", "sampled"), {"loss__temperature": 3.0, **forward}, "the answers are for 2"),
        (("first", "unlike"), {}, f"config.teacher.cache={caches['unlike']!r} lacks the answers"),
    ):
        assert said in refused(two, tmp_path / "run", **values(*names, **more))
