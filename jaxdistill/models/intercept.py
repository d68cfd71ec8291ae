"""The forward pass of a model, which flax.linen's interceptors read and change from inside.

An interceptor is `f(next, args, kwargs, context)`. It is called in place of every submodule, which it recognises by
`context.module.path` and `context.method_name`. `apply` runs the model under its own interceptors and under those that
a caller passes, such as LayerDrop and rematerialisation.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.module import InterceptorContext
from jax.extend.core import jaxpr_as_fun
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from jaxdistill.models import partition
from jaxdistill.models.attention import dot_product_attention
from jaxdistill.models.core import network
from jaxdistill.models.core.modules import Projected
from jaxdistill.models.families import Family
from jaxdistill.models.head import Head
from jaxdistill.models.model import Model, attention_dropout, embedding_of, leaf, shortened, with_tied_head

Interceptor = Callable[[Callable[..., Any], tuple, dict[str, Any], InterceptorContext], Any]
Layer = Callable[[Float[Array, "batch length width"]], list[Array]]  # the outputs of a layer, hidden states among them


class Outputs(NamedTuple):
    """The outputs of a forward pass, in the dtype of its computation.

    `logits` is [batch, length, vocab], or [groups, k, vocab] where positions were given. `hidden_states` has
    num_layers + 1 arrays [batch, length, width], the embeddings first; `attentions` has num_layers arrays of
    probabilities [batch, heads, length, length]; both are empty where they were not asked for. As in torch, the last
    hidden states of a causal family are the input of the head, after the final norm (GPT-2's ln_f). `features` is the
    input of the vocabulary projection. `projected` are the queries, keys and values of the one layer that was asked
    for. The compiler removes the work for what the caller ignores, so also the layers after that one.
    """

    logits: Float[Array, "rows tokens vocab"]
    hidden_states: tuple[Float[Array, "batch length width"], ...]
    attentions: tuple[Float[Array, "batch heads length length"], ...]
    features: Float[Array, "rows tokens width"] | None = None
    projected: Projected | None = None


def apply(
    model: Model,
    params: Any,
    *,
    input_ids: Int[Array, "batch length"],
    attention_mask: Bool[Array, "batch length"],
    segment_ids: Int[Array, "batch length"] | None = None,
    dropout_key: Key[Array, ""] | None = None,
    hidden_states: bool = False,
    attentions: bool = False,
    projected: int | None = None,
    positions: Int[Array, "groups k"] | None = None,
    interceptors: Sequence[Interceptor] = (),
    mesh: Mesh | None = None,
) -> Outputs:
    """The forward pass; a pure function, so it works under jit, grad and vmap.

    Args:
      segment_ids: the number of each token's document, where a row packs several (causal models): a token sees only
        tokens of its own document, and positions are counted from the document's first token.
      dropout_key: None = inference.
      projected: the layer, from 0, whose queries, keys and values are returned.
      positions: the tokens on which the head runs, from `head_positions`; None = all.
      interceptors: the first is the outermost.
      mesh: over whose devices the rows are split; the core's kernels of attention ask for it.
    """
    family = model.family
    inputs = _Inputs(input_ids, attention_mask, segment_ids if family.causal else None, dropout_key)
    features: list[Array] = []
    active = [*interceptors, _record_input(family.projection, features)]
    if positions is not None:
        active = [gather_before(family.head, positions), *active]
    run = _apply_flax if model.core is None else _apply_core
    if mesh is not None and partition.is_split(mesh):
        active = [*active, partition.rows_stay(mesh, model)]
    with ExitStack() as stack:
        if mesh is not None and model.core is not None:
            stack.enter_context(jax.sharding.use_abstract_mesh(mesh.abstract_mesh))
        asked = _Asked(hidden_states, attentions, projected)
        logits, states, maps, of_layer = run(model, params, inputs, active, asked)
    return Outputs(logits, states, maps, *(features or [None]), projected=of_layer)


class _Inputs(NamedTuple):
    input_ids: Int[Array, "batch length"]
    attention_mask: Bool[Array, "batch length"]
    segment_ids: Int[Array, "batch length"] | None  # None where rows are not separated into documents
    dropout_key: Key[Array, ""] | None


class _Asked(NamedTuple):
    """What is returned besides the logits."""

    hidden_states: bool
    attentions: bool
    projected: int | None


# Logits, hidden states, maps, and the queries, keys and values of a layer.
_Computed = tuple[Array, tuple[Array, ...], tuple[Array, ...], Projected | None]


def _apply_core(model: Model, params: Any, x: _Inputs, active: Sequence[Interceptor], asked: _Asked) -> _Computed:
    """Documents, left padding and windows are the core's own rule of attention."""
    core = model.core
    assert core is not None
    tokens = network.real_tokens(x.attention_mask, places(model, x.attention_mask, x.segment_ids), x.segment_ids)
    how = network.How(
        model.attention or "own", maps=asked.attentions, train=x.dropout_key is not None, dtype=model.dtype
    )
    with _intercepted(active):
        out = network.forward(
            core, params, x.input_ids, tokens, how, dropout_key=x.dropout_key, projected=asked.projected
        )
    return out.logits, tuple(out.hidden_states) if asked.hidden_states else (), tuple(out.maps), out.projected


def places(
    model: Model,
    attention_mask: Bool[Array, "batch length"],
    segment_ids: Int[Array, "batch length"] | None = None,
) -> Int[Array, "batch length"]:
    """The place of each token in its document; in masked LMs, as in torch, in its row."""
    if model.family.causal:
        return position_ids(attention_mask, segment_ids)
    return jnp.broadcast_to(jnp.arange(attention_mask.shape[1]), attention_mask.shape)


@contextmanager
def _intercepted(active: Sequence[Interceptor]) -> Iterator[None]:
    """Runs modules under interceptors, the first outermost."""
    with ExitStack() as stack:
        for interceptor in active:
            stack.enter_context(nn.intercept_methods(interceptor))
        yield


def _apply_flax(model: Model, params: Any, x: _Inputs, active: Sequence[Interceptor], asked: _Asked) -> _Computed:
    """transformers' Flax class, under the interceptors by which it computes what torch does."""
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
    with _intercepted(active), jax.numpy_rank_promotion("allow"):  # transformers' classes broadcast biases
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
    return out.logits, out.hidden_states or (), out.attentions or (), next(iter(projected), None)


def head_of(model: Model, params: Any, features: Float[Array, "*tokens width"] | None = None) -> Head:
    """The vocabulary projection of a model: with `features`, the source of its logits; without, the weights alone.

    The weights may be NumPy arrays, before a run has put them on its devices.
    """
    family = model.family
    tied = model.config.tie_word_embeddings
    kernel = embedding_of(model, params) if tied else leaf(params, f"{family.projection}/kernel")
    bias = leaf(params, model.projection_bias) if model.projection_bias else None
    if model.core is None:
        return Head(features, kernel, bias, tied=tied)
    return Head(features, kernel, bias, cap=model.core.logit_cap, scale=model.core.logit_scale, tied=tied)


def position_ids(
    attention_mask: Bool[Array, "batch length"], segment_ids: Int[Array, "batch length"] | None = None
) -> Int[Array, "batch length"]:
    """The position of each real token, from 0, so that padding on either side changes nothing; left padding has 0.

    With `segment_ids`, the count starts again wherever the number changes.
    """
    counted = jnp.maximum(jnp.cumsum(attention_mask, axis=1) - 1, 0)
    if segment_ids is None:
        return counted
    begins = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    return counted - jax.lax.cummax(jnp.where(begins, counted, 0), axis=1)


def head_positions(
    label_mask: Bool[Array, "batch length"], *, group: int, capacity: int
) -> tuple[Int[Array, "groups capacity"], Bool[Array, "groups capacity"]]:
    """The positions of the labelled tokens, in static shapes: (positions, valid), both [batch / group, capacity].

    A group is `group` consecutive rows flattened to one axis of group * length tokens; positions index into the group,
    in ascending order. Unused places hold position 0 and are not valid. Labels beyond `capacity` in one group are
    dropped: choose the largest number that the masking can draw. Groups stay whole on a device when `batch / group` is
    divisible by the number of data shards.
    """
    rows, length = label_mask.shape
    assert rows % group == 0, (rows, group)
    flat = label_mask.reshape(rows // group, group * length)
    positions = jax.vmap(lambda mask: jnp.nonzero(mask, size=capacity, fill_value=0)[0])(flat)
    valid = jnp.arange(capacity)[None, :] < jnp.sum(flat, axis=1, keepdims=True)
    return positions, valid


def gather_tokens(
    x: Shaped[Array, "batch length *rest"], positions: Int[Array, "groups k"]
) -> Shaped[Array, "groups k *rest"]:
    """The entries of x at `positions`, which index groups of batch / groups rows flattened to one token axis."""
    grouped = x.reshape(positions.shape[0], -1, *x.shape[2:])
    return jax.vmap(lambda tokens, index: tokens[index])(grouped, positions)


def _is_call(context: InterceptorContext, path: str) -> bool:
    return context.method_name == "__call__" and "/".join(context.module.path) == path


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


def _record_input(projection: str, inputs: list[Array]) -> Interceptor:
    def record(next_call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: InterceptorContext) -> Any:
        # Where the embeddings are tied, BERT and similar classes run decoder.apply(...), a root module of that name.
        root = not context.module.path and context.module.name == projection.split("/")[-1]
        if _is_call(context, projection) or (root and context.method_name == "__call__"):
            inputs.append(args[0])
        return next_call(*args, **kwargs)

    return record


def gather_before(head: str, positions: Int[Array, "groups k"]) -> Interceptor:
    """Gives the head only the tokens at `positions` (see `gather_tokens`)."""

    def gather(next_call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: InterceptorContext) -> Any:
        if _is_call(context, head):
            args = (gather_tokens(args[0], positions), *args[1:])
        return next_call(*args, **kwargs)

    return gather


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
    is_layer, calls = _layer_path(model.family), itertools.count()
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


def _layer_path(family: Family) -> Callable[[str], Any]:
    """Whether a path is that of a layer."""
    return re.compile(re.escape(family.layers).replace(r"\{\}", r"\d+")).fullmatch


def around_layers(family: Family, around: Callable[[Layer, Array], list[Array]]) -> Interceptor:
    """Runs every layer as `around(layer, hidden)`, where `layer` is a pure function of its input hidden states.

    Parameters and masks are constants of that function, so `lax.cond` and `jax.checkpoint` can run it.
    """
    is_layer = _layer_path(family)

    def intercept(
        next_call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: InterceptorContext
    ) -> Any:
        if context.method_name != "__call__" or not is_layer("/".join(context.module.path)):
            return next_call(*args, **kwargs)
        # The hidden states come first in every family; DistilBERT's class names all its arguments.
        name = None if args else next(iter(kwargs))
        hidden = args[0] if name is None else kwargs[name]

        def run(hidden: Array) -> Any:
            return next_call(hidden, *args[1:], **kwargs) if name is None else next_call(**{**kwargs, name: hidden})

        # Traced once, so that dropout draws the same numbers as in the plain model.
        traced, shapes = jax.make_jaxpr(run, return_shape=True)(hidden)
        return jax.tree.structure(shapes).unflatten(around(jaxpr_as_fun(traced), hidden))

    return intercept


def _fixed_head_activation(head: str, activation: str) -> Interceptor:
    """Follows torch in the head of ELECTRA, which is always GELU; the Flax class uses config.hidden_act."""
    from transformers.modeling_flax_utils import ACT2FN

    def transform(
        next_call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: InterceptorContext
    ) -> Any:
        if not _is_call(context, head):
            return next_call(*args, **kwargs)
        module = context.module
        return module.LayerNorm(ACT2FN[activation](module.dense(args[0])))

    return transform
