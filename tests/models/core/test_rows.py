"""Configurations are read field by field: every field is read, passed over knowingly, or refused by name."""

import dataclasses
import inspect
import json

import numpy as np
import pytest
import tiny_core
from real_configs import REAL
from refusal import refused
from transformers import CONFIG_MAPPING, PretrainedConfig

from jaxdistill.models import hub, transformers_5
from jaxdistill.models.core.reader import SAYS_NOTHING, reader_of
from jaxdistill.models.core.rope import Rope, frequencies
from jaxdistill.models.core.rows import ROWS, read_settings
from jaxdistill.models.model import build_model

_OF_THE_CODE = {"self", "kwargs"}


def _own_fields(cls: type) -> set[str]:
    """The fields of a configuration class that its base class does not have (which 5's signatures repeat)."""
    if not dataclasses.is_dataclass(cls):
        return set(inspect.signature(cls.__init__).parameters) - _OF_THE_CODE
    own = [one for one in cls.__mro__ if issubclass(one, PretrainedConfig) and one is not PretrainedConfig]
    return {name for one in own for name in vars(one).get("__annotations__", {})}


@pytest.mark.parametrize("kind", [kind for kind in ROWS if kind in CONFIG_MAPPING])
def test_every_field_of_the_class_is_read_or_known_to_say_nothing(kind):
    """A field that a later version adds fails this test, and at run time its values are refused."""
    fields = _own_fields(CONFIG_MAPPING[kind])
    read = reader_of(CONFIG_MAPPING[kind]())
    ROWS[kind](read)
    unread = fields - read.asked - SAYS_NOTHING
    assert unread <= _REFUSED.get(kind, set()), unread


# Fields that are refused where they say something.
_REFUSED = {
    **{key: {"use_bidirectional_attention"} for key in ("gemma", "gemma2", "gemma3_text")},
    **{key: {"add_cross_attention"} for key in ("bert", "roberta", "xlm-roberta")},
    "gpt2": {"add_cross_attention", "scale_attn_by_inverse_layer_idx"},
}


@pytest.mark.parametrize("name", REAL)
def test_configurations_of_the_hub_are_accepted(name, tmp_path):
    fields, wanted = REAL[name]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    model = build_model(hub.load_config(tmp_path))
    assert model.core is not None
    assert {key: getattr(model.core, key) for key in wanted} == wanted


@pytest.mark.parametrize(
    ("kind", "fields", "part"),
    [
        ("qwen3", {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ("qwen3", {"a_new_field": 3}, "a_new_field is 3, which is not known here"),
        ("qwen3", {"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ("qwen3", {"head_dim": 5}, "5 of the 5 entries of a head are rotated"),
        ("qwen3", {"num_key_value_heads": 3}, "4 heads are not divisible by 3"),
        ("qwen3", {"attention_dropout": 1.5}, "attention_dropout is 1.5"),
        ("qwen3", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "factor is missing"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "new": 2}}, "new is 2"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("smollm3", {"no_rope_layers": [1, 2, 0]}, "no_rope_layers is [1, 2, 0]"),
        ("modernbert", {"rope_scaling": 3}, "rope_scaling is 3"),
    ],
)
def test_what_is_refused(kind, fields, part):
    form = next(form for one, form in tiny_core.FORMS if one == kind)
    try:
        config = tiny_core.config(kind, form, **fields)
    except Exception:  # whatever a class of transformers 5 raises of a value; those of 4 accept all of these
        assert transformers_5.is_5()
        pytest.skip("the configuration class itself refuses this")
    refused(lambda: read_settings(config), f"{kind} config", part)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"model_type": "qwen3_moe", "num_experts": 128}, "'qwen3_moe', a mixture of experts,"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "'mixtral', a mixture of experts,"),
        ({"model_type": "gemma3", "vision_config": {"hidden_size": 8}}, "'gemma3', a model of more than text,"),
        ({"model_type": "qwen3_next", "linear_num_key_heads": 16}, "'qwen3_next', a hybrid of attention"),
        ({"model_type": "t5", "num_decoder_layers": 2}, "'t5', an encoder with a decoder,"),
    ],
)
def test_kinds_of_models_that_are_refused(fields, part, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    refused(lambda: hub.load_config(tmp_path), part, "none of the families here")


def test_layer_types_that_do_not_fit():
    config = tiny_core.config("qwen3", "plain")
    config.layer_types = ["full_attention"]
    refused(lambda: read_settings(config), "layer_types is ['full_attention']", "3 layers")
    config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    refused(lambda: read_settings(config), "'linear_attention'")


# Spellings of transformers 4, and of 5, of the same model.
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
_STRETCHED = {"rope_type": "linear", "factor": 3.0}
SPELLINGS = {
    "flat": (
        "llama",
        "plain",
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **_LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **_LLAMA3}},
    ),
    "nested": (
        "gemma3_text",
        "plain",
        {"rope_theta": 1e6, "rope_local_base_freq": 2e4, "rope_scaling": _STRETCHED},
        {
            "rope_scaling": None,
            "rope_parameters": {
                "full_attention": {"rope_theta": 1e6, **_STRETCHED},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            },
        },
    ),
    "of one kind of layer": (
        "olmo3",
        "yarn",
        {"rope_theta": 5e5, "rope_scaling": _STRETCHED},
        {"rope_scaling": None, "rope_parameters": {"rope_theta": 5e5, **_STRETCHED}},
    ),
    "modernbert": (
        "modernbert",
        "plain",
        {"global_rope_theta": 1e6, "local_rope_theta": 2e4},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            },
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_both_spellings_of_rotary_positions_give_equal_settings(name):
    kind, form, of_4, of_5 = SPELLINGS[name]
    if kind == "olmo3" and transformers_5.is_5():
        pytest.skip("its class in transformers 5 reads positions by kind of layer alone, and so does the core there")
    wanted = read_settings(tiny_core.config(kind, form, **of_4))
    assert wanted != read_settings(tiny_core.config(kind, form))
    assert read_settings(tiny_core.config(kind, form, **of_5)) == wanted


ROPES = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 8.0},
    "llama3": {"rope_type": "llama3", **_LLAMA3, "original_max_position_embeddings": 8192},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
}


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_are_torchs(name):
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    sizes = {"head_dim": 128, "rope_theta": 1e6, "max_position_embeddings": 131072}
    config = tiny_core.config("llama", "plain", **sizes, rope_scaling=ROPES[name] or None)
    if name not in ROPE_INIT_FUNCTIONS:
        pytest.skip("transformers 5 has no function for positions that are not scaled")
    wanted, factor = ROPE_INIT_FUNCTIONS[name](config, torch.device("cpu"))
    rope = read_settings(config).layers[0].rope
    assert rope is not None
    got = frequencies(rope)
    np.testing.assert_allclose(got, wanted.numpy(), rtol=3e-7)
    if name == "yarn":
        assert rope.scaling.attention_factor == pytest.approx(factor)


def test_angles_far_into_a_text_are_torchs():
    """At position 130,000 one unit in the last place of a frequency is 4e-3 in the cosine."""
    import torch

    exponents = torch.arange(0, 128, 2, dtype=torch.int64).float() / 128
    wanted = (1.0 / (1e6**exponents)).numpy()
    got = frequencies(Rope(theta=1e6, size=128))
    assert (got == wanted).mean() > 0.9
    np.testing.assert_allclose(np.cos(130_000 * got), np.cos(130_000 * wanted), atol=1e-2)
