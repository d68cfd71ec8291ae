"""transformers' Flax classes, made of configurations, and their random parameters."""

import copy
from typing import Any

import jax
from jaxtyping import Array, Key

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


def draw_params(flax: Any, key: Key[Array, ""]) -> dict[str, Any]:
    """Random float32 parameters, by the class's own initialisers."""
    with jax.numpy_rank_promotion("allow"):
        params = flax.init_weights(key, (1, 8))
    if flax.config.model_type == "gemma":
        # Its norms multiply by 1 + weight, and the Flax class begins with a weight of 1 where torch has 0.
        params = jax.tree_util.tree_map_with_path(lambda path, x: 0 * x if "norm" in path[-2].key else x, params)
    return params
