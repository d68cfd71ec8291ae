"""Names of models and their configurations: what is read, and one clear line for what cannot be."""

import json
import shutil
import socket
import time

import pytest
import tiny
from real_configs import EUROBERT
from refusal import refused
from transformers import CONFIG_MAPPING

from jaxdistill import network
from jaxdistill.models import hub, tokenizer, transformers_5, weights
from jaxdistill.models.core.attention import FAR, Reach
from jaxdistill.models.core.rope import Rope
from jaxdistill.models.core.rows import ROWS
from jaxdistill.models.families import FAMILIES
from jaxdistill.models.flax.supported import has_flax_class
from jaxdistill.models.model import build_model
from jaxdistill.models.tokenizer import load_tokenizer

pytestmark = pytest.mark.newest


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
    refused(lambda: hub.resolve(str(tmp_path), revision="v1"), "revision 'v1' is of a hub name", "is a folder")
    refused(lambda: hub.resolve("not a name!"), "not a name!", "check the name")
    refused(lambda: hub.load_config(tmp_path), "has no config.json")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{", ["is not JSON"]),
        ("[]", ["model_type None"]),
        (
            '{"model_type": "t5"}',
            ["model_type 't5'", "bert, roberta, xlm-roberta, distilbert, electra, albert"],
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


def write_config(folder, kind, *without, **changed):
    fields = {name: value for name, value in tiny.config(kind).to_dict().items() if name not in without}
    (folder / "config.json").write_text(json.dumps({**fields, **changed}))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("BertForPreTraining", "bert"),
        ("TFBertModel", "bert"),
        ("RobertaForMaskedLM", "roberta"),
        ("XLMRobertaForMaskedLM", "xlm-roberta"),
        ("DistilBertForMaskedLM", "distilbert"),
        ("ElectraForPreTraining", "electra"),
        ("AlbertModel", "albert"),
        ("GPT2LMHeadModel", "gpt2"),
        ("GPTNeoForCausalLM", "gpt_neo"),
        ("OPTForCausalLM", "opt"),
        ("FlaxLlamaForCausalLM", "llama"),
    ],
)
def test_a_config_without_model_type_goes_by_its_architectures(tmp_path, caplog, name, kind):
    write_config(tmp_path, kind, "model_type", architectures=[name])
    config = hub.load_config(tmp_path)
    assert {**config.to_dict(), "architectures": None} == {**tiny.config(kind).to_dict(), "architectures": None}
    assert f"by its architectures, {name}, it is read as {kind}" in caplog.text


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra", "albert", "gpt2", "gpt_neo", "opt"])
def test_a_config_without_model_type_and_architectures_goes_by_its_fields(tmp_path, caplog, kind):
    folder = tmp_path / "albert-gpt2-bert"  # AutoConfig would go by this name
    folder.mkdir()
    write_config(folder, kind, "model_type", "architectures")
    assert hub.load_config(folder).to_dict() == tiny.config(kind).to_dict()
    assert f"by the names of its fields it is read as {kind}" in caplog.text


@pytest.mark.parametrize("named", [["T5Model"], ["BertModel", "GPT2Model"], "BertModel", [None], {}])
def test_a_config_that_says_no_family_is_refused(tmp_path, named):
    write_config(tmp_path, "bert", "model_type", "hidden_size", architectures=named)
    refused(lambda: hub.load_config(tmp_path), "model_type None", "bert, roberta")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "4d7a" * 16 + "\nsize 440449768\n"


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.txt",
        "spiece.model",
        "chat_template.jinja",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "flax_model.msgpack",
        "pytorch_model.bin",
    ],
)
def test_a_pointer_of_git_lfs_is_named_as_such(tmp_path, name):
    import tiny_run

    tiny_run.make_tokenizer(tiny_run.lines(20)).save_pretrained(tmp_path)
    tiny.config("bert").save_pretrained(tmp_path)
    (tmp_path / name).write_text(POINTER)

    def load():
        load_tokenizer(tmp_path)
        weights.load_params(tmp_path, build_model(hub.load_config(tmp_path)), allow_pickle=True)

    refused(load, f"{name} is a git-lfs pointer", "git lfs pull")


def test_a_shard_that_is_a_pointer(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-1-of-1.safetensors"}}')
    (tmp_path / "model-1-of-1.safetensors").write_text(POINTER)
    refused(lambda: weights.load_params(tmp_path, tiny.model("bert")), "model-1-of-1.safetensors is a git-lfs pointer")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A folder that stands for a repository of the hub, and what was fetched of it."""
    import huggingface_hub
    from huggingface_hub.utils._paths import filter_repo_objects

    here, fetched = tmp_path / "repository", tmp_path / "fetched"
    here.mkdir()
    fetched.mkdir()

    def snapshot_download(name, *, revision, allow_patterns, ignore_patterns):
        files = [str(file.relative_to(here)) for file in here.rglob("*") if file.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (fetched / file).parent.mkdir(exist_ok=True)
            shutil.copy(here / file, fetched / file)
        return str(fetched)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return here, fetched


def test_a_plan_fetches_no_weights(repository):
    here, fetched = repository
    for name in ("config.json", "model.safetensors", "flax_model.msgpack", "pytorch_model.bin"):
        (here / name).write_text("{}")
    assert hub.resolve("user/model", weights=False) == fetched
    assert [file.name for file in fetched.iterdir()] == ["config.json"]


def test_a_connection_that_is_lost(monkeypatch):
    import huggingface_hub

    class ReadError(Exception):
        """As httpx has, which derives from no error of Python's own."""

    def lost(*_, **__):
        raise ReadError("peer closed the connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lost)
    refused(lambda: hub.resolve("user/model"), "user/model is neither", "ReadError", "the network")


def files_that_are_read() -> set[str]:
    """By the loaders here and by the tokenizers of all families in transformers; without pickles."""
    from transformers import TOKENIZER_MAPPING
    from transformers.tokenization_utils_base import (
        ADDED_TOKENS_FILE,
        SPECIAL_TOKENS_MAP_FILE,
        TOKENIZER_CONFIG_FILE,
    )
    from transformers.utils.hub import CHAT_TEMPLATE_FILE

    names = {"config.json", "generation_config.json", *(name for names in tokenizer.FILES for name in names)}
    names |= {ADDED_TOKENS_FILE, SPECIAL_TOKENS_MAP_FILE, TOKENIZER_CONFIG_FILE, CHAT_TEMPLATE_FILE}
    for kind in tiny.INSTALLED:
        found = TOKENIZER_MAPPING.get(type(tiny.config(kind)), None)
        classes = found if isinstance(found, tuple) else (found,)  # transformers 5 has one class for each kind
        # The others are None, or stand in for a class that needs a package that is not installed.
        names |= {name for one in classes if type(one) is type for name in one.vocab_files_names.values()}
    return names


@pytest.mark.parametrize("allow_pickle", [False, True])
@pytest.mark.parametrize(
    ("there", "left"),
    [
        (("model.safetensors", "flax_model.msgpack", "pytorch_model.bin"), {"flax_model.msgpack", "pytorch_model.bin"}),
        (("model.safetensors.index.json", "model-1-of-1.safetensors", "flax_model.msgpack"), {"flax_model.msgpack"}),
        (("flax_model.msgpack",), set()),
        (("flax_model.msgpack", "pytorch_model.bin"), {"pytorch_model.bin"}),
        (("pytorch_model.bin.index.json", "pytorch_model-1-of-1.bin"), {"pytorch_model-1-of-1.bin"}),
    ],
)
def test_all_that_is_read_is_fetched(repository, there, left, allow_pickle):
    here, fetched = repository
    read = {*files_that_are_read(), *there}
    templates = {f"additional_chat_templates/{name}.jinja" for name in ("tool_use", "rag")}
    others = (
        "onnx",
        "a",
        "additional_chat_template",
        "additional_chat_templates_2",
        "2",
        "additional_chat_templates/a",
    )
    others = {f"{folder}/{name}" for folder in others for name in ("config.json", "model.safetensors", "x.jinja")}
    for name in {*read, *templates, *others, "own.py", "tf_model.h5", "README.md", "rust_model.ot"}:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("")
    hub.resolve("user/model", allow_pickle=allow_pickle)
    safe = any("safetensors" in name for name in there)
    left = left if safe or not allow_pickle else set()
    got = {str(file.relative_to(fetched)) for file in fetched.rglob("*") if file.is_file()}
    assert got == (read - left) | templates


def test_a_hub_that_does_not_answer_is_given_up_soon(tmp_path, monkeypatch):
    """A server that takes a connection and says nothing, as where a firewall drops packets; the cache is still read."""
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(network, "PATIENCE", 0.2)
        began = time.monotonic()
        refused(lambda: hub.resolve("somebody/model"), "somebody/model", "check the name and the network")
        assert time.monotonic() - began < 5
        snapshot = tmp_path / "models--somebody--model" / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        refs = tmp_path / "models--somebody--model" / "refs" / "main"
        refs.parent.mkdir()
        refs.write_text("abc")
        assert hub.resolve("somebody/model") == snapshot


def test_a_model_type_that_transformers_5_alone_knows(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(EUROBERT))
    if not transformers_5.is_5():
        refused(lambda: hub.load_config(tmp_path), "config.json: eurobert models need transformers 5", "pip install")
        return
    core = build_model(hub.load_config(tmp_path)).core
    assert core is not None and {layer.reach for layer in core.layers} == {Reach(FAR, FAR)}
    assert core.layers[0].rope == Rope(theta=250_000.0, size=64) and not core.projection_bias


@pytest.mark.slow
def test_every_model_type_of_transformers_works_or_ends_in_a_line(tmp_path):
    """A family by its default configuration; under transformers 5 some of them have no class that computes them."""
    path = tmp_path / "config.json"
    for kind in CONFIG_MAPPING:
        if kind not in FAMILIES:
            path.write_text(json.dumps({"model_type": kind}))
            refused(lambda: hub.load_config(tmp_path), f"model_type {kind!r} is none of the families here")
            continue
        path.write_text(json.dumps({**CONFIG_MAPPING[kind]().to_dict(), "model_type": kind}))
        config = hub.load_config(tmp_path)
        if kind in ROWS:
            assert build_model(config, classes="core").core is not None
        elif not has_flax_class(kind):
            refused(lambda config=config: build_model(config), f"no Flax class for {kind} models")
