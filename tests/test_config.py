"""An error in a recipe or an override is one line that names it; a valid config survives being written and read."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest
from pydantic.fields import FieldInfo

from jaxdistill import config as configs
from jaxdistill import recipe as recipes
from jaxdistill.config import Config
from jaxdistill.errors import UserError
from jaxdistill.knobs import Section, checked, resumable_of, rule_of, section_of
from jaxdistill.losses.terms import TERMS

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
        recipes.read(path, overrides)
    message = str(caught.value)
    assert message and "\n" not in message and "Traceback" not in message
    return message


def flat(config: Config) -> dict[str, Any]:
    return dict(configs.flat(config.model_dump()))


def knobs_of(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted key, field) of every knob."""
    for name, field in section.model_fields.items():
        if inner := section_of(field):
            yield from knobs_of(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


KNOBS = dict(knobs_of(Config))


def test_overrides_and_variants_apply(recipe):
    text = RECIPE.format(line="config.train.steps = 7 if variant == 'smoke' else 70")
    path = recipe(text=text)
    assert recipes.read(path, []).train.steps == 70
    config = recipes.read(f"{path}:smoke", ["--config.optim.learning_rate=1", "--config.data.buckets=(16,128)"])
    assert config.train.steps == 7
    assert config.optim.learning_rate == 1.0 and isinstance(config.optim.learning_rate, float)
    assert config.data.buckets == (16, 128)


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("[0,2]", (0, 2)),
        ("0,2", (0, 2)),
        ("6", 6),
        ("every_other", "every_other"),
        ("first:3", "first:3"),
    ],
)
def test_layers_take_every_form_of_the_command_line(recipe, given, value):
    assert recipes.read(recipe(), [f"--config.student.layers={given}"]).student.layers == value


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


# For every rule on one value: (values that break it, a value that keeps it).
RULES: dict[str, tuple[list[Any], Any]] = {
    "seed": ([-1, 2**31], 2**31 - 1),
    "teacher.also": ([(3,)], ("other",)),
    "teacher.weights": ([(0.0,), (-1.0,), (1e308,), (math.inf,), ("a",)], (2.0,)),
    "teacher.combine": (["logits"], "probabilities"),
    "teacher.dtype": (["float16"], "bfloat16"),
    "student.dtype": (["f32"], "bfloat16"),
    "teacher.attention": (["flash"], "own"),
    "teacher.classes": (["torch"], "core"),
    "student.attention": (["flash"], "own"),
    "student.classes": (["torch"], "core"),
    "student.remat": (["some"], "dots"),
    "teacher.devices": ([-1], 0),
    "student.devices": ([-1], 0),
    "student.init": (["zeros"], "teacher"),
    "student.width": ([-1], 0),
    "student.inner": ([-1], 0),
    "student.heads": ([-1], 0),
    "student.score_rows": ([0], 64),
    "student.family": (["gpt2"], "distilbert"),
    "student.layer_drop": ([-0.1, 1.0, float("nan")], 0.5),
    "student.layer_drop_depth": (["cubic"], "linear"),
    "student.layer_drop_schedule": (["cosine"], "linear"),
    "data.source": (["txt"], "jsonl"),
    "data.template": (["{prompt}", "{completion} {prompt}", "{prompt} {completion}."], "{prompt} => {completion}"),
    "data.limit": ([-1], 5),
    "data.max_document_bytes": ([0], 1),
    "data.max_field_lines": ([0], 1),
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
    "mask.epochs": ([-1], 0),
    "mask.seed": ([-1, 2**31], 7),
    "cache.kind": (["all"], "topk"),
    "cache.samples": ([0, 4097], 50),
    "cache.k": ([0], 64),
    "cache.dtype": (["bfloat16"], "float32"),
    "loss.temperature": ([0.0, -1.0, math.nan, math.inf], 1.0),
    "loss.tokens": (["some"], "masked"),
    "loss.share": ([0.0, 1.1], 0.2),
    "loss.student_side": ([-0.1, 2.5], 0.5),
    "loss.relation_heads": ([0], 12),
    "loss.relation_layer": ([-1], 0),
    "loss.divergence": (["kl"], "jsd"),
    "loss.beta": ([-0.1, 1.5], 0.1),
    "loss.head": (["auto"], "dense"),
    **{f"loss.alpha_{name}": ([-1.0, math.nan, math.inf], 3.0) for name in TERMS},
    "loss.layer_map": (["0,1", 3, (), ((0, 1), (1, 2), (0, 1)), ((-1, -1), (-1, -1))], ((0, 1), (0, 2), (1, 2))),
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
    "train.accumulation": ([-1], 2),
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
    "mesh.tensor": ([0], 2),
    "mesh.teacher_fsdp": ([-1], 0),
    "evaluate.every": ([-1], 1),
    "evaluate.batches": ([-1], 0),
    "evaluate.batch_size": ([0], 1),
    "evaluate.pseudo_rows": ([0], 1),
    "evaluate.pruned": ([(3,)], ("every_other",)),
    "evaluate.prompts": ([(3,)], ("a [MASK]",)),
    "evaluate.max_new_tokens": ([0], 1),
    "evaluate.rouge_rows": ([-1], 0),
    "checkpoint.every": ([-1], 1),
    "checkpoint.minutes": ([-1.0], 0.0),
    "checkpoint.keep": ([0], 1),
    "checkpoint.best": (["top1", "loss", "rouge1"], "clm_loss"),
    "log.every": ([0], 1),
    "log.profile": (["10", "13:10", "a:b", "-1:3"], "10:13"),
}


def valid() -> Any:
    config = configs.base()
    config.teacher.name, config.data.path = "teacher", "text.txt"
    return config


def valid_for_samples() -> Any:
    config = valid()
    config.loss.tokens, config.data.prompt_column = "labels", "article"
    return config


def validate(config: Any) -> Config:
    return recipes.validated(config.to_dict())


def test_every_rule_has_a_case():
    """The cases of evaluate.metrics and export.to are below: their messages name the item and not the whole value."""
    validated = {
        key for key, field in KNOBS.items() if any(isinstance(x, pydantic.AfterValidator) for x in field.metadata)
    }
    ruled = {key for key, field in KNOBS.items() if rule_of(field)} | validated
    assert RULES.keys() | {"evaluate.metrics", "export.to"} == ruled


@pytest.mark.parametrize("key", RULES)
def test_rules_on_one_value(key):
    refused_values, taken = RULES[key]
    for value in refused_values:
        config = valid()
        config.update_from_flattened_dict({key: value})
        with pytest.raises(UserError) as caught:
            validate(config)
        assert str(caught.value).startswith(f"config.{key}={value!r}: ") and "\n" not in str(caught.value)
    config = valid_for_samples()
    config.update_from_flattened_dict({key: taken})
    validate(config)


TWO = {"teacher.also": ("b",)}
APART = {"student.devices": 4, "teacher.devices": 2}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"data.path": ""}, "config.data.path is empty"),
        ({"train.steps": 0, "train.epochs": 0.0}, "config.train.steps and config.train.epochs are both 0"),
        ({f"loss.alpha_{name}": 0.0 for name in TERMS}, "no loss is enabled: set one of config.loss.alpha_ce"),
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
        (
            {"teacher.name": "", "student.name": "s", **TWO},
            "config.teacher.also=('b',) stand beside config.teacher.name",
        ),
        ({"teacher.also": ("b", "")}, "config.teacher.also=('b', '') holds an empty name"),
        ({"teacher.cache": ("a", "")}, "config.teacher.cache=('a', '') holds an empty name"),
        ({**TWO, "teacher.weights": (1.0,)}, "config.teacher.weights=(1.0,) must be as many as there are teachers, 2"),
        ({"teacher.weights": (1.0, 2.0)}, "config.teacher.weights=(1.0, 2.0) must be as many as there are teachers, 1"),
        ({**TWO, "teacher.cache": "c"}, "name a cache of each teacher in config.teacher.cache, and set also to ()"),
        ({**TWO, "loss.alpha_ce": 0.0}, "config.teacher.also=('b',): further teachers are for losses on logits"),
        ({**TWO, "loss.alpha_mse": 1.0, "teacher.combine": "probabilities"}, "config.loss.alpha_mse compares logits"),
        ({**TWO, **APART}, "several teachers run on the student's devices"),
        (
            {**TWO, "loss.tokens": "labels", "loss.alpha_entropy": 1.0},
            "alpha_entropy is of text that one teacher scores",
        ),
    ],
)
def test_rules_on_several_values(values, said):
    config = valid()
    config.update_from_flattened_dict(values)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        validate(config)
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
        ({"loss.alpha_relation": 1.0, "student.layer_drop": 0.1}, "may skip the student's last layer"),
        ({"loss.relation_weights": (0.0, 0.0, 0.0)}, "config.loss.relation_weights=(0.0, 0.0, 0.0) must be"),
        ({"loss.divergence": "distillm2"}, "config.loss.divergence=distillm2 has a side for what the student writes"),
        ({"loss.divergence": "distillm2", "loss.beta": 1.0, "sample.student": 0.5}, "makes distillm2 0 everywhere"),
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
    validate(config)
    config.update_from_flattened_dict(values)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        validate(config)
    assert "\n" not in str(caught.value)


def test_one_cache_or_several_are_named_by_a_recipe_and_by_a_flag(recipe):
    """A folder may be called by a number, which stays a text."""
    line = "config.teacher.cache = ('a', 'b'); config.student.name = 's'"
    assert recipes.read(recipe(line), []).teacher.caches == ("a", "b")
    for given, caches in (
        ("('a','b')", ("a", "b")),
        ("['a']", ("a",)),
        ("2024", ("2024",)),
        ("None", ("None",)),
        ("", ()),
    ):
        config = recipes.read(recipe("config.student.name = 's'"), [f"--config.teacher.cache={given}"])
        assert config.teacher.caches == caches
    assert "config.teacher.cache=3: must be of type str" in refused(recipe("config.teacher.cache = 3"))
    again = recipes.recorded(json.loads(configs.to_json(recipes.read(recipe(line), []))), [])
    assert again.teacher.cache == ("a", "b")


def test_valid_without_a_teacher_and_with_named_held_out_text():
    config = valid()
    config.update_from_flattened_dict({"teacher.name": "", "student.name": "student"})
    assert validate(config).losses == {"mlm": 2.0, "clm": 2.0}  # the model's kind decides
    config.update_from_flattened_dict({"data.eval_fraction": 0.0, "data.eval_path": "held.txt"})
    validate(config)


# Every kind of value that JSON writes in another form than the config has: tuples, tuples of tuples, dicts.
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
    values = valid()
    values.update_from_flattened_dict(RECORDED)
    config = validate(values)
    recorded = json.loads(configs.to_json(config))
    again = recipes.recorded(recorded, [])
    assert configs.to_json(again) == configs.to_json(config)
    assert configs.differences(recorded, config) == [] and configs.differences(recorded, again) == []
    assert type(again.data.buckets) is tuple and again.data.path == "text.txt"
    assert again.student.overrides == RECORDED["student.overrides"]
    other = recipes.recorded(recorded, ["--config.data.path=other.txt", "--config.evaluate.batches=7"])
    assert (other.data.path, other.evaluate.batches) == ("other.txt", 7)
    with pytest.raises(UserError, match=r"did you mean 'data\.path'"):
        recipes.recorded(recorded, ["--config.data.pth=x"])
    with pytest.raises(UserError, match=r"config\.log\.every=0"):
        recipes.recorded(recorded, ["--config.log.every=0"])


def test_a_recorded_key_of_another_version_is_said():
    recorded = json.loads(configs.to_json(validate(valid())))
    recorded["train"]["stesp"] = 3
    with pytest.raises(UserError, match=r"'train\.stesp'"):
        recipes.recorded(recorded, [])


# Values unlike the default, for knobs whose default does not show what a value looks like.
OTHER = {
    "student.layers": (0, 1),
    "student.overrides": {"hidden_size": 8},
    "loss.layer_map": ((0, 1),),
    "loss.relation_layer": 0,
    "loss.relation_weights": (1.0, 0.0, 0.0),
    "loss.end": {"temperature": 1.0},
    "data.buckets": (64, 128),
    "cache.temperatures": (1.0,),
    "cache.layers": (-1,),
    "teacher.weights": (2.0,),
}
RESUMABLE = ("evaluate.", "checkpoint.", "log.", "export.", "data.threads", "data.prefetch", "data.cache_dir")
RESUMABLE += ("data.max_document_bytes", "data.max_field_lines", "teacher.classes", "student.classes", "cache.")
RESUMABLE += ("mesh.", "train.accumulation", "student.remat")  # how the same updates are computed
RESUMABLE += tuple(f"{role}.{name}" for role in ("teacher", "student") for name in ("attention", "devices", "scan"))
# Knobs that name something whose content is compared instead, and knobs of the length of a run.
CONTENT = tuple(f"{role}.{name}" for role in ("teacher", "student", "tokenizer") for name in ("name", "revision"))
CONTENT += tuple(
    f"data.{name}"
    for name in (
        "source", "path", "column", "subset", "revision", "split", "streaming", "limit", "eval_path", "eval_split",
        "prepared", "token_counts",
    )
)  # fmt: skip
CONTENT += ("teacher.cache", "teacher.also")
LENGTH = ("train.steps", "train.epochs")


@pytest.mark.parametrize("key", sorted(KNOBS))
def test_differences_list_what_would_change_the_parameters(key):
    config = validate(valid())
    recorded = json.loads(configs.to_json(config))
    old = flat(config)[key]
    changes = {
        bool: lambda: not old,
        int: lambda: old + 1,
        float: lambda: old + 0.25,
        str: lambda: f"{old}x",
        tuple: lambda: OTHER.get(key) or old[::-1] or ("x",),
        type(None): lambda: OTHER[key],
    }
    new = changes[type(old)]()
    section, _, name = key.rpartition(".")
    other = config.changed(**{section: {name: new}}) if section else config.model_copy(update={name: new})
    kind = "content" if key in CONTENT else "length" if key in LENGTH else key.startswith(RESUMABLE)
    assert resumable_of(KNOBS[key]) == configs.resumable_in(key) == kind
    keys = [changed for changed, _, _ in configs.differences(recorded, other)]
    assert keys == ([] if kind else [key])


def test_every_knob_is_explained_in_a_sentence():
    """So is every section: docs/settings.md is made of nothing else."""
    explained = {key: field.description or "" for key, field in KNOBS.items()}
    explained |= {name: inner.__doc__ or "" for name, f in Config.model_fields.items() if (inner := section_of(f))}
    assert [key for key, text in explained.items() if not re.fullmatch(r".{5,}\.", text, re.DOTALL)] == []


def test_base_has_every_knob_at_its_default():
    assert dict(configs.flat(configs.base().to_dict())) == flat(Config())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"train": {"stesp": 3}}, "config.train has no 'stesp'; there are steps, epochs, limit_batches, batch_size, "),
        ({"trian": {}}, "config has no 'trian'; there are seed, teacher, "),
        ({"log": 3}, "config.log=3: must have the keys every, tensorboard, wandb"),
        ({"train": {"steps": "3"}}, "config.train.steps='3': must be of type int"),
        ({"student": {"overrides": 3}}, "config.student.overrides=3: must be of type dict[str, Any] | None"),
        ({"checkpoint": {"best": "top1"}}, "config.checkpoint.best='top1': must be one of '', perplexity, mlm_loss, "),
        ({"mask": {"replace": (0.5, 0.5)}}, "config.mask.replace=(0.5, 0.5): must be three shares "),
        ({"loss": {"temperature": math.inf}}, "config.loss.temperature=inf: must be above 0"),
        ({"sample": {"top_p": 0.0}}, "config.sample.top_p=0.0: must be above 0 and at most 1"),
        ({"seed": 2**31}, "config.seed=2147483648: must lie between 0 and 2147483647"),
        ({"evaluate": {"pruned": (3,)}}, "config.evaluate.pruned=(3,): must be texts"),
        ({"export": {"to": ("onnx", "flax")}}, "config.export.to holds 'onnx'; there are pytorch, flax"),
    ],
)
def test_messages_are_ours_and_not_those_of_pydantic(values, said):
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        checked(Config, values)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_every_recipe_of_the_repository_is_valid():
    paths = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
    assert paths
    for path in paths:
        for variant in ("", ":smoke"):
            recipes.read(f"{path}{variant}", ["--config.data.path=text.txt", "--config.tokenizer.name=tokenizer"])


RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("variant", ["smokee", "Smoke", "smoke ", "smoke:smoke", "full"])
def test_a_mistyped_variant_is_refused_by_every_recipe(path, variant):
    message = refused(f"{path}:{variant}")
    assert message.startswith(f"{path}: the recipe has no variant {variant!r}; there are ") and "smoke" in message
    for name in message.partition("there are ")[2].split(", "):  # what is listed can be given
        recipes.read(f"{path}:{name}", ["--config.data.path=text.txt", "--config.tokenizer.name=tokenizer"])


def test_a_colon_without_a_variant_is_refused(recipe):
    assert "ends with a colon" in refused(f"{recipe()}:")


def test_a_revision_is_of_the_hub_alone(tmp_path):
    for role in ("teacher", "student", "tokenizer"):
        for name, said in ((str(tmp_path), f"{tmp_path} is a folder"), ("", f"config.{role}.name is empty")):
            config = valid()
            config.student.name = "somebody/student"  # so that a run without a teacher has a start
            config.tokenizer.name = "somebody/tokenizer"
            config[role].name, config[role].revision = name, "main"
            with pytest.raises(UserError, match=re.escape(f"config.{role}.revision='main'")) as caught:
                validate(config)
            assert said in str(caught.value)
            config[role].name = "somebody/model"
            validate(config)
