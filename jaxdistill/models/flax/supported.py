"""Which configurations transformers' Flax classes compute as PyTorch does; all others are refused by name."""

import importlib.util
from typing import Any

from jaxdistill.errors import UserError
from jaxdistill.models.config_fields import check_fields, head_size
from jaxdistill.models.families import FAMILIES

_ROPE_THETA = 10_000.0  # written into the Flax classes
_MOST_POSITIONS = 2**20  # the table of a head of 128 entries then takes 3 GB while it is made
_ROTARY = tuple(kind for kind, family in FAMILIES.items() if family.rotary)

# Fields that the causal Flax classes ignore: in which families, and the only value with which they agree with torch.
_FIXED_FIELDS: dict[str, tuple[tuple[str, ...], Any]] = {
    "scale_attn_weights": (("gpt2",), True),
    "scale_attn_by_inverse_layer_idx": (("gpt2",), False),
    "add_cross_attention": (("gpt2",), False),
    "enable_bias": (("opt",), True),
    "layer_norm_elementwise_affine": (("opt",), True),
    "mlp_bias": (("llama",), False),
    "attention_bias": (("mistral",), False),
    "attention_dropout": (("mistral",), 0.0),  # its Flax class asks for no dropout key
    "partial_rotary_factor": (_ROTARY, 1.0),
}


def has_flax_class(kind: str) -> bool:
    """Whether the installed transformers has a Flax class for the model type; from version 5 on there are none."""
    if importlib.util.find_spec("transformers.modeling_flax_utils") is None:
        return False
    from transformers.models.auto import modeling_flax_auto as auto

    return kind in auto.FLAX_MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or kind in auto.FLAX_MODEL_FOR_MASKED_LM_MAPPING_NAMES


def check_supported(config: Any) -> None:
    """Checks that the Flax class computes with `config` what the torch class computes.

    Raises:
      UserError: the first field with which the Flax class would compute something else, or fail without naming it.
    """
    kind = config.model_type
    check_fields(f"{kind} config", config.to_dict(), kind=kind)
    # Gemma's heads have a size of their own.
    if kind != "gemma" and config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"{kind} config: hidden size {config.hidden_size} is not divisible by {config.num_attention_heads} heads"
        )
    if getattr(config, "position_embedding_type", "absolute") != "absolute":
        raise UserError(
            f"{kind} config: position_embedding_type {config.position_embedding_type!r}; only 'absolute' is known here"
        )
    if FAMILIES[kind].causal:
        _check_causal(config)
    elif getattr(config, "is_decoder", False):
        raise UserError(f"{kind} config: is_decoder is true; a masked LM must see both sides")
    _check_activation(config)
    _check_dropout(config)


def _check_causal(config: Any) -> None:
    kind = config.model_type
    for name, (kinds, only) in _FIXED_FIELDS.items():
        value = getattr(config, name, only)
        if kind in kinds and value != only:
            raise UserError(f"{kind} config: {name} is {value!r}, and transformers' Flax class knows only {only!r}")
    if kind == "gpt_neo" and len(config.attention_layers) != config.num_layers:
        raise UserError(
            f"gpt_neo config: attention_types names {len(config.attention_layers)} layers, num_layers is "
            f"{config.num_layers}"
        )
    if FAMILIES[kind].rotary:
        _check_heads(config)
        _check_rotary(config)


def _check_heads(config: Any) -> None:
    kind = config.model_type
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError(
            f"{kind} config: {config.num_attention_heads} heads are not divisible by "
            f"{config.num_key_value_heads} key/value heads"
        )
    divided = config.hidden_size // config.num_attention_heads
    if kind != "gemma" and head_size(config) != divided:
        raise UserError(
            f"{kind} config: head_dim is {head_size(config)}, and transformers' Flax class knows only "
            f"hidden_size / heads, {divided}"
        )


def _check_rotary(config: Any) -> None:
    kind = config.model_type
    # transformers 5 writes rope_parameters, which 4.57 ignores.
    rope = {"rope_theta": config.rope_theta, **(getattr(config, "rope_scaling", None) or {})}
    rope |= getattr(config, "rope_parameters", None) or {}
    name = rope.get("rope_type", rope.get("type", "default"))
    if name != "default" or rope["rope_theta"] != _ROPE_THETA:
        raise UserError(
            f"{kind} config: rotary positions of type {name!r} with theta {rope['rope_theta']:g}; transformers' Flax "
            f"class knows only 'default' with {_ROPE_THETA:g}"
        )
    if config.max_position_embeddings > _MOST_POSITIONS:
        raise UserError(
            f"{kind} config: {config.max_position_embeddings:,} positions; transformers' Flax class makes a table of "
            f"all of them, and the most here are {_MOST_POSITIONS:,}: lower max_position_embeddings"
        )
    if config.max_position_embeddings < fewest_positions(config):
        raise UserError(
            f"{kind} config: {config.max_position_embeddings} positions; transformers' Flax class needs at least "
            f"twice the head size, {fewest_positions(config)}"
        )


def _check_activation(config: Any) -> None:
    from transformers.modeling_flax_utils import ACT2FN

    names = ("activation", "hidden_act", "activation_function")
    activation = next((value for name in names if (value := getattr(config, name, None))), None)
    if activation not in ACT2FN:
        raise UserError(f"{config.model_type} config: activation {activation!r} is none of {', '.join(ACT2FN)}")


def _check_dropout(config: Any) -> None:
    """Flax scales by 1 / (1 - rate) whatever the rate is: above 1 it turns the signs of activations round."""
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, int | float) and not 0 <= value <= 1:
            raise UserError(f"{config.model_type} config: {name} is {value!r}; a dropout must lie between 0 and 1")


def fewest_positions(config: Any) -> int:
    """The smallest max_position_embeddings with which the rotary Flax classes run."""
    return 2 * head_size(config)
