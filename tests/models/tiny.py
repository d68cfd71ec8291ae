"""One tiny random model per family, with sizes, activation and eps unlike any default. A new family adds a row."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
import pytest
import transformers

from jaxdistill.models.families import FAMILIES
from jaxdistill.models.model import Model, build_model, param_shapes

_SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "layer_norm_eps": 1e-3,
}

_CAUSAL: dict[str, Any] = {
    "vocab_size": 101,
    "pad_token_id": 1,
    "bos_token_id": 3,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}

_ROTARY: dict[str, Any] = {
    **_CAUSAL,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "rms_norm_eps": 1e-3,
}

_TYPES = ["sliding_attention", "full_attention"]

# Tiny programs run once, so they are compiled without optimisation, which takes half the time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {**_SIZES, "hidden_act": "gelu_new"},
    "roberta": {**_SIZES, "type_vocab_size": 1},
    "xlm-roberta": {**_SIZES, "hidden_act": "silu"},
    "distilbert": {
        "vocab_size": 101,
        "dim": 16,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 24,
        "max_position_embeddings": 20,
        "activation": "relu",
    },
    "electra": {**_SIZES, "embedding_size": 8, "hidden_act": "relu"},
    "albert": {
        **_SIZES,
        "num_hidden_layers": 4,
        "embedding_size": 8,
        "num_hidden_groups": 2,
        "inner_group_num": 2,
    },
    "gpt2": {
        **_CAUSAL,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_inner": 24,
        "n_positions": 20,
        "activation_function": "silu",
        "layer_norm_epsilon": 1e-3,
    },
    "gpt_neo": {
        **_CAUSAL,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 20,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 3,
        "activation_function": "relu",
        "layer_norm_epsilon": 1e-3,
    },
    "opt": {
        **_CAUSAL,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 24,
        "max_position_embeddings": 20,
        "word_embed_proj_dim": 16,
        "activation_function": "gelu",
    },
    "llama": {**_ROTARY, "hidden_act": "gelu_new", "attention_bias": True},
    "mistral": {**_ROTARY, "sliding_window": 3},
    "gemma": {**_ROTARY, "head_dim": 6, "hidden_act": "gelu"},
    # Of the families that the core alone computes; tests/models/core/tiny_core.py has their other forms.
    "ministral": {**_ROTARY, "head_dim": 6, "sliding_window": 3, "layer_types": _TYPES},
    "qwen2": {**_ROTARY, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "qwen3": {**_ROTARY, "head_dim": 6, "rope_theta": 500.0},
    "smollm3": {**_ROTARY, "no_rope_layers": [1, 0]},
    "olmo2": _ROTARY,
    "olmo3": {**_ROTARY, "sliding_window": 3, "layer_types": _TYPES},
    "gemma2": {
        **_ROTARY,
        "head_dim": 6,
        "sliding_window": 3,
        "query_pre_attn_scalar": 10,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 10.0,
    },
    "gemma3_text": {
        **_ROTARY,
        "head_dim": 6,
        "sliding_window": 3,
        "layer_types": _TYPES,
        "rope_theta": 500.0,
        "rope_local_base_freq": 50.0,
    },
    "granite": {
        **_ROTARY,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.5,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.3,
    },
    "phi3": {**_ROTARY, "sliding_window": 3},
    "eurobert": {**_ROTARY, "mlp_bias": True, "rope_theta": 500.0, "mask_token_id": 4},
    "modernbert": {
        **_SIZES,
        "pad_token_id": 1,
        "norm_eps": 1e-3,
        "local_attention": 6,
        "global_attn_every_n_layers": 2,
    },
}


# The families that the installed transformers has a configuration for.
INSTALLED = [kind for kind in FAMILIES if kind in transformers.CONFIG_MAPPING]

# One masked and one causal model stand for all families in the fast part of the suite; the slow part runs the others.
FAST = ("bert", "llama")
# One family of every way of computing: a class of its own in Flax, or a module of the core with parts that others lack
# (caps, windows, norms of heads, joined products). The rest differ from one of these in their configuration and names.
EVERYDAY = (
    *("bert", "distilbert", "albert", "modernbert"),
    *("gpt2", "gpt_neo", "opt", "llama", "gemma2", "qwen3", "phi3"),
)


def families(cases: Iterable[Any], *, fast: Sequence[str] = FAST, weekly: bool = False) -> list[Any]:
    """The cases of a parametrized test, each a family or a tuple that begins with one; those not in `fast` are slow.

    With `weekly`, those not in EVERYDAY either are weekly: for what does not depend on configuration and names.
    """

    def marks(kind: str) -> Any:
        if kind in fast:
            return ()
        return pytest.mark.weekly if weekly and kind not in EVERYDAY else pytest.mark.slow

    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=marks(case[0])) for case in values if case[0] in INSTALLED]


def config(kind: str, **overrides: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **{**CONFIGS[kind], **overrides})


@functools.cache
def model(kind: str, **overrides: Any) -> Model:
    return build_model(config(kind, **overrides))


@functools.cache
def params(kind: str, **overrides: Any) -> dict[str, Any]:
    """Parameters that are random in every entry, also where the initialisers give 0 or 1 (biases, layer norms).

    From their shapes alone: the initialisers take a second to compile, for each family and each of its variants.
    """
    return random_params(model(kind, **overrides), np.random.default_rng(0), 0.2)


def random_params(model: Model, rng: np.random.Generator, spread: float) -> dict[str, Any]:
    """Parameters with this standard deviation, around 1 where a norm multiplies by them and around 0 otherwise."""

    def drawn(path: tuple, x: jax.ShapeDtypeStruct) -> np.ndarray:
        multiplies = path[-1].key in ("scale", "weight") and "gemma" not in model.config.model_type  # Gemma: 1 + weight
        return (multiplies + spread * rng.standard_normal(x.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(drawn, param_shapes(model))


def depth(kind: str, layers: int) -> dict[str, Any]:
    """The overrides that give the family's tiny model so many layers."""
    if kind == "gpt_neo":
        return {"num_layers": layers, "attention_types": (((("local", "global") * layers)[:layers], 1),)}
    lists = {name: CONFIGS[kind][name] for name in ("layer_types", "no_rope_layers") if name in CONFIGS[kind]}
    if lists:
        return {"num_hidden_layers": layers, **{name: tuple(x * layers)[:layers] for name, x in lists.items()}}
    return {{"distilbert": "n_layers", "gpt2": "n_layer"}.get(kind, "num_hidden_layers"): layers}


def batch(kind: str, rows: int = 2, length: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """(input_ids, attention_mask) [rows, length]; the last rows are padded, for causal models on the left."""
    rng = np.random.default_rng(1)
    ids = rng.integers(5, 101, (rows, length)).astype(np.int32)
    mask = np.arange(length)[None, :] < np.linspace(length, 3, rows).astype(int)[:, None]
    if FAMILIES[kind].causal:
        mask = np.flip(mask, axis=1).copy()
    return np.where(mask, ids, config(kind).pad_token_id), mask
