"""The forward pass of transformers' Flax classes, under the interceptors by which they compute what torch does."""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.linen.module import InterceptorContext
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxdistill.models.core.modules import Projected
from jaxdistill.models.flax.attention import dot_product_attention
from jaxdistill.models.flax.supported import fewest_positions
from jaxdistill.models.inputs import Asked, Computed, Inputs
from jaxdistill.models.interceptors import Interceptor, intercepted, is_call, layer_path
from jaxdistill.models.model import Model, attention_dropout, rebuilt, with_tied_head
from jaxdistill.models.positions import position_ids


def forward_flax(model: Model, params: Any, x: Inputs, active: Sequence[Interceptor], asked: Asked) -> Computed:
    """As `intercept.apply`, for a model that a Flax class computes."""
    family = model.family
    with jax.ensure_compile_time_eval():
        model = shortened(model, x.input_ids.shape[1])
    active = list(active)
    if family.head_activation:
        active.append(_fixed_head_activation(family.head, family.head_activation))
    # Passed explicitly because FlaxElectra, unlike torch and the other classes, uses type 1 where none are given.
    inputs = {"token_type_ids": jnp.zeros_like(x.input_ids)} if family.token_types else {}
    if family.causal:
        inputs["position_ids"] = position_ids(x.attention_mask, x.segment_ids)
        if x.segment_ids is not None:
            active.append(_causal_within_segments(x.segment_ids))
    train = x.dropout_key is not None
    if model.attention in ("xla", "cudnn") and not asked.attentions and not (train and attention_dropout(model.config)):
        kernel = dot_product_attention(x.attention_mask, inputs.get("position_ids"), implementation=model.attention)
        active.append(kernel)
    projected: list[Projected] = []
    if asked.projected is not None:
        active = [_take_projected(projected), *active, _return_projected(model, asked.projected)]
    with intercepted(active), jax.numpy_rank_promotion("allow"):  # transformers' classes broadcast biases
        out = model.flax(
            x.input_ids,
            x.attention_mask,
            **inputs,
            params=with_tied_head(model, params),
            dropout_rng=x.dropout_key,
            **({"deterministic": not train} if family.deterministic_argument else {"train": train}),
            output_hidden_states=asked.hidden_states,
            output_attentions=asked.attentions,
            return_dict=True,
        )
    return Computed(out.logits, out.hidden_states or (), out.attentions or (), next(iter(projected), None))


def shortened(model: Model, length: int) -> Model:
    """The same computation for sequences of at most `length` tokens, where positions are rotary and have no parameters.

    Each layer of those Flax classes makes a causal mask of all its positions squared: 1 GB at 32,768 positions, again
    for every token that is generated.
    """
    if not model.family.rotary or model.core is not None:
        return model
    positions = max(length, fewest_positions(model.config))
    if positions >= model.config.max_position_embeddings:
        return model
    config = copy.deepcopy(model.config)
    config.max_position_embeddings = positions
    return rebuilt(model, config)


def empty_flax_cache(model: Model, *, batch: int, length: int) -> PyTree:
    """Room for the keys and values of `length` tokens, at most the positions of the model."""
    with jax.numpy_rank_promotion("allow"):
        shapes = jax.eval_shape(lambda: model.flax.init_cache(batch, length))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def forward_flax_cached(
    model: Model,
    params: Any,
    input_ids: Int[Array, "batch new"],
    attention_mask: Bool[Array, "batch length"],
    positions: Int[Array, "batch new"],
    cache: PyTree,
) -> tuple[Float[Array, "batch tokens vocab"], PyTree]:
    """(logits, the cache with the tokens of `input_ids`, which follow those that it holds).

    The attention mask covers the whole cache.
    """
    mode = {"deterministic": True} if model.family.deterministic_argument else {"train": False}
    with jax.numpy_rank_promotion("allow"):
        out = model.flax(
            input_ids,
            attention_mask,
            position_ids=positions,
            params=with_tied_head(model, params),
            past_key_values=cache,
            return_dict=True,
            **mode,
        )
    return out.logits, out.past_key_values


def _causal_within_segments(segment_ids: Int[Array, "batch length"]) -> Interceptor:
    """Causal attention within each segment.

    transformers' classes take no mask by pairs of tokens, but every causal class has one as its attribute `causal_mask`
    [1, 1, positions, positions], which is cut to the input's length and broadcast to its rows. While a layer runs, the
    attribute is a mask that also separates the segments.
    """
    length = segment_ids.shape[1]
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]

    def separate(
        next_call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: InterceptorContext
    ) -> Any:
        module = context.module
        if context.method_name != "__call__" or not hasattr(module, "causal_mask"):
            return next_call(*args, **kwargs)
        causal = module.causal_mask
        # By object's __setattr__, because the module's own is locked outside of setup.
        object.__setattr__(module, "causal_mask", causal[:, :, :length, :length].astype(bool) & same)
        try:
            return next_call(*args, **kwargs)
        finally:
            object.__setattr__(module, "causal_mask", causal)

    return separate


class _WithProjected(NamedTuple):
    """What a layer of a Flax class returned, and its queries, keys and values beside it."""

    output: Any
    projected: Projected


# The submodules of the Flax classes that make queries, keys and values; GPT-2's c_attn makes all three.
_QUERY_KEY_VALUE = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"))


def _return_projected(model: Model, layer: int) -> Interceptor:
    """The innermost interceptor of two, under which the call of a layer returns its queries, keys and values as well.

    As outputs of the layer, they pass through LayerDrop and rematerialisation, which run it as a function.
    """
    is_layer, calls = layer_path(model.family), itertools.count()
    made: dict[str, Array] = {}

    def intercept(
        next_call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: InterceptorContext
    ) -> Any:
        if context.method_name != "__call__":
            return next_call(*args, **kwargs)
        if is_layer("/".join(context.module.path)):
            made.clear()
            output = next_call(*args, **kwargs)
            # By calls, as ALBERT runs one set of parameters several times.
            return _WithProjected(output, _projected(made, model)) if next(calls) == layer else output
        output = next_call(*args, **kwargs)
        if context.module.path:
            made[context.module.path[-1]] = output
        return output

    return intercept


def _projected(made: Mapping[str, Array], model: Model) -> Projected:
    """Queries, keys and values among the outputs of submodules, by name of the submodule."""
    if "c_attn" in made:
        parts = jnp.split(made["c_attn"], 3, axis=-1)
    else:
        parts = next([made[name] for name in names] for names in _QUERY_KEY_VALUE if names[0] in made)
    size = parts[0].shape[-1] // model.config.num_attention_heads
    return Projected(*(x.reshape(*x.shape[:2], -1, size) for x in parts))


def _take_projected(taken: list[Projected]) -> Interceptor:
    """The outermost interceptor of two: what it takes is no longer inside of what runs a layer as a function."""

    def intercept(
        next_call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: InterceptorContext
    ) -> Any:
        output = next_call(*args, **kwargs)
        if isinstance(output, _WithProjected):
            taken.append(output.projected)
            return output.output
        return output

    return intercept


def _fixed_head_activation(head: str, activation: str) -> Interceptor:
    """Follows torch in the head of ELECTRA, which is always GELU; the Flax class uses config.hidden_act."""
    from transformers.modeling_flax_utils import ACT2FN

    def transform(
        next_call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: InterceptorContext
    ) -> Any:
        if not is_call(context, head):
            return next_call(*args, **kwargs)
        module = context.module
        return module.LayerNorm(ACT2FN[activation](module.dense(args[0])))

    return transform
