"""A Flax masked or causal language model without parameters, and what can be asked of it."""

import copy
import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jaxdistill.errors import UserError
from jaxdistill.models.check import ROTARY, check_config
from jaxdistill.models.families import FAMILIES, Family
from jaxdistill.models.hub import quiet
from jaxdistill.models.settings import StudentConfig, TeacherConfig

Kernel = Literal["", "xla", "cudnn"]


@dataclass(frozen=True)
class Model:
    """A Flax class without parameters: those are arguments everywhere."""

    flax: Any  # transformers.FlaxPreTrainedModel, made with _do_init=False
    config: Any  # transformers.PretrainedConfig
    family: Family
    attention: Kernel = ""  # the kernel of its self-attention, see models/attention.py; "" = the class's own

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def width(self) -> int:
        return self.config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def tied_head(self) -> bool:
        """Whether the head is a causal one that shares the input embedding, and so is not in the parameters."""
        return self.family.causal and self.config.tie_word_embeddings

    @property
    def max_length(self) -> int:
        """The most tokens a sequence may have, special tokens included."""
        unused = self.config.pad_token_id + 1 if self.family.positions_after_pad else 0
        return self.config.max_position_embeddings - unused


def build(config: Any, *, dtype: Any = jnp.float32, attention: Kernel = "") -> Model:
    """The Flax masked or causal LM class of `config`, without parameters; `dtype` is that of the computation.

    Raises UserError for a configuration that the Flax class cannot follow.
    """
    from transformers import FlaxAutoModelForCausalLM, FlaxAutoModelForMaskedLM

    check_config(config)
    family = FAMILIES[config.model_type]
    auto = FlaxAutoModelForCausalLM if family.causal else FlaxAutoModelForMaskedLM
    with quiet(), jax.numpy_rank_promotion("allow"):  # the library's classes broadcast biases implicitly
        flax = auto.from_config(_flax_config(config, family), _do_init=False, dtype=dtype)
    return Model(flax=flax, config=config, family=family, attention=attention)


def build_as(config: Any, side: TeacherConfig | StudentConfig) -> Model:
    """As `build`, with the data type and the attention that the settings of teacher or student ask for.

    Raises:
      UserError: also for an attention kernel that does not take heads of this size.
    """
    attention: Kernel = "" if side.attention == "own" else side.attention
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if attention == "cudnn" and (size % 8 or size > 256):
        raise UserError(
            "attention=cudnn takes heads of a multiple of 8 up to 256 entries, and those of this "
            f"{config.model_type} have {size}; set xla"
        )
    return build(config, dtype=jnp.dtype(side.dtype), attention=attention)


def without_attention_dropout(model: Model) -> Model:
    """The model with no dropout on attention maps, which the classes return *after* dropout.

    A map with entries set to 0 is not the distribution that attention transfer compares.
    """
    config = copy.deepcopy(model.config)
    setattr(config, _attention_dropout(config), 0.0)
    return build(config, dtype=model.flax.dtype, attention=model.attention)


def attention_dropout(config: Any) -> float:
    """The probability with which a model leaves out attention weights in training."""
    return getattr(config, _attention_dropout(config))


def _attention_dropout(config: Any) -> str:
    names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    return next(name for name in names if hasattr(config, name))


def shortened(model: Model, length: int) -> Model:
    """The same computation for sequences of at most `length` tokens, where positions are rotary and have no parameters.

    Those classes make a causal mask of all their positions squared, a layer: 1 GB at 32,768, again for every token
    that is generated.
    """
    config = copy.deepcopy(model.config)
    if config.model_type not in ROTARY:
        return model
    least = 2 * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    if max(length, least) >= config.max_position_embeddings:
        return model
    config.max_position_embeddings = max(length, least)
    return build(config, dtype=model.flax.dtype, attention=model.attention)


def init_params(model: Model, key: Key[Array, ""]) -> dict[str, Any]:
    """Random float32 parameters, by the family's own initialisers."""

    def draw(key: Key[Array, ""]) -> dict[str, Any]:
        params = _own_params(model, model.flax.init_weights(key, (1, 8)))
        if model.config.model_type == "gemma":
            # Its norms multiply by 1 + weight, and the Flax class begins with a weight of 1 where torch has 0.
            params = jax.tree_util.tree_map_with_path(lambda path, x: 0 * x if "norm" in path[-2].key else x, params)
        return params

    with jax.numpy_rank_promotion("allow"):
        return jax.jit(draw)(key)  # eagerly, a compilation an array


def param_shapes(model: Model) -> dict[str, Any]:
    """The parameter tree as jax.ShapeDtypeStruct, without computing anything."""
    return _own_params(model, model.flax.params_shape_tree)


def embedding_of(model: Model, params: Any) -> Any:
    """A causal model's input embedding, [vocab, width]."""
    return leaf(params, model.family.embedding)


def leaf(params: Any, path: str) -> Any:
    """What stands at a path of a parameter tree, such as transformer/wte/embedding."""
    return functools.reduce(lambda tree, name: tree[name], path.split("/"), params)


def with_tied_head(model: Model, params: Any) -> Any:
    """The tree as the Flax class wants it: a tied causal head, which has no parameter of its own, is filled in.

    Its kernel is the transposed input embedding, so gradients of the head reach the embedding.
    """
    if not model.tied_head:
        return params
    return {**params, model.family.projection: {"kernel": embedding_of(model, params).T}}


def _own_params(model: Model, tree: Any) -> dict[str, Any]:
    """The inverse of `with_tied_head`."""
    return {name: x for name, x in tree.items() if not (model.tied_head and name == model.family.projection)}


def count_params(params: Any) -> int:
    """How many numbers a tree of arrays (or of shapes) has."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def _flax_config(config: Any, family: Family) -> Any:
    """The configuration with which the Flax class computes what torch computes with `config`."""
    if not family.causal:
        return config
    changed = copy.deepcopy(config)
    changed.tie_word_embeddings = False  # with_tied_head does it
    if config.model_type == "mistral":
        # Torch sees a window of w keys, the query's own included; Flax w + 1, and without a window the query's alone.
        changed.sliding_window = (config.sliding_window or config.max_position_embeddings) - 1
    if config.model_type == "gemma":
        changed.hidden_activation = config.hidden_act  # torch does not look at hidden_activation
    return changed
