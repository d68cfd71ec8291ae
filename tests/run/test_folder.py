"""A damaged run folder is said in one line, with the file and the value."""

import json

import pytest
import tiny
from refusal import refused

from jaxdistill import config as configs
from jaxdistill.config import Config
from jaxdistill.run import folder, writers

DEEP = "[" * 100_000 + "]" * 100_000


def write_config(workdir, **changed):
    values = json.loads(configs.to_json(Config())) | changed
    (workdir / "config.json").write_text(json.dumps(values))
    return values


def test_a_whole_config_is_itself_and_an_older_one_is_completed(tmp_path):
    values = write_config(tmp_path)
    assert folder.read_config(tmp_path) == values
    older = {**values, "train": {"steps": 7}, "a_section_of_another_version": {"x": 1}}
    older.pop("export")
    (tmp_path / "config.json").write_text(json.dumps(older))
    read = folder.read_config(tmp_path)
    assert read is not None and read["train"] == {**values["train"], "steps": 7} and read["export"] == values["export"]
    assert read["a_section_of_another_version"] == {"x": 1}


def test_a_value_that_a_younger_rule_forbids_is_read(tmp_path):
    write_config(tmp_path, checkpoint={"best": "a figure that there was once"})
    read = folder.read_config(tmp_path)
    assert read is not None and read["checkpoint"]["best"] == "a figure that there was once"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"train": None}, "train"),
        ({"train": []}, "train"),
        ({"train": {"steps": "x"}}, "train.steps"),
        ({"teacher": {"name": 3}}, "teacher.name"),
        ({"student": {"overrides": [1]}}, "student.overrides"),
        ({"loss": {"end": [1]}}, "loss.end"),
        ({"export": {"license": 3}}, "export.license"),
        ({"seed": {}}, "seed"),
        ({"data": {"batching": []}}, "data.batching"),
    ],
)
def test_a_config_with_a_value_of_another_type(tmp_path, changed, said):
    write_config(tmp_path, **changed)
    refused(lambda: folder.read_config(tmp_path), f"config.json is damaged: {said} (", "name another --workdir")


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "3", DEEP, '{"teacher": ' + DEEP + "}", "1" * 5000])
def test_a_config_that_is_none(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    refused(lambda: folder.read_config(tmp_path), str(tmp_path), "name another --workdir")


PROBE = {"input_ids": [[5, 6, 7], [8, 9, 1]], "attention_mask": [[True, True, True], [True, True, False]]}


def test_the_probe_is_read(tmp_path):
    (tmp_path / "probe.json").write_text(json.dumps(PROBE))
    probe = folder._read_probe(tmp_path / "probe.json", tiny.model("bert"))
    assert {name: x.tolist() for name, x in probe.items()} == PROBE


@pytest.mark.parametrize(
    "changed",
    [
        *({"input_ids": x} for x in (3, None, [], ["x"], [[]], [[1, 2], [3]], [[1.5] * 3] * 2, [[-5] * 3] * 2)),
        *({"input_ids": x} for x in ([[101] * 3] * 2, [[2**70] * 3] * 2, [[5] * 21] * 2, [[5, 6, 7]])),
        *({"attention_mask": x} for x in (None, [[True]], [[True, True, True]], [["x"] * 3] * 2)),
    ],
    ids=str,
)
def test_a_damaged_probe(tmp_path, changed):
    path = tmp_path / "probe.json"
    path.write_text(json.dumps({**PROBE, **changed}))
    refused(lambda: folder._read_probe(path, tiny.model("bert")), str(path), "is damaged")


@pytest.mark.parametrize("text", ["", "[]", "null", DEEP])
def test_a_probe_that_is_none(tmp_path, text):
    (tmp_path / "probe.json").write_text(text)
    refused(lambda: folder._read_probe(tmp_path / "probe.json", tiny.model("bert")), str(tmp_path / "probe.json"))


def test_lines_of_metrics_that_are_none_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = b'{"step": 1, "kind": "train"}\n'
    odd = [
        b'{"step": "1"}',
        b'{"step": null}',
        b"[1]",
        DEEP.encode(),
        b'{"step": 1e999}',
        b"\xff\xfe",
        b"1" * 5000,
        b"{}",
    ]
    path.write_bytes(b"\n".join(odd) + b"\n" + good)
    _, close = writers.jsonl(path, resume_at=1)
    close()
    assert path.read_bytes() == good
