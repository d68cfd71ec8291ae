"""Code that comes with a model, a tokenizer or a data set is never run, whatever stands on standard input."""

import ast
import io
import json
import sys
from pathlib import Path

import pytest
import tiny
import tiny_run

import jaxdistill
from jaxdistill import cli
from jaxdistill.config import Config
from jaxdistill.data.text import open_source
from jaxdistill.errors import UserError
from jaxdistill.models import hub
from jaxdistill.models.model import build_model
from jaxdistill.models.tokenizer import load_tokenizer

PACKAGE = Path(jaxdistill.__file__).parent
SCRIPTS = Path(__file__).parents[2] / "scripts"
# Calls that can run code of what they read: name -> the keyword without which they may, and its only safe value.
READERS = {
    "from_pretrained": ("trust_remote_code", False),
    "from_config": ("trust_remote_code", False),
    "load_dataset": ("trust_remote_code", False),
    "load_dataset_builder": ("trust_remote_code", False),
    "torch.load": ("weights_only", True),
}
NEVER = ("pickle.load", "pickle.loads", "eval", "get_class_from_dynamic_module", "import_module")


def calls(source: str) -> list[tuple[str, ast.Call]]:
    """(dotted name, call) of every call; a partial(f, ...) counts as a call of f."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found.append((ast.unparse(node.args[0]) if name.endswith("partial") and node.args else name, node))
    return found


def faults(source: str) -> list[str]:
    wrong = []
    for name, call in calls(source):
        values = {word.arg: getattr(word.value, "value", None) for word in call.keywords}
        for reader, (keyword, safe) in READERS.items():
            if name == reader or name.endswith(f".{reader}"):
                wrong += [name] if values.get(keyword) is not safe else []
        wrong += [name] if name in NEVER or values.get("allow_pickle") is True else []
    return wrong


def test_every_reader_in_the_package_and_its_scripts_is_told_to_run_nothing():
    sources = {path: path.read_text() for folder in (PACKAGE, SCRIPTS) for path in folder.rglob("*.py")}
    assert {path.name: wrong for path, text in sources.items() if (wrong := faults(text))} == {}
    found = [name.split(".")[-1] for text in sources.values() for name, _ in calls(text)]
    assert {"from_pretrained", "from_config", "load_dataset"} <= {*found}  # the scan finds what it looks for


@pytest.mark.parametrize(
    "text",
    [
        "AutoTokenizer.from_pretrained(folder)",
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)",
        "functools.partial(AutoTokenizer.from_pretrained, local_files_only=True)",
        "load_dataset(path)",
        "torch.load(file)",
        "np.load(file, allow_pickle=True)",
    ],
)
def test_the_scan_sees(text):
    assert len(faults(text)) == 1


@pytest.fixture
def standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 99))


def add_code(folder: Path, *, tokenizer_class: str, asked_in: str) -> Path:
    """Adds Python files that leave a mark, and asks for them; returns the mark."""
    mark = folder / "mark"
    code = (
        f"open({str(mark)!r}, 'w').close()\nfrom transformers import BertTokenizerFast as Own, BertConfig as Config\n"
    )
    (folder / "own.py").write_text(code)
    asks = {"AutoTokenizer": [None, "own.Own"], "AutoConfig": "own.Config", "AutoModelForMaskedLM": "own.Own"}
    asks |= {"FlaxAutoModelForMaskedLM": "own.Own"}
    settings = {"tokenizer_class": tokenizer_class, "auto_map": asks}
    if asked_in == "a list":  # as folders of 2021 have it
        settings["auto_map"] = asks["AutoTokenizer"]
    if asked_in != "config.json":
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((folder / "config.json").read_text())
    if asked_in == "config.json":
        (folder / "tokenizer_config.json").write_text("{}")
        config |= settings
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": asks}))
    return mark


@pytest.mark.parametrize("asked_in", ["tokenizer_config.json", "a list", "config.json"])
@pytest.mark.parametrize("tokenizer_class", ["OwnTokenizer", "BertTokenizer"])
def test_a_folder_leaves_no_mark(tmp_path, standard_input, tokenizer_class, asked_in):
    tiny.config("bert").save_pretrained(tmp_path)
    tiny_run.make_tokenizer(tiny_run.lines(20)).save_pretrained(tmp_path)
    mark = add_code(tmp_path, tokenizer_class=tokenizer_class, asked_in=asked_in)
    build_model(hub.load_config(tmp_path))
    try:
        assert type(load_tokenizer(tmp_path)).__module__.startswith("transformers.")
    except UserError as error:
        assert tokenizer_class == "OwnTokenizer" and "\n" not in str(error)
    assert not mark.exists()
    assert sys.stdin.read().count("y") == 99  # and no question was asked


def test_a_data_set_with_a_script_leaves_no_mark(tmp_path, standard_input):
    folder = tmp_path / "words"
    folder.mkdir()
    mark = tmp_path / "mark"
    (folder / "words.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    data = Config().changed(data={"source": "hf", "path": str(folder)}).data
    with pytest.raises(UserError):
        open_source(data, path=str(folder), split="train")
    assert not mark.exists() and sys.stdin.read().count("y") == 99


def test_no_command_runs_code_of_a_teacher(tiny, tmp_path, standard_input):
    mark = add_code(tiny.teacher, tokenizer_class="OwnTokenizer", asked_in="tokenizer_config.json")
    commands = [
        ["train", *tiny_run.arguments(tiny, tmp_path / "run", train__steps=1)],
        ["prepare", f"--config={tiny.recipe}"],
        ["init-student", f"--teacher={tiny.teacher}", "--layers=2", f"--out={tmp_path / 'student'}"],
        ["generate", f"--model={tiny.teacher}", f"--input={tiny.text}"],
    ]
    for command in commands:
        tiny_run.call(cli.main, command)
        assert not mark.exists(), command
    assert sys.stdin.read().count("y") == 99
