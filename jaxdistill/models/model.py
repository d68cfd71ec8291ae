"""A language model without its parameters: its configuration, its family, and what computes it.

That is a Flax class of transformers, or the core (models/core), whose parameters have the same paths.
"""

import copy
import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from jaxdistill.errors import UserError
from jaxdistill.models.config_fields import check_fields, head_size
from jaxdistill.models.core import network
from jaxdistill.models.core.rows import ROWS, read_settings
from jaxdistill.models.core.settings import Settings
from jaxdistill.models.families import FAMILIES, Family
from jaxdistill.models.flax.build import draw_params, flax_class
from jaxdistill.models.flax.supported import check_supported, has_flax_class
from jaxdistill.models.host_memory import memory_allowed
from jaxdistill.models.layer_choice import period_of
from jaxdistill.models.settings import Classes, StudentConfig, TeacherConfig

Kernel = Literal["", "xla", "cudnn", "tiles", "splash"]


@dataclass(frozen=True)
class Model:
    """A masked or causal language model; its parameters are an argument of every function that needs them."""

    flax: Any  # transformers.FlaxPreTrainedModel, made with _do_init=False; None where the core computes the model
    config: Any  # transformers.PretrainedConfig
    family: Family
    attention: Kernel = ""  # the kernel of self-attention; "" = the class's own code, which writes the scores out
    core: Settings | None = None  # what the core computes; None where the Flax class does
    dtype: Any = jnp.float32  # of the computation
    scan: bool = False  # the layers are a loop in the program, see models/scan.py

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

    @property
    def classes(self) -> Classes:
        """What computes the model, as the setting of that name."""
        return "flax" if self.core is None else "core"

    @property
    def period(self) -> int:
        """After how many layers the kinds of attention repeat; 1 where all are alike, and for the Flax classes."""
        return 1 if self.core is None else period_of(self.core.layers)

    @property
    def projection_bias(self) -> str:
        """The parameter that holds the vocabulary bias; "" where there is none."""
        return self.family.projection_bias if self.core is None or self.core.projection_bias else ""

    @property
    def torch_class(self) -> str:
        """The name of the class of transformers that reads the model's weights in PyTorch."""
        stem = type(self.config).__name__.removesuffix("Config")
        return self.family.torch_class or f"{stem}For{'CausalLM' if self.family.causal else 'MaskedLM'}"


def common_words(*models: Model | None) -> int:
    """The number of words that all models have: one tokenizer's words, where embeddings are padded to unlike sizes."""
    return min(model.vocab_size for model in models if model is not None)


def build_model(
    config: Any,
    *,
    dtype: Any = jnp.float32,
    attention: Kernel = "",
    classes: Classes = "auto",
    scan: bool = False,
) -> Model:
    """The masked or causal language model that a configuration of transformers describes.

    Args:
      dtype: data type of the computation.
      classes: what computes the model; auto = transformers' Flax class where there is one that can follow the
        configuration, else the core.
      scan: whether the layers are a loop in the program; the core alone can.

    Raises:
      UserError: neither, or not the one that is asked for, can follow the configuration.
    """
    family = FAMILIES[config.model_type]
    if _core_computes(config, classes):
        check_fields(f"{config.model_type} config", config.to_dict(), kind=config.model_type)
        core = read_settings(config)
        return Model(None, config, family, attention=attention, core=core, dtype=dtype, scan=scan)
    _check_of_the_core_alone(config.model_type, attention, scan=scan)
    check_supported(config)
    return Model(flax_class(config, family, dtype), config, family, attention=attention, dtype=dtype)


def _core_computes(config: Any, classes: Classes) -> bool:
    kind = config.model_type
    if classes == "core" and kind not in ROWS:
        raise UserError(f"classes=core computes {', '.join(ROWS)}, and not {kind} models; set classes to auto")
    if kind not in ROWS and not has_flax_class(kind):
        raise UserError(
            f"the installed transformers has no Flax class for {kind} models, and the core computes only "
            f"{', '.join(ROWS)}: pip install 'jaxdistill[flax]'"
        )
    if classes == "flax" and not has_flax_class(kind):
        raise UserError(f"classes=flax: transformers has no Flax class for {kind} models; set classes to auto")
    if classes != "auto" or kind not in ROWS:
        return classes == "core"
    if not has_flax_class(kind):
        return True
    try:
        check_supported(config)
    except UserError:  # the core follows what the Flax class cannot, or refuses it by name
        return True
    return False


def _check_of_the_core_alone(kind: str, attention: Kernel, *, scan: bool) -> None:
    advice = "set classes to core" if kind in ROWS else f"there is no core for {kind}"
    if attention in ("tiles", "splash"):
        raise UserError(f"attention={attention} is a kernel of classes=core, not of Flax classes: {advice}, or set xla")
    if scan:
        raise UserError(f"scan=True is for classes=core, and not for Flax classes: {advice}, or set it to False")


def build_model_for(config: Any, settings: TeacherConfig | StudentConfig) -> Model:
    """As `build_model`, with the data type, the attention kernel and the classes of the settings.

    Raises:
      UserError: also where the attention kernel does not take heads of this size.
    """
    check_fields(f"{config.model_type} config", config.to_dict(), kind=config.model_type)  # before heads are divided
    attention: Kernel = "" if settings.attention == "own" else settings.attention
    size = head_size(config)
    if attention == "cudnn" and (size % 8 or size > 256):
        raise UserError(
            "attention=cudnn takes heads of a multiple of 8 up to 256 entries, and those of this "
            f"{config.model_type} have {size}; set xla"
        )
    return build_model(
        config,
        dtype=jnp.dtype(settings.dtype),
        attention=attention,
        classes=settings.classes,
        scan=settings.scan,
    )


# Variants of a model, with the same parameters.


def without_attention_dropout(model: Model) -> Model:
    """The model with no dropout on attention maps, which the classes return *after* dropout.

    A map with entries set to 0 is not the distribution that attention transfer compares.
    """
    config = copy.deepcopy(model.config)
    setattr(config, _attention_dropout_field(config), 0.0)
    return rebuilt(model, config)


def attention_dropout(config: Any) -> float:
    """The probability with which an attention weight is dropped in training."""
    return getattr(config, _attention_dropout_field(config))


def _attention_dropout_field(config: Any) -> str:
    names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    return next(name for name in names if hasattr(config, name))


def rebuilt(model: Model, config: Any) -> Model:
    """The model with another configuration."""
    return build_model(config, dtype=model.dtype, attention=model.attention, classes=model.classes, scan=model.scan)


def by_core(model: Model) -> Model:
    """The model as the core computes it, with the same parameters; as it is, where the core cannot."""
    if model.core is not None or model.config.model_type not in ROWS:
        return model
    try:
        return build_model(model.config, dtype=model.dtype, attention=model.attention, classes="core")
    except UserError:  # a field of the configuration that the core does not follow
        return model


# Parameters: nested dicts with the paths of the Flax class, without a head that is tied to the embeddings.


def init_params(model: Model, key: Key[Array, ""]) -> dict[str, Any]:
    """Random float32 parameters, drawn as the family's PyTorch class draws them.

    Raises:
      UserError: they do not fit into the memory that this process may have.
    """
    needed, there = 4 * count_params(param_shapes(model)), memory_allowed()
    if needed > there:
        raise UserError(
            f"the parameters of this {model.config.model_type} take {needed:,} bytes in float32, and this process may "
            f"have {there:,} bytes of memory: choose smaller sizes, or a larger machine"
        )
    if (core := model.core) is not None:
        return jax.jit(lambda key: network.init_params(core, key))(key)
    return draw_params(model.config, param_shapes(model), key)


def param_shapes(model: Model) -> dict[str, Any]:
    """The parameter tree as jax.ShapeDtypeStruct, without computing anything."""
    if model.core is not None:
        return network.param_shapes(model.core)
    return _without_tied_head(model, model.flax.params_shape_tree)


def count_params(params: PyTree) -> int:
    """The number of entries in a tree of arrays (or of shapes)."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def in_millions(params: PyTree) -> str:
    """The number of entries for a line of a log, such as 22.7M."""
    return f"{count_params(params) / 1e6:.1f}M"


def leaf(params: PyTree, path: str) -> Any:
    """The array at a path of a parameter tree, such as transformer/wte/embedding."""
    return functools.reduce(lambda tree, name: tree[name], path.split("/"), params)


def embedding_of(model: Model, params: PyTree) -> Any:
    """The input word embedding, [vocab, width of the embedding]."""
    return leaf(params, model.family.embedding)


def with_tied_head(model: Model, params: PyTree) -> PyTree:
    """The tree as the Flax class wants it: a tied causal head, which has no parameter of its own, is filled in.

    Its kernel is the transposed input embedding, so gradients of the head reach the embedding.
    """
    if not model.tied_head:
        return params
    return {**params, model.family.projection: {"kernel": embedding_of(model, params).T}}


def _without_tied_head(model: Model, tree: PyTree) -> dict[str, Any]:
    """The inverse of `with_tied_head`."""
    return {name: x for name, x in tree.items() if not (model.tied_head and name == model.family.projection)}
