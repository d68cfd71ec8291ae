"""Fields of config.json of a wrong type or size: one line before anything is made of them, for every family."""

import json
from functools import partial

import jax
import pytest
import tiny
from refusal import refused

from jaxdistill.models import hub
from jaxdistill.models.config_fields import check_fields
from jaxdistill.models.model import build_model, count_params, init_params, param_shapes
from jaxdistill.models.student import student_config

pytestmark = pytest.mark.newest

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")


def own(kind: str, name: str) -> str:
    """The name that the class of a family has for a size."""
    return tiny.config(kind).attribute_map.get(name, name)


@pytest.mark.parametrize("kind", tiny.INSTALLED)
def test_every_size_of_every_family(kind):
    fields = json.loads(tiny.config(kind).to_json_string(use_diff=False))
    check_fields("it", fields, kind=kind)
    for size in SIZES:
        name = own(kind, size)
        for wrong in ("12", "", None, 0, -1, 1.5, 12.0, True, [], [12], {}, 2**31, 2**70, float("nan")):
            changed = fields | {name: wrong}
            refused(partial(check_fields, "it", changed, kind=kind), f"it: {name} is {wrong!r}")


@pytest.mark.parametrize("kind", tiny.INSTALLED)
def test_sizes_that_no_machine_has_are_refused_with_their_bytes(kind):
    fields = tiny.CONFIGS[kind]
    layers, width = own(kind, "num_hidden_layers"), own(kind, "hidden_size")
    refused(
        lambda: check_fields("it", {**fields, layers: 200_000}, kind=kind), "it: a model of 200,000 layers", "bytes"
    )
    refused(lambda: check_fields("it", {**fields, width: 10**9}, kind=kind), "1,000,000,000 takes", "bytes")


def test_the_bytes_are_a_lower_bound():
    """Of a published model, whose size is known: BERT-base has 109,514,298 parameters, Llama 2 7B 6,738,415,616."""
    for kind, parameters in (("bert", 109_514_298), ("llama", 6_738_415_616)):
        from jaxdistill.models import config_fields

        sizes = {name: config_fields._defaults(kind).get(name) for name in config_fields._SIZES}
        assert 0.6 * parameters < config_fields._fewest_parameters(sizes, kind) <= parameters


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("bert", {"layer_norm_eps": "1e-12"}),
        ("bert", {"layer_norm_eps": -1.0}),
        ("bert", {"hidden_act": None}),
        ("bert", {"hidden_dropout_prob": "0.1"}),
        ("bert", {"type_vocab_size": 0}),
        ("roberta", {"pad_token_id": None}),
        ("albert", {"inner_group_num": 10**7}),
        ("gpt2", {"n_inner": "x"}),
        ("gpt2", {"hidden_size": 0}),  # the common name stands for n_embd
        ("gpt2", {"eos_token_id": [1, "x"]}),
        ("gpt2", {"pad_token_id": [1]}),
        ("bert", {"intermediate_size": None}),
        ("bert", {"layer_norm_eps": 2**70}),
        ("bert", {"initializer_range": -1}),
        ("albert", {"inner_group_num": 10**9, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}),
        ("gpt2", {"tie_word_embeddings": "no"}),
        ("gpt_neo", {"attention_types": [[["global"], 10**9]]}),
        ("gpt_neo", {"attention_types": [["global"]]}),
        ("llama", {"rope_theta": 0}),
        ("llama", {"head_dim": 10**9, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}),
        ("mistral", {"sliding_window": 0}),
        ("gemma", {"num_key_value_heads": None}),
        ("gemma", {"head_dim": None}),
        ("llama", {"rope_scaling": [1]}),
        ("llama", {"rope_scaling": {"rope_type": 3}}),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": "x"}}),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": []}}}),
    ],
)
def test_other_fields(kind, fields):
    refused(lambda: check_fields("it", fields, kind=kind), "it: ", str(next(iter(fields))))


def test_what_real_files_hold_is_accepted():
    for kind, fields in (
        ("llama", {"pad_token_id": -1, "rope_theta": 500000, "num_key_value_heads": None, "head_dim": None}),
        ("mistral", {"sliding_window": None, "eos_token_id": [1, 2]}),
        (
            "llama",
            {
                "rope_scaling": {
                    "factor": 32.0,
                    "high_freq_factor": 4.0,
                    "low_freq_factor": 1.0,
                    "original_max_position_embeddings": 8192,
                    "rope_type": "llama3",
                }
            },
        ),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0, 1], "long_factor": [1.5, 2]}}),
        ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}}),
        ("gemma2", {"final_logit_softcapping": None, "attn_logit_softcapping": None}),
        ("bert", {"hidden_dropout_prob": 0, "layer_norm_eps": 1e-12, "output_past": True, "gradient_checkpointing": 3}),
        ("albert", {"hidden_dropout_prob": 0.1}),
        ("gpt2", {"n_inner": None, "n_ctx": 1024, "task_specific_params": {"x": None}}),
        ("a_family_that_transformers_does_not_know", {"hidden_size": "x"}),
    ):
        check_fields("it", fields, kind=kind)


def test_files_and_overrides_are_checked(tmp_path):
    path = tmp_path / "config.json"
    for fields, said in (
        ({"model_type": "bert", "num_hidden_layers": 200_000}, "a model of 200,000 layers"),
        ({"model_type": "bert", "hidden_size": "768"}, "hidden_size is '768'"),
        ({"model_type": ["bert"]}, "model_type ['bert']"),
        ({"model_type": "bert", "id2label": "x"}, "cannot be read as a bert"),
        ({"architectures": 3}, "model_type None"),
    ):
        path.write_text(json.dumps(fields))
        refused(lambda: hub.load_config(tmp_path), str(path), said)
    path.write_text('{"model_type": "bert", "x": ' + "[" * 100_000 + "]" * 100_000 + "}")
    refused(lambda: hub.load_config(tmp_path), "is not JSON")
    random = student_config(tiny.config("bert"), family="bert", overrides={"intermediate_size": 10**15})
    refused(lambda: build_model(random), "intermediate_size is 1000000000000000")


def test_tables_of_positions_and_parameters_that_fit_nowhere():
    long = tiny.config("llama", max_position_embeddings=2**30)
    refused(lambda: build_model(long, classes="flax"), "1,073,741,824 positions")
    wide = build_model(tiny.config("bert", hidden_size=2**17, intermediate_size=2**20))
    assert count_params(param_shapes(wide)) > 2**37
    refused(lambda: init_params(wide, jax.random.key(0)), "this bert take", "bytes", "this process may have")
