"""A configuration that the Flax class would compute differently from torch is refused by name."""

import pytest
import tiny
from refusal import refused

from jaxdistill.models.model import build_model


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"hidden_size": 15}, "hidden size 15 is not divisible by 2 heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"position_embedding_type": "relative_key"}, "'relative_key'"),
        ({"is_decoder": True}, "is_decoder"),
        ({"hidden_act": "mish"}, "activation 'mish' is none of gelu"),
    ],
)
def test_configurations_the_class_cannot_follow(fields, part):
    refused(lambda: build_model(tiny.config("bert", **fields), classes="flax"), part)


@pytest.mark.parametrize(
    ("kind", "fields", "part"),
    [
        ("gpt2", {"n_embd": 15}, "hidden size 15 is not divisible by 2 heads"),
        ("gpt2", {"activation_function": "mish"}, "activation 'mish'"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("opt", {"enable_bias": False}, "enable_bias is False"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine is False"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("llama", {"head_dim": 8}, "head_dim is 8"),
        ("llama", {"num_key_value_heads": 3}, "4 heads are not divisible by 3 key/value heads"),
        ("llama", {"rope_theta": 5e5}, "type 'default' with theta 500000"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "type 'linear'"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "with theta 500000"),
        ("llama", {"max_position_embeddings": 7}, "7 positions"),
        ("mistral", {"head_dim": 8}, "head_dim is 8"),
        ("mistral", {"rope_theta": 1e6}, "theta 1e+06"),
        ("mistral", {"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ("gemma", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type 'dynamic'"),
    ],
)
def test_configurations_the_causal_class_would_pass_over(kind, fields, part):
    refused(lambda: build_model(tiny.config(kind, **fields), classes="flax"), f"{kind} config: ", part)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llama", {"mlp_bias": True}),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("mistral", {"head_dim": 8, "attention_dropout": 0.1}),
    ],
)
def test_what_the_flax_class_cannot_follow_the_core_computes(kind, fields):
    assert build_model(tiny.config(kind)).classes == "flax"
    assert build_model(tiny.config(kind, **fields)).classes == "core"


def test_classes_that_are_asked_for_and_are_not_there():
    refused(lambda: build_model(tiny.config("qwen3"), classes="flax"), "classes=flax", "qwen3", "set classes to auto")
    refused(lambda: build_model(tiny.config("opt"), classes="core"), "classes=core", "not opt models", "to auto")
