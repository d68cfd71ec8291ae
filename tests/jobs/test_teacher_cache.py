"""Runs whose teacher's answers come from a cache: equal to the live teacher, found by content, refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import grids
import numpy as np
import pytest
import tiny_causal
import tiny_run

from jaxdistill import cli
from jaxdistill.data import teacher_cache as caches
from jaxdistill.jobs import cache as caching

MASKED: dict[str, Any] = {
    "mask__group": 1,
    "mask__epochs": 2,
    "loss__tokens": "masked",
    "loss__alpha_cos": 0.0,
    "student__init": "random",
    "student__overrides": "{'num_hidden_layers':2}",
}
WHOLE = {"cache__kind": "topk", "cache__k": 10_000, "cache__dtype": "float32"}


class Kept(NamedTuple):
    tiny: tiny_run.Tiny
    caches: dict[str, Path]


def cache(tiny: tiny_run.Tiny, out: Path, **values: Any) -> tuple[int, str, str]:
    return tiny_run.call(cli.main, ["cache", f"--config={tiny.recipe}", f"--out={out}", *tiny_run.overrides(**values)])


def made(tiny: tiny_run.Tiny, out: Path, **values: Any) -> Path:
    code, _, err = cache(tiny, out, **values)
    assert code == 0, err
    return out


def refused(tiny: tiny_run.Tiny, workdir: Path, **values: Any) -> str:
    """What a run is told that may not begin; it leaves no folder."""
    code, _, err = tiny_run.call(cli.main, ["train", *tiny_run.arguments(tiny, workdir, **values)])
    assert code == 2, err
    assert not workdir.exists()
    return err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    folder = tmp_path_factory.mktemp("masked")
    tiny = tiny_run.make(folder)
    kinds = {"whole": {**WHOLE, "cache__layers": "(3,)"}, "sampled": {"cache__samples": 3}}
    return Kept(tiny, {name: made(tiny, folder / name, **MASKED, **kind) for name, kind in kinds.items()})


def figures(workdir: Path, kind: str = "train") -> list[dict[str, Any]]:
    names = ("loss", "ce", "mlm", "clm", "cos", "grad_norm", "perplexity")
    return [{k: v for k, v in record.items() if k in names} for record in tiny_run.records(workdir, kind)]


def assert_alike(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> None:
    assert len(a) == len(b) > 0
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert value == pytest.approx(other[name], rel=2e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("head", grids.everyday(["fused", "dense"], "fused"))  # test_partial compares both
def test_a_whole_cache_trains_as_the_live_teacher(masked: Kept, tmp_path: Path, monkeypatch: Any, head: str) -> None:
    """Also with hidden states; with the batches, masks and updates of the live run; the teacher's weights are gone."""
    tiny, kept = masked
    values = {**MASKED, "loss__head": head, "loss__alpha_cos": 1.0, "loss__temperature": 1.5, "train__accumulation": 2}
    tiny_run.train(tiny, tmp_path / "live", **values)
    (tiny.teacher / "model.safetensors").rename(tmp_path / "away")
    try:
        tiny_run.train(tiny, tmp_path / "cached", **values, teacher__name="", teacher__cache=kept["whole"])
    finally:
        (tmp_path / "away").rename(tiny.teacher / "model.safetensors")
    origins = [json.loads((tmp_path / run / "origin.json").read_text()) for run in ("live", "cached")]
    assert origins[0]["how"] == origins[1]["how"] == "distilled"
    assert origins[0]["teacher"]["name"] == origins[1]["teacher"]["name"] == str(tiny.teacher)
    cached, live = figures(tmp_path / "cached"), figures(tmp_path / "live")
    assert all(one.keys() >= {"ce", "mlm", "cos"} for one in cached)
    for one, other in zip(cached, live, strict=True):  # hidden states are bfloat16
        assert one.pop("cos") == pytest.approx(other.pop("cos"), rel=2e-2)
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)
        assert one.pop("grad_norm") == pytest.approx(other.pop("grad_norm"), rel=2e-2)
    evaluated = [{"perplexity": one["perplexity"]} for one in figures(tmp_path / "live", "eval")]
    assert [one["perplexity"] for one in figures(tmp_path / "cached", "eval")] == pytest.approx(
        [one["perplexity"] for one in evaluated], rel=5e-3
    )


@pytest.mark.slow
def test_answers_are_found_in_any_order_and_a_stopped_run_goes_on(
    masked: Kept, tmp_path: Path, monkeypatch: Any
) -> None:
    """Another seed, batch size, mesh and length of an epoch; and the bits of a run that was not stopped."""
    tiny, kept = masked
    values = {**MASKED, "teacher__cache": kept["sampled"], "train__steps": 30, "checkpoint__every": 10}
    tiny_run.train(tiny, tmp_path / "a", **values)
    other = {"seed": 7, "train__batch_size": 24, "mesh__fsdp": 2, "train__limit_batches": 3, "loss__tokens": "labels"}
    tiny_run.train(tiny, tmp_path / "b", **{**values, **other})
    tiny_run.stop_after(monkeypatch, 15)
    with pytest.raises(tiny_run.Stopped):
        tiny_run.train(tiny, tmp_path / "c", **values)
    monkeypatch.undo()
    shutil.copytree(kept["sampled"], tmp_path / "elsewhere")
    tiny_run.train(tiny, tmp_path / "c", **{**values, "teacher__cache": tmp_path / "elsewhere"})
    assert tiny_run.saved(tmp_path / "a")["notes"]["content"] == tiny_run.saved(tmp_path / "c")["notes"]["content"]
    ours, theirs = tiny_run.saved(tmp_path / "a"), tiny_run.saved(tmp_path / "c")
    assert [name for name in ours if name != "notes" and ours[name].tobytes() != theirs[name].tobytes()] == []


@pytest.mark.slow
def test_what_a_run_cannot_take_is_refused_by_name(masked: Kept, tmp_path: Path) -> None:
    tiny, kept = masked
    sampled = {**MASKED, "teacher__cache": kept["sampled"]}
    other = tiny_run.write_model(tmp_path / "other", tiny_run.make_tokenizer(tiny_run.lines(200)), seed=5)
    text = tiny_run.write_text(tmp_path / "text.txt", tiny_run.lines(50, seed=3))
    foreign = tiny_run.make_tokenizer(tiny_run.lines(30, seed=9)[:3])
    foreign.save_pretrained(tmp_path / "tokenizer")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"teacher__name": other}, "is of another teacher"),
        ({"teacher__name": "bert-base-uncased"}, "is of the teacher"),
        ({"data__path": text}, "is of another text"),
        ({"mask__seed": 1}, "seed was 0 and is 1"),
        ({"mask__epochs": 3}, "epochs was 2 and is 3"),
        ({"mask__epochs": 0}, "mask.epochs=0 draws new masks"),
        ({"mask__group": 2}, "mask.group"),
        ({"loss__temperature": 3.0}, "the answers are for 2"),
        ({"loss__end": "{'temperature': 1.0}"}, "loss.end moves it"),
        ({"loss__tokens": "all"}, "for the predicted tokens alone"),
        ({"loss__divergence": "reverse_kl"}, "needs the teacher's probability of every word"),
        ({"loss__alpha_mse": 1.0}, "holds probabilities"),
        ({"loss__alpha_cos": 1.0}, "hidden states of the teacher's layers 3"),
        ({"loss__alpha_attention": 1.0}, "compares attentions"),
        ({"student__init": "teacher"}, "jaxdistill init-student"),
        ({"tokenizer__name": tmp_path / "tokenizer"}, "tokenizer"),
        ({"teacher__cache": tmp_path / "nothing"}, "is no teacher cache"),
        ({"student__overrides": "{'vocab_size': 80}"}, "80"),
    ]
    for values, words in cases:
        assert words in refused(tiny, tmp_path / "run", **{**sampled, **values}), values


@pytest.mark.slow
def test_a_cache_that_was_stopped_goes_on_to_the_same_answers(masked: Kept, tmp_path: Path, monkeypatch: Any) -> None:
    """And what is there is not computed again; other settings, or another process, are told so."""
    tiny, kept = masked
    values = {**MASKED, "cache__samples": 3}
    monkeypatch.setattr(caching, "SHARD_BYTES", 1 << 11)
    write, left = caching._Writer.write, [3]

    def failing(self: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(self)

    monkeypatch.setattr(caching._Writer, "write", failing)
    code, _, err = cache(tiny, tmp_path / "out", **values)
    assert code == 130 and "goes on with the rest" in err, err
    monkeypatch.undo()
    part = caches.open_cache(tmp_path / "out")
    whole = caches.open_cache(kept["sampled"])
    assert 0 < len(part) < len(whole) and not part.meta.texts
    assert "it is not finished" in refused(tiny, tmp_path / "run", **MASKED, teacher__cache=tmp_path / "out")
    code, out, err = cache(tiny, tmp_path / "out", **{**values, "train__batch_size": 8})
    assert code == 0 and f"{len(whole) - len(part)} of them new" in out, (out, err)
    again = caches.open_cache(tmp_path / "out")
    assert len(again) == len(whole)
    for shard in whole.shards:
        for number, key in enumerate(shard.keys):
            place = again.find(key.tobytes())
            assert place is not None
            np.testing.assert_array_equal(again.read(place, "samples"), whole.read((0, number), "samples"))
    code, _, err = cache(tiny, tmp_path / "out", **{**values, "cache__samples": 4})
    assert code == 2 and "samples=3, and this config asks for 4" in err
    code, _, err = cache(tiny, tiny.folder, **values)
    assert code == 2 and "something else than a cache" in err


@pytest.mark.slow
@pytest.mark.parametrize("batching", grids.everyday(["length", "packed"], "packed"))  # the one with more to go wrong
def test_causal_answers_belong_to_documents(tmp_path: Path, batching: str) -> None:
    """The live teacher's figures; and packed anew, whole documents find their answers, and `cache` adds the rest."""
    tiny = tiny_causal.make(tmp_path)
    values: dict[str, Any] = {
        "student__name": tmp_path / "student",
        "data__batching": batching,
        "loss__tokens": "all",
        "train__steps": 3,
    }
    if batching == "packed":
        text = tiny_run.write_text(tmp_path / "text.txt", tiny_run.lines(120))
        values |= {"data__source": "text", "data__prompt_column": "", "data__path": text}
    out = made(tiny, tmp_path / "cache", **values, **WHOLE)
    tiny_run.train(tiny, tmp_path / "live", **values)
    tiny_run.train(tiny, tmp_path / "cached", **values, teacher__cache=out)
    assert_alike(figures(tmp_path / "cached"), figures(tmp_path / "live"))
    if batching == "packed":
        lines = tiny_run.lines(120)
        moved = tiny_run.write_text(tmp_path / "moved.txt", lines[60:] + lines[:60])
        assert "lacks the answers" in refused(
            tiny, tmp_path / "run", **{**values, "data__path": moved}, teacher__cache=out
        )
        code, printed, _ = cache(tiny, out, **{**values, "data__path": moved}, **WHOLE)
        new = int(printed.split("examples, ")[1].split()[0].replace(",", ""))
        assert code == 0 and 0 < new < len(caches.open_cache(out)) / 2
        tiny_run.train(tiny, tmp_path / "again", **{**values, "data__path": moved}, teacher__cache=out)


@pytest.mark.slow
def test_the_plan_of_a_cached_run_has_no_teacher_to_compute(masked: Kept, tmp_path: Path) -> None:
    """What is left is the work of the same student without a teacher."""
    tiny, kept = masked
    work = {}
    for name, values in (
        ("cached", {"teacher__cache": kept["sampled"]}),
        ("live", {}),
        ("alone", {"teacher__name": "", "student__name": tiny.teacher}),
    ):
        sizes = {"student__overrides": "{}", "student__init": "random"} if name != "alone" else {}
        argv = ["plan", "--json", f"--config={tiny.recipe}", *tiny_run.overrides(**{**MASKED, **sizes, **values})]
        code, out, err = tiny_run.call(cli.main, argv)
        assert code == 0, err
        work[name] = json.loads(out)["flops"]
    assert work["alone"] <= work["cached"] < work["live"]
    assert work["cached"] - work["alone"] < (work["live"] - work["alone"]) / 2


@pytest.mark.slow
def test_a_damaged_cache_is_refused_by_name(masked: Kept, tmp_path: Path) -> None:
    tiny, kept = masked
    for file, damage in (
        ("shard-000-00000/samples.bin", b"\0" * 8),
        ("shard-000-00000/keys.bin", b"\0" * 16),
        ("shard-000-00000/shard.json", b"{"),
        ("meta.json", b'{"format_version": 2}'),
        ("meta.json", b"[]"),
        ("teacher/config.json", b"{"),
    ):
        out = tmp_path / file.replace("/", "-")
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(kept["sampled"], out)
        content = (out / file).read_bytes()
        (out / file).write_bytes(damage + content[len(damage) :] if file.endswith(".bin") else damage)
        said = refused(tiny, tmp_path / "run", **MASKED, teacher__cache=out)
        assert "cache" in said or "config.json" in said, said
    meta = json.loads((kept["sampled"] / "meta.json").read_text())
    assert meta["kind"] == "sampled" and meta["samples"] == 3
