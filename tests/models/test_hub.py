"""Names of models and their configurations: what is read, and one clear line for what cannot be."""

import json

import pytest
import tiny
from refusal import refused

from jaxdistill.models import hub


def test_a_local_folder_is_itself(tmp_path):
    assert hub.resolve(str(tmp_path)) == tmp_path


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    refused(lambda: hub.resolve(str(file)), "model.safetensors is a file", "folder")
    refused(lambda: hub.resolve(str(tmp_path / "none")), "none: there is no such folder")
    refused(lambda: hub.resolve("./none"), "./none: there is no such folder")
    refused(lambda: hub.resolve(""), "is empty")
    refused(lambda: hub.resolve("nobody/nothing", revision="v1"), "nobody/nothing at revision v1", "network")
    refused(lambda: hub.resolve("not a name!"), "not a name!", "check the name")
    refused(lambda: hub.load_config(tmp_path), "has no config.json")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{", ["is not JSON"]),
        ("[]", ["model_type None"]),
        (
            '{"model_type": "t5"}',
            ["model_type 't5'", "bert, roberta, xlm-roberta, distilbert, electra, albert, gpt2, gpt_neo, opt"],
        ),
    ],
)
def test_bad_config_json(tmp_path, text, parts):
    (tmp_path / "config.json").write_text(text)
    refused(lambda: hub.load_config(tmp_path), *parts)


def test_code_in_a_folder_is_not_run(tmp_path):
    fields = {**tiny.config("bert").to_dict(), "auto_map": {"AutoConfig": "evil.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    assert type(hub.load_config(tmp_path)).__name__ == "BertConfig"
    assert not (tmp_path / "ran").exists()
