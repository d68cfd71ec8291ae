"""Every row of the README's table of settings works with the recipe that it stands beside."""

import collections
import dataclasses
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grids
import pytest
import tiny_causal
import tiny_run

from jaxdistill import recipe
from jaxdistill.config import Config, flat
from jaxdistill.errors import UserError
from jaxdistill.run.assemble import assemble

ROOT = Path(__file__).parents[1]
KEYS = dict(flat(Config().model_dump()))


@dataclasses.dataclass
class Case:
    """A way to do what a row says."""

    row: str  # its first cell
    recipe: str
    settings: dict[str, str]


def rows() -> Iterator[tuple[str, str]]:
    section = (ROOT / "README.md").read_text().partition("\n## Settings\n")[2].partition("\n## ")[0]
    for line in section.splitlines():
        first, *rest = re.split(r"(?<!\\)\|", line.strip().strip("|"))
        if rest and set(first.strip()) != {"-"} and first.strip() != "to get":
            yield first.strip(), rest[0]


def cases() -> Iterator[Case]:
    """The ways to do what each row says: each `KEY=VALUE` together, those after "or" apart, a `VALUE` in its turn."""
    for first, second in rows():
        path = "gpt2_kd.py" if first.startswith("causal models") else "bert_mlm.py"
        path = next(iter(re.findall(r"configs/(\w+\.py)", second)), path)
        settings: dict[str, str] = {}
        key = section = ""
        for before, span in re.findall(r"([^`]*)`([^`]+)`", second):
            name, equals, value = span.partition("=")
            section = name.rpartition(".")[0] or section
            if equals:
                assert name in KEYS, f"{name} in the row {first!r} is no setting"
                if settings and re.search(r"\bor\b", before):
                    yield Case(first, path, settings)
                    settings = {}
                key, settings = name, {**settings, name: value}
            elif f"{section}.alpha_{name.rpartition('_')[2]}" in KEYS or span in KEYS:
                if "alpha_" in name:  # a weight
                    named = name if "." in name else f"{section}.{name}"
                    assert named in KEYS, f"{named} in the row {first!r} is no setting"
                    yield Case(first, path, {named: "1.0"})
            elif key and not span.endswith((".py", ".*")) and "before" not in before and "is the" not in before:
                yield Case(first, path, {**settings, key: span})
        if settings:
            yield Case(first, path, settings)


CASES = list(cases())
# One value of each row, recipe and set of keys is tried, all in the whole grid; the others are checked as settings.
ALIKE = {(case.row, case.recipe, *case.settings): case for case in reversed(CASES)}
TRIED = CASES if grids.FULL else list(reversed(ALIKE.values()))


def in_shell(settings: dict[str, str]) -> dict[str, str]:
    """The values as bash gives them to a program."""
    words = " ".join(f"{key}={value}" for key, value in settings.items())
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {words}"], capture_output=True, text=True, check=True)
    given = dict(word.split("=", 1) for word in done.stdout.split("\0")[:-1])
    assert given.keys() == settings.keys(), f"a shell splits {words} into other words"
    return given


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Small models, the teacher with the layers of BERT-base, and the same text from every source."""
    import datasets
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("files")
    texts = tiny_run.lines(400)
    tokenizer = tiny_run.make_tokenizer(texts)
    teacher = tiny_run.write_model(folder / "teacher", tokenizer, num_hidden_layers=12)
    wide = tiny_run.write_model(
        folder / "wide", tokenizer, num_hidden_layers=1, hidden_size=16, num_attention_heads=8, intermediate_size=768
    )
    student = tiny_run.write_model(folder / "student", tokenizer, num_hidden_layers=2)
    (folder / "causal").mkdir()
    causal = tiny_causal.make(folder / "causal")
    (folder / "text.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts))
    for name in ("text.csv", "text.tsv"):
        (folder / name).write_text("".join(f"{text}\n" for text in ("text", *texts)))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "text.parquet")
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(folder / "text.hf")
    return {
        "teacher": teacher,
        "wide": wide,
        "student": student,
        "text": tiny_run.write_text(folder / "text.txt", texts),
        "cache": folder / "cache",
        "pairs": causal.text,
        "gpt2": causal.teacher,
        "gpt2-student": causal.folder / "student",
        **{f"text.{kind}": folder / f"text.{kind}" for kind in ("csv", "tsv", "jsonl", "parquet", "hf")},
    }


def small(case: Case, files: dict[str, Path]) -> dict[str, object]:
    """Settings that make a recipe small, besides those of the case."""
    short = {"data.max_length": 32, "data.buckets": (32,), "data.cache_dir": files["cache"]}
    if case.recipe == "gpt2_kd.py":
        models = {"teacher.name": files["gpt2"], "student.name": files["gpt2-student"], "data.path": files["pairs"]}
        return {**short, **models, "sample.max_new_tokens": 8, "evaluate.max_new_tokens": 8}
    if case.recipe == "bert_layerdrop_teacher.py":
        return {**short, "train.batch_size": 128}
    teacher = files["wide" if case.settings.get("student.init") == "importance" else "teacher"]
    return {**short, "teacher.name": teacher, "data.path": files["text"]}


def test_the_table_is_read() -> None:
    """Every row has a case, and their keys and values are those that a run takes."""
    assert {case.row for case in CASES} == {first for first, _ in rows()} and len(CASES) >= 40
    paths = {"folder": "x", "...": "x"}
    for case in CASES:
        given = {key: paths.get(value, value) for key, value in in_shell(case.settings).items()}
        read(case, {**small(case, collections.defaultdict(lambda: Path("x"))), **given})


@pytest.mark.slow
@pytest.mark.parametrize("case", TRIED, ids=lambda case: f"{case.recipe}-{case.settings}")
def test_a_row_works_with_its_recipe(case: Case, files: dict[str, Path], tmp_path: Path) -> None:
    settings = in_shell(case.settings)
    stand_ins = {
        ("student.name", "folder"): files["student"],
        ("tokenizer.name", "folder"): files["teacher"],
        ("data.column", "..."): "text",
    }
    given = {key: stand_ins.get((key, value), value) for key, value in settings.items()}
    if source := settings.get("data.source"):
        if source == "tfds":
            pytest.importorskip("tensorflow_datasets")
        given["data.path"] = files[f"text.{source}"]
    config = read(case, {**small(case, files), **given})
    if settings.get("teacher.attention") == "cudnn":
        with pytest.raises(UserError, match="is a kernel of NVIDIA's GPUs"):
            assemble(config, tmp_path / "run", allow_pickle=False)
    else:
        assert assemble(config, tmp_path / "run", allow_pickle=False).steps > 0


def read(case: Case, values: dict[str, object]) -> Config:
    variant = ":smoke" if case.recipe == "bert_layerdrop_teacher.py" else ""
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    return recipe.read(f"{ROOT / 'configs' / case.recipe}{variant}", flags)
