"""transformers' Flax classes, made of configurations, and their random parameters."""

import copy
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from jaxdistill.models.families import Family
from jaxdistill.models.library_messages import quiet


def flax_class(config: Any, family: Family, dtype: Any) -> Any:
    """The Flax class without parameters (transformers.FlaxPreTrainedModel), which computes in `dtype`."""
    from transformers import FlaxAutoModelForCausalLM, FlaxAutoModelForMaskedLM

    auto = FlaxAutoModelForCausalLM if family.causal else FlaxAutoModelForMaskedLM
    with quiet(), jax.numpy_rank_promotion("allow"):  # the library's classes broadcast biases implicitly
        return auto.from_config(_flax_config(config, family), trust_remote_code=False, _do_init=False, dtype=dtype)


def _flax_config(config: Any, family: Family) -> Any:
    """The configuration with which the Flax class computes what torch computes with `config`."""
    if not family.causal:
        return config
    changed = copy.deepcopy(config)
    changed.tie_word_embeddings = False  # model.with_tied_head ties them
    if config.model_type == "mistral":
        # Torch sees a window of w keys, the query's own included; Flax w + 1, and without a window the query's alone.
        changed.sliding_window = (config.sliding_window or config.max_position_embeddings) - 1
    if config.model_type == "gemma":
        changed.hidden_activation = config.hidden_act  # torch ignores hidden_activation
    return changed


def draw_params(config: Any, shapes: PyTree, key: Key[Array, ""]) -> dict[str, Any]:
    """Random float32 parameters, with the distributions with which transformers' PyTorch class begins.

    The Flax classes' own initialisers draw some tensors from others: the dense layer of BERT's head and all of
    Mistral's attention with a standard deviation of 1 / sqrt(width), GPT-2's products that are added to the hidden
    states without the division by sqrt(2 x layers), and Gemma's norms as 1 where the weight that it adds to 1 is 0.

    Args:
      shapes: the parameter tree as jax.ShapeDtypeStruct.
    """
    std = config.init_std if config.model_type == "opt" else config.initializer_range
    into_sum = std / (2 * config.num_hidden_layers) ** 0.5
    norm = 0.0 if config.model_type == "gemma" else 1.0

    def draw(path: tuple, shape: jax.ShapeDtypeStruct, key: Key[Array, ""]) -> Array:
        *_, module, name = (entry.key for entry in path)
        if name in ("kernel", "embedding"):
            scaled = config.model_type == "gpt2" and module == "c_proj"
            return _normal(key, shape.shape, into_sum if scaled else std)
        return jnp.full(shape.shape, norm if name in ("scale", "weight") else 0.0)

    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree_util.tree_map_with_path(draw, shapes, tree.unflatten(jax.random.split(key, len(leaves))))


@functools.partial(jax.jit, static_argnames="shape")  # compiled once for all layers
def _normal(key: Key[Array, ""], shape: tuple[int, ...], std: float | Float[Array, ""]) -> Float[Array, "..."]:
    return std * jax.random.normal(key, shape)
