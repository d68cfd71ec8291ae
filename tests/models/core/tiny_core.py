"""Tiny random models of the families that the core computes, with a form for every field that changes the computation.

Sizes are unlike any default, heads are not width / heads where a family allows it, and windows are shorter than rows.
"""

import functools
from typing import Any

import jax
import numpy as np
import torch
import transformers

from jaxdistill.models import torch_names
from jaxdistill.models.core import network
from jaxdistill.models.core.rows import read_settings
from jaxdistill.models.core.settings import Settings
from jaxdistill.models.families import FAMILIES

_COMMON: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-3,
    "pad_token_id": 1,
    "bos_token_id": 3,
    "eos_token_id": 2,
}
_OF_DECODERS = ("num_key_value_heads", "rms_norm_eps")
_OTHERS = ("modernbert", "bert", "roberta", "xlm-roberta", "gpt2", "distilbert")
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_LINEAR = {"rope_type": "linear", "factor": 3.0}
_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]

# (model_type, form) -> fields besides those of all.
FORMS: dict[tuple[str, str], dict[str, Any]] = {
    ("llama", "plain"): {"hidden_act": "gelu_new", "attention_bias": True, "mlp_bias": True, "head_dim": 6},
    ("llama", "llama3"): {"rope_theta": 50_000.0, "rope_scaling": _LLAMA3, "tie_word_embeddings": True},
    ("llama", "yarn"): {"rope_scaling": _YARN},
    ("llama", "linear"): {"rope_scaling": _LINEAR},
    ("mistral", "window"): {"sliding_window": 7, "head_dim": 6},
    ("mistral", "full"): {"sliding_window": None, "rope_theta": 1e6},
    ("ministral", "plain"): {"sliding_window": 6, "layer_types": _TYPES, "head_dim": 6},
    ("qwen2", "plain"): {"tie_word_embeddings": True},
    ("qwen2", "window"): {
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
        "rope_scaling": _YARN,
    },
    ("qwen3", "plain"): {"head_dim": 6, "attention_bias": True},
    ("qwen3", "yarn"): {"head_dim": 8, "rope_scaling": _YARN, "tie_word_embeddings": True},
    ("smollm3", "plain"): {"no_rope_layer_interval": 2, "mlp_bias": True, "attention_bias": True},
    ("smollm3", "window"): {
        "no_rope_layers": [1, 0, 1],
        "use_sliding_window": True,
        "sliding_window": 7,
        "rope_scaling": _LLAMA3,
    },
    ("olmo2", "plain"): {"attention_bias": True},
    ("olmo2", "linear"): {"rope_scaling": {"type": "linear", "factor": 3.0}},
    ("olmo3", "yarn"): {"sliding_window": 7, "layer_types": _TYPES, "rope_scaling": _YARN},
    ("gemma", "plain"): {"head_dim": 6, "hidden_act": "gelu", "attention_bias": True},
    ("gemma2", "plain"): {
        "head_dim": 6,
        "sliding_window": 7,
        "query_pre_attn_scalar": 10,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    ("gemma3_text", "plain"): {
        "head_dim": 6,
        "sliding_window": 7,
        "query_pre_attn_scalar": 10,
        "layer_types": _TYPES,
        "rope_theta": 50_000.0,
        "rope_local_base_freq": 500.0,
        "rope_scaling": _LINEAR,
        "attn_logit_softcapping": 2.0,
    },
    ("granite", "plain"): {
        "attention_bias": True,
        "mlp_bias": True,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.5,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.3,
        "rope_scaling": _LINEAR,
    },
    ("phi3", "plain"): {"sliding_window": 7},
    ("modernbert", "plain"): {
        "norm_eps": 1e-3,
        "local_attention": 7,
        "global_rope_theta": 500.0,
        "decoder_bias": False,
    },
    ("modernbert", "biases"): {
        **{name: True for name in ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias")},
        "tie_word_embeddings": False,
        "local_attention": 12,
        "global_attn_every_n_layers": 2,
        "local_rope_theta": 50.0,
        "hidden_activation": "silu",
        "classifier_activation": "relu",
    },
    ("eurobert", "biases"): {"hidden_act": "gelu_new", "attention_bias": True, "mlp_bias": True, "head_dim": 6},
    ("eurobert", "llama3"): {"rope_theta": 50_000.0, "rope_scaling": _LLAMA3, "tie_word_embeddings": True},
    ("bert", "plain"): {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3, "type_vocab_size": 2},
    ("roberta", "untied"): {"hidden_act": "silu", "layer_norm_eps": 1e-3, "tie_word_embeddings": False},
    ("xlm-roberta", "plain"): {"type_vocab_size": 1},
    ("distilbert", "plain"): {
        **{"dim": 16, "n_layers": 3, "n_heads": 4, "hidden_dim": 24, "max_position_embeddings": 256},
        "activation": "relu",
    },
    ("gpt2", "plain"): {
        **{"n_embd": 16, "n_layer": 3, "n_head": 4, "n_inner": 24, "n_positions": 256},
        "activation_function": "silu",
        "layer_norm_epsilon": 1e-3,
        "scale_attn_weights": False,
    },
    ("phi3", "partial"): {"partial_rotary_factor": 0.5},
}

# The forms that the installed transformers has a configuration for.
INSTALLED = [form for form in FORMS if form[0] in transformers.CONFIG_MAPPING]


def config(kind: str, form: str, **overrides: Any) -> Any:
    from transformers import AutoConfig

    common = _COMMON if kind not in _OTHERS else {name: x for name, x in _COMMON.items() if name not in _OF_DECODERS}
    if kind in ("gpt2", "distilbert"):
        common = {name: x for name, x in common.items() if name in ("vocab_size", "pad_token_id")}
    fields = {**common, **FORMS[kind, form], **overrides}
    if fields.get("rope_scaling", {}) is None:  # which transformers 5 takes as a word against rope_parameters
        del fields["rope_scaling"]
    return AutoConfig.for_model(kind, **fields)


@functools.cache
def settings(kind: str, form: str) -> Settings:
    return read_settings(config(kind, form))


@functools.cache
def params(kind: str, form: str) -> dict[str, Any]:
    """Parameters that are random in every entry, biases and norms included."""
    rng = np.random.default_rng(0)
    shapes = network.param_shapes(settings(kind, form))
    return jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape) + (x.ndim == 1) * 0.5).astype(np.float32), shapes)


def torch_model(kind: str, form: str) -> Any:
    """The same model in PyTorch; eager attention alone follows every field."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    auto = AutoModelForCausalLM if FAMILIES[kind].causal else AutoModelForMaskedLM
    model = auto.from_config(config(kind, form), attn_implementation="eager").eval()
    tensors = {name: torch.tensor(array) for name, array in torch_names.to_torch(params(kind, form)).items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected, unexpected
    assert all(name.endswith(tuple(model._tied_weights_keys or ())) for name in missing), missing  # ends of names
    model.tie_weights()
    return model


def batch(length: int, padding: str) -> tuple[np.ndarray, np.ndarray]:
    """(input_ids, attention_mask) of two rows, one of which is a third shorter where there is padding."""
    rng = np.random.default_rng(1)
    ids = rng.integers(5, 101, (2, length)).astype(np.int32)
    mask = np.ones((2, length), bool)
    if padding == "right":
        mask[1, -(length // 3) :] = False
    if padding == "left":
        mask[1, : length // 3] = False
    return np.where(mask, ids, 1), mask
