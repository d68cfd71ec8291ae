"""Configurations that transformers' Flax classes would compute differently from PyTorch, refused by name."""

from typing import Any

from jaxdistill.errors import UserError
from jaxdistill.models.families import FAMILIES

ROTARY = ("llama", "mistral", "gemma")


_ROPE_THETA = 10_000.0  # written into the Flax classes


# What the causal Flax classes do not look at: in which families, and the one value that is right for them.
_FIXED_FIELDS: dict[str, tuple[tuple[str, ...], Any]] = {
    "scale_attn_weights": (("gpt2",), True),
    "scale_attn_by_inverse_layer_idx": (("gpt2",), False),
    "add_cross_attention": (("gpt2",), False),
    "enable_bias": (("opt",), True),
    "layer_norm_elementwise_affine": (("opt",), True),
    "mlp_bias": (("llama",), False),
    "attention_bias": (("mistral",), False),
    "attention_dropout": (("mistral",), 0.0),  # its class asks for no dropout key
    "partial_rotary_factor": (ROTARY, 1.0),
}


def check_config(config: Any) -> None:
    """What the Flax class would compute differently from torch, or die on without naming the key."""
    kind = config.model_type
    # Gemma's heads have a size of their own.
    if kind != "gemma" and config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"{kind} config: hidden size {config.hidden_size} is not divisible by {config.num_attention_heads} heads"
        )
    if config.num_hidden_layers < 1:
        raise UserError(f"{kind} config: {config.num_hidden_layers} layers; there must be at least 1")
    if getattr(config, "position_embedding_type", "absolute") != "absolute":
        raise UserError(
            f"{kind} config: position_embedding_type {config.position_embedding_type!r}; only 'absolute' is known here"
        )
    if FAMILIES[kind].causal:
        _check_causal_config(config)
    elif getattr(config, "is_decoder", False):
        raise UserError(f"{kind} config: is_decoder is true; a masked LM must see both sides")
    from transformers.modeling_flax_utils import ACT2FN

    names = ("activation", "hidden_act", "activation_function")
    activation = next((value for name in names if (value := getattr(config, name, None))), None)
    if activation not in ACT2FN:
        raise UserError(f"{kind} config: activation {activation!r} is none of {', '.join(ACT2FN)}")


def _check_causal_config(config: Any) -> None:
    """Fields that a causal Flax class passes over in silence, and computes something else than torch."""
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
    if kind not in ROTARY:
        return
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError(
            f"{kind} config: {config.num_attention_heads} heads are not divisible by "
            f"{config.num_key_value_heads} key/value heads"
        )
    head_size = config.hidden_size // config.num_attention_heads
    own_size = getattr(config, "head_dim", None) or head_size
    if kind != "gemma" and own_size != head_size:
        raise UserError(
            f"{kind} config: head_dim is {own_size}, and transformers' Flax class knows only hidden_size / heads, "
            f"{head_size}"
        )
    # transformers 5 writes rope_parameters, which 4.57 passes over.
    rope = {"rope_theta": config.rope_theta, **(getattr(config, "rope_scaling", None) or {})}
    rope |= getattr(config, "rope_parameters", None) or {}
    name = rope.get("rope_type", rope.get("type", "default"))
    if name != "default" or rope["rope_theta"] != _ROPE_THETA:
        raise UserError(
            f"{kind} config: rotary positions of type {name!r} with theta {rope['rope_theta']:g}; transformers' Flax "
            f"class knows only 'default' with {_ROPE_THETA:g}"
        )
    if config.max_position_embeddings < 2 * own_size:
        raise UserError(
            f"{kind} config: {config.max_position_embeddings} positions; transformers' Flax class needs at least "
            f"twice the head size, {2 * own_size}"
        )
