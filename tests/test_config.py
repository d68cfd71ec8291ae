"""Whatever is wrong with a recipe or an override is one line that names it; what is right comes back as it was."""

import json
import math
import re
import tokenize
from pathlib import Path
from typing import Any

import pytest

from jaxdistill import config as configs
from jaxdistill.errors import UserError

RECIPE = """from jaxdistill.config import base
def get_config(variant=""):
    config = base()
    config.teacher.name = "teacher"
    config.data.path = "text.txt"
    {line}
    return config
"""


@pytest.fixture
def recipe(tmp_path):
    def write(line: str = "pass", text: str | None = None) -> str:
        path = tmp_path / "recipe.py"
        path.write_text(RECIPE.format(line=line) if text is None else text)
        return str(path)

    return write


def refused(path: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        configs.parse(path, overrides)
    message = str(caught.value)
    assert message and "\n" not in message and "Traceback" not in message
    return message


def flat(config: Any) -> dict[str, Any]:
    return dict(configs._flatten(config))


def test_overrides_and_variants_apply(recipe):
    text = RECIPE.format(line="config.train.steps = 7 if variant == 'smoke' else 70")
    path = recipe(text=text)
    assert configs.parse(path, []).train.steps == 70
    config = configs.parse(f"{path}:smoke", ["--config.optim.learning_rate=1", "--config.data.buckets=(16,128)"])
    assert config.train.steps == 7
    assert config.optim.learning_rate == 1.0 and isinstance(config.optim.learning_rate, float)
    assert config.data.buckets == (16, 128)


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("[0,2]", [0, 2]),
        ("0,2", (0, 2)),
        ("6", 6),
        ("every_other", "every_other"),
        ("first:3", "first:3"),
    ],
)
def test_layers_take_every_form_of_the_command_line(recipe, given, value):
    assert configs.parse(recipe(), [f"--config.student.layers={given}"]).student.layers == value


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--config.train.stesp=3", ["'train.stesp'", "did you mean 'train.steps'"]),
        ("--config.steps=3", ["'steps'", "did you mean 'train.steps'"]),
        ("--config.alpha_ce=3", ["'alpha_ce'", "did you mean 'loss.alpha_ce'"]),
        ("--config.train=3", ["'train'"]),
        ("--config.train.steps=abc", ["config.train.steps", "'abc'"]),
        ("--config.train.steps=3.5", ["config.train.steps", "'3.5'"]),
        ("--config.train.steps=None", ["config.train.steps", "'None'"]),
        ("--config.optim.learning_rate=None", ["config.optim.learning_rate", "'None'"]),
        ("--config.data.streaming=maybe", ["config.data.streaming", "'maybe'"]),
        ("--config.data.streaming", ["'--config.data.streaming'", "KEY=VALUE"]),
        ("--train.steps=3", ["'--train.steps=3'", "KEY=VALUE"]),
        ("steps", ["'steps'", "KEY=VALUE"]),
    ],
)
def test_bad_overrides(recipe, override, said):
    message = refused(recipe(), override)
    assert all(part in message for part in said), message


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("config.train.stesp = 3", ["line 6", "stesp", 'Did you mean "steps"']),
        ("config.trian.steps = 3", ["line 6", "'trian'", 'Did you mean "train"']),
        ("config.train.steps = 'many'", ["line 6", "'steps'", "many", "'int'"]),
        ("config.train.steps = 3.5", ["line 6", "'steps'", "3.5", "'int'"]),
        ("config.evaluate.metrics = 'perplexity'", ["line 6", "'metrics'", "perplexity", "'tuple'"]),
        ("config.train.steps = None", ["config.train.steps", "None", "int"]),
        ("config.optim.learning_rate = None", ["config.optim.learning_rate", "None", "float"]),
        ("config.data.path = None", ["config.data.path", "None", "str"]),
        ("config.train = None", ["no value", "'train.accumulation'"]),
        ("config.unlock(); config.train.stesp = 3", ["'train.stesp'", "did you mean 'train.steps'"]),
        ("return None", ["NoneType"]),
        ("return {'train': 3}", ["dict"]),
        ("undefined", ["line 6", "'undefined'"]),
        ("1 / 0", ["line 6", "division by zero"]),
        ("open('/nowhere/at/all')", ["line 6", "/nowhere/at/all"]),
    ],
)
def test_bad_recipes(recipe, line, said):
    path = recipe(line)
    message = refused(path)
    assert all(part in message for part in said), message
    assert path in message or "config." in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def get_config(:\n", "invalid syntax (recipe.py, line 1)"),
        ("\x00\x01", "null bytes"),
        ("", "no function get_config"),
        ("import no_such_module\n", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("from ml_collections import ConfigDict\ndef get_config(): return ConfigDict()\n", "jaxdistill.config.base()"),
    ],
)
def test_files_that_are_no_recipe(recipe, text, said):
    path = recipe(text=text)
    message = refused(path)
    assert path in message and said in message


def test_missing_file_and_variant(recipe, tmp_path):
    assert "'nowhere.py'" in refused("nowhere.py")
    assert str(tmp_path) in refused(f"{tmp_path}")
    path = recipe(text=RECIPE.format(line="pass").replace('variant=""', ""))
    assert "get_config() takes 0 positional arguments" in refused(f"{path}:smoke")


# Every rule on one value: (values it refuses, a value it takes).
RULES: dict[str, tuple[list[Any], Any]] = {
    "seed": ([-1, 2**31], 2**31 - 1),
    "teacher.dtype": (["float16"], "bfloat16"),
    "student.dtype": (["f32"], "bfloat16"),
    "teacher.attention": (["flash"], "own"),
    "student.attention": (["flash"], "own"),
    "student.remat": (["some"], "dots"),
    "teacher.devices": ([-1], 0),
    "student.devices": ([-1], 0),
    "student.init": (["zeros"], "teacher"),
    "student.family": (["gpt2"], "distilbert"),
    "student.layer_drop": ([-0.1, 1.0, float("nan")], 0.5),
    "student.layer_drop_depth": (["cubic"], "linear"),
    "student.layer_drop_schedule": (["cosine"], "linear"),
    "data.source": (["txt"], "jsonl"),
    "data.template": (["{prompt}", "{completion} {prompt}", "{prompt} {completion}."], "{prompt} => {completion}"),
    "data.limit": ([-1], 5),
    "data.eval_fraction": ([-0.1, 0.6, math.nan], 0.5),
    "data.max_length": ([3], 4),
    "data.min_tokens": ([2], 3),
    "data.max_unk_fraction": ([-0.1, 1.1], 1.0),
    "data.batching": (["rows"], "packed"),
    "data.buckets": ([(64, 64, 128), (128, 64), (2, 128), (64.5, 128), ("64", 128)], (64, 128)),
    "data.threads": ([0], 1),
    "data.prefetch": ([0], 1),
    "mask.fraction": ([0.0, 1.1, math.nan], 0.5),
    "mask.replace": ([(0.5, 0.5), (0.5, 0.6, -0.1), (0.8, 0.1, 0.2), ("a", "b", "c"), (None, 1, 0)], (1, 0, 0)),
    "mask.smoothing": ([-0.1, math.inf], 0.0),
    "mask.group": ([0], 1),
    "loss.temperature": ([0.0, -1.0, math.nan, math.inf], 1.0),
    "loss.tokens": (["some"], "masked"),
    "loss.divergence": (["kl"], "jsd"),
    "loss.beta": ([-0.1, 1.5], 0.1),
    "loss.head": (["auto"], "dense"),
    **{f"loss.alpha_{name}": ([-1.0, math.nan, math.inf], 3.0) for name in configs.ALPHAS},
    "loss.layer_map": (["0,1", 3, ()], ((0, 1),)),
    "loss.end": ([{"beta": 1.0}, {"temperature": 0.0}, {"alpha_ce": -1.0}, {"alpha_ce": "x"}], {"temperature": 1.0}),
    "loss.ramp": (["exponential"], "cosine"),
    "sample.student": ([-0.1, 1.1], 0.5),
    "sample.teacher": ([-0.1, 1.1], 1.0),
    "sample.max_new_tokens": ([0], 8),
    "sample.prompt_tokens": ([-1], 8),
    "sample.temperature": ([-1.0, math.inf], 0.0),
    "sample.top_k": ([-1], 5),
    "sample.top_p": ([0.0, 1.1], 0.9),
    "policy.semantics": (["trl"], "lmops"),
    "policy.mixture": ([-0.1, 1.0], 0.0),
    "policy.clip": ([-0.1, 1.0], 0.0),
    "policy.reuse": ([0], 4),
    "policy.gamma": ([-0.1, 1.1], 1.0),
    "policy.reward_scale": ([0.0], 1.0),
    "policy.reward_clip": ([0.0], 1.0),
    "policy.diversity_target": ([-0.1, 2.1], 1.0),
    "policy.entropy_target": ([-0.1], 0.0),
    "train.steps": ([-1], 1),
    "train.epochs": ([-1.0, math.inf], 0.5),
    "train.limit_batches": ([-1], 1),
    "train.batch_size": ([0], 8),
    "train.accumulation": ([0], 2),
    "train.freeze": ([("(",), (3,)], ("embeddings",)),
    "optim.name": (["adam"], "lion"),
    "optim.learning_rate": ([0.0, math.nan], 1.0),
    "optim.schedule": (["step"], "cosine"),
    "optim.warmup": ([-0.1, 1.1], 0.0),
    "optim.betas": ([(0.9,), (0.9, 1.0), (-0.1, 0.9), ("a", "b"), (None, 0.9)], (0.0, 0.5)),
    "optim.eps": ([0.0], 1e-8),
    "optim.weight_decay": ([-0.1], 0.1),
    "optim.no_decay": ([("[",)], ()),
    "optim.clip": ([-1.0], 0.0),
    "mesh.data": ([0, -2], 1),
    "mesh.fsdp": ([0], 2),
    "evaluate.every": ([-1], 1),
    "evaluate.batches": ([-1], 0),
    "evaluate.batch_size": ([0], 1),
    "evaluate.pseudo_rows": ([0], 1),
    "evaluate.pruned": ([(3,)], ("every_other",)),
    "evaluate.prompts": ([(3,)], ("a [MASK]",)),
    "evaluate.max_new_tokens": ([0], 1),
    "evaluate.rouge_rows": ([-1], 0),
    "checkpoint.every": ([-1], 1),
    "checkpoint.keep": ([0], 1),
    "checkpoint.best": (["top1", "loss"], ""),
    "log.every": ([0], 1),
}


def valid() -> Any:
    config = configs.base()
    config.teacher.name, config.data.path = "teacher", "text.txt"
    return config


def valid_for_samples() -> Any:
    config = valid()
    config.loss.tokens, config.data.prompt_column = "labels", "article"
    return config


def test_every_rule_has_a_case():
    assert RULES.keys() == configs.RULES.keys()


@pytest.mark.parametrize("key", RULES)
def test_rules_on_one_value(key):
    refused_values, taken = RULES[key]
    for value in refused_values:
        config = valid()
        config.update_from_flattened_dict({key: value})
        with pytest.raises(UserError) as caught:
            configs.validate(config)
        assert str(caught.value).startswith(f"config.{key}={value!r}: ") and "\n" not in str(caught.value)
    config = valid_for_samples()
    config.update_from_flattened_dict({key: taken})
    configs.validate(config)


APART = {"student.devices": 4, "teacher.devices": 2}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"data.path": ""}, "config.data.path is empty"),
        ({"train.steps": 0, "train.epochs": 0.0}, "config.train.steps and config.train.epochs are both 0"),
        ({f"loss.alpha_{name}": 0.0 for name in configs.ALPHAS}, "no loss is enabled: set one of config.loss.alpha_ce"),
        (
            {"teacher.name": "", "student.name": "s", "loss.alpha_mlm": 0.0, "loss.alpha_clm": 0.0},
            "without a teacher only alpha_mlm and",
        ),
        ({"teacher.name": ""}, "config.teacher.name is empty"),
        ({"teacher.name": "", "student.init": "random"}, "config.teacher.name is empty"),
        (
            {"teacher.name": "", "student.init": "random", "student.overrides": {"model_type": "bert"}},
            "config.tokenizer.name is empty",
        ),
        ({"student.family": "distilbert", "student.init": "random"}, "config.student.family='distilbert'"),
        ({"student.family": "distilbert", "student.name": "s"}, "config.student.family='distilbert'"),
        ({"data.buckets": (64,)}, "config.data.buckets=(64,): the last must be config.data.max_length=128"),
        ({"data.eval_fraction": 0.0}, "config.data.eval_fraction is 0"),
        ({"train.batch_size": 12}, "config.train.batch_size=12 must be a multiple of train.accumulation=1 x"),
        ({"train.batch_size": 24, "train.accumulation": 2}, "config.train.batch_size=24 must be a multiple"),
        ({"evaluate.metrics": ("bleu",)}, "config.evaluate.metrics holds 'bleu'"),
        ({"export.to": ("onnx",)}, "config.export.to holds 'onnx'"),
        ({"teacher.devices": 2}, "config.student.devices=0 and config.teacher.devices=2 go together"),
        ({"student.devices": 2}, "config.student.devices=2 and config.teacher.devices=0 go together"),
        ({**APART, "teacher.name": "", "student.name": "s"}, "config.teacher.devices=2, and there is no teacher"),
        ({**APART, "mesh.data": 2}, "config.mesh.data=2 is of one mesh for both models"),
        ({**APART, "mesh.fsdp": 4}, "config.mesh.fsdp=4 must divide config.student.devices=4 and config.teacher.d"),
    ],
)
def test_rules_on_several_values(values, said):
    config = valid()
    config.update_from_flattened_dict(values)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        configs.validate(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"sample.student": 0.6, "sample.teacher": 0.6}, "add up to more than 1"),
        ({"sample.teacher": 0.5, "teacher.name": "", "student.name": "s"}, "no config.teacher.name says who writes"),
        ({"sample.student": 0.5, "loss.alpha_ce": 0.0}, "only config.loss.alpha_ce and alpha_mse teach it"),
        ({"sample.student": 0.5, "loss.tokens": "all"}, "config.loss.tokens='all': it must be labels"),
        ({"sample.student": 0.5, "data.batching": "packed"}, "config.data.batching=packed has no prompts"),
        ({"sample.student": 0.5, "data.prompt_column": ""}, "config.sample.prompt_tokens is 0 and there is no"),
        ({"sample.student": 0.5, "sample.max_new_tokens": 128}, "leaves no room for a prompt"),
        ({"loss.alpha_policy": 1.0, "sample.student": 0.5}, "config.loss.alpha_policy samples rows of its own"),
        ({"loss.alpha_policy": 1.0, "sample.temperature": 0.9}, "leave config.sample.temperature, top_k and top_p"),
        ({"loss.alpha_policy": 1.0, "student.layer_drop": 0.1}, "and a part of it would learn from that"),
        (
            {"loss.alpha_entropy": 1.0, "teacher.name": "", "student.name": "s"},
            "config.policy.mixture is set, and there is no teacher",
        ),
        (
            {"loss.alpha_policy": 1.0, "policy.reuse": 3, "checkpoint.every": 6, "train.steps": 20},
            "config.train.steps=20 must be a multiple of config.policy.reuse=3",
        ),
        ({"loss.alpha_policy": 1.0, "policy.reuse": 3}, "config.checkpoint.every=0 must be a multiple"),
        ({**APART, "sample.teacher": 0.5}, "models that write text run on the same devices"),
        ({**APART, "loss.alpha_policy": 1.0}, "models that write text run on the same devices"),
    ],
)
def test_rules_on_what_is_sampled(values, said):
    config = valid_for_samples()
    configs.validate(config)
    config.update_from_flattened_dict(values)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        configs.validate(config)
    assert "\n" not in str(caught.value)


def test_valid_without_a_teacher_and_with_named_held_out_text():
    config = valid()
    config.update_from_flattened_dict({"teacher.name": "", "student.name": "student"})
    assert configs.alphas(config) == {"mlm": 2.0, "clm": 2.0}  # the model's kind decides
    config.update_from_flattened_dict({"data.eval_fraction": 0.0, "data.eval_path": "held.txt"})
    configs.validate(config)


# Two of every kind of value that JSON writes otherwise than the config holds it: tuples, tuples of tuples, objects.
RECORDED = {
    "student.layers": [0, 2],
    "student.init": "random",
    "student.overrides": {"hidden_size": 8, "model_type": "bert"},
    "loss.layer_map": ((0, 1), (-1, -1)),
    "loss.alpha_hidden_mse": 1.0,
    "data.buckets": (64, 128),
    "mask.replace": (1, 0, 0),
    "evaluate.prompts": ("a [MASK]",),
}


def test_what_is_recorded_comes_back():
    config = valid()
    config.update_from_flattened_dict(RECORDED)
    recorded = json.loads(configs.to_json(config))
    again = configs.apply(recorded, [])
    assert configs.to_json(again) == configs.to_json(config)
    assert configs.changed(recorded, config) == [] and configs.changed(recorded, again) == []
    assert type(again.data.buckets) is tuple and again.data.path == "text.txt"
    assert dict(again.student.overrides) == RECORDED["student.overrides"]
    other = configs.apply(recorded, ["--config.data.path=other.txt", "--config.evaluate.batches=7"])
    assert (other.data.path, other.evaluate.batches) == ("other.txt", 7)
    with pytest.raises(UserError, match=r"did you mean 'data\.path'"):
        configs.apply(recorded, ["--config.data.pth=x"])
    with pytest.raises(UserError, match=r"config\.log\.every=0"):
        configs.apply(recorded, ["--config.log.every=0"])


def test_a_recorded_key_of_another_version_is_said():
    recorded = json.loads(configs.to_json(valid()))
    recorded["train"]["stesp"] = 3
    with pytest.raises(UserError, match=r"'train\.stesp'"):
        configs.apply(recorded, [])


@pytest.mark.parametrize("key", sorted(flat(configs.base())))
def test_changed_lists_what_would_change_the_parameters(key):
    recorded, config = json.loads(configs.to_json(valid())), valid()
    old = flat(config)[key]
    new = {bool: lambda: not old, int: lambda: old + 1, float: lambda: old + 0.25, str: lambda: f"{old}x",
           tuple: lambda: (*old, 3), type(None): lambda: [0, 1]}[type(old)]()  # fmt: skip
    config.update_from_flattened_dict({key: new})
    resumable = key.startswith(configs.RESUMABLE)
    keys = [changed for changed, _, _ in configs.changed(recorded, config)]
    assert keys == ([] if resumable else [key])


def test_every_key_has_a_comment_once():
    """The source of base() is the only list of what can be set: every key stands in it once, and says what it is."""
    with Path(configs.__file__).open("rb") as file:
        tokens = list(tokenize.tokenize(file.readline))
    commented = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    keys: dict[str, bool] = {}
    for number, line in enumerate(Path(configs.__file__).read_text().splitlines(), start=1):
        if found := re.match(r"    config\.([a-z_.]+) = (?!ConfigDict)", line):
            assert found[1] not in keys, f"{found[1]} is set twice"
            keys[found[1]] = number in commented or number - 1 in commented
    assert keys.keys() == flat(configs.base()).keys()
    assert [key for key, has in keys.items() if not has] == []


def test_every_recipe_of_the_repository_is_valid():
    recipes = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
    assert recipes
    for path in recipes:
        for variant in ("", ":smoke"):
            configs.parse(f"{path}{variant}", ["--config.data.path=text.txt", "--config.tokenizer.name=tokenizer"])
