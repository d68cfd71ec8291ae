"""Everything taken from inside a model: transformers' Flax classes, seen through flax.linen's interceptors.

An interceptor is `f(next, args, kwargs, context)`; it sees every submodule call, by `context.module.path` and
`context.method_name`. `apply` runs the model under the ones it needs and under those it is given: fused heads,
LayerDrop and rematerialisation are further interceptors, made elsewhere and handed in.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

if TYPE_CHECKING:
    from jaxdistill.models.load import Model

Interceptor = Callable[[Callable[..., Any], tuple, dict[str, Any], Any], Any]


class Outputs(NamedTuple):
    """What a forward pass returns, in the dtype it was computed in.

    `logits` is [batch, length, vocab], or [groups, k, vocab] where positions were given. `hidden_states` has
    num_layers + 1 arrays [batch, length, width], the embeddings first; `attentions` has num_layers arrays of
    probabilities [batch, heads, length, length]; both are empty where they were not asked for.
    """

    logits: Float[Array, "rows tokens vocab"]
    hidden_states: tuple[Float[Array, "batch length width"], ...]
    attentions: tuple[Float[Array, "batch heads length length"], ...]


def apply(
    model: "Model",
    params: Any,
    *,
    input_ids: Int[Array, "batch length"],
    attention_mask: Bool[Array, "batch length"],
    dropout_key: Key[Array, ""] | None = None,
    hidden_states: bool = False,
    attentions: bool = False,
    positions: Int[Array, "groups k"] | None = None,
    interceptors: Sequence[Interceptor] = (),
) -> Outputs:
    """The forward pass; pure, so it works under jit, grad and vmap.

    Without `dropout_key` it is inference. With `positions` (see `head_positions`) the head runs on those tokens
    only. The first of `interceptors` is the outermost.
    """
    family = model.family
    active = list(interceptors)
    if family.head_activation:
        active = [_fixed_head_activation(family.head, family.head_activation), *active]
    if positions is not None:
        active = [_gather_before(family.head, positions), *active]
    # Said aloud because FlaxElectra alone fills in type 1 for every token, where torch has 0.
    token_types = {"token_type_ids": jnp.zeros_like(input_ids)} if family.token_types else {}
    with ExitStack() as stack:
        for interceptor in active:
            stack.enter_context(nn.intercept_methods(interceptor))
        stack.enter_context(jax.numpy_rank_promotion("allow"))  # transformers' classes broadcast biases
        out = model.flax(
            input_ids,
            attention_mask,
            **token_types,
            params=params,
            dropout_rng=dropout_key,
            train=dropout_key is not None,
            output_hidden_states=hidden_states,
            output_attentions=attentions,
            return_dict=True,
        )
    return Outputs(out.logits, out.hidden_states or (), out.attentions or ())


def head_positions(
    label_mask: Bool[Array, "batch length"], *, group: int, capacity: int
) -> tuple[Int[Array, "groups capacity"], Bool[Array, "groups capacity"]]:
    """Where the labelled tokens stand, in static shapes: (positions, valid), both [batch / group, capacity].

    A group is `group` consecutive rows flattened to one axis of group * length tokens; positions index into it,
    in ascending order. Unused places hold position 0 and are not valid. Labels beyond `capacity` in one group are
    left out: choose it as the most the masking can draw. Groups stay whole on a device when `batch / group` is
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
    """x at `positions`, which index groups of batch / groups rows flattened to one token axis."""
    grouped = x.reshape(positions.shape[0], -1, *x.shape[2:])
    return jax.vmap(lambda tokens, index: tokens[index])(grouped, positions)


def _is_call(context: Any, path: str) -> bool:
    return context.method_name == "__call__" and "/".join(context.module.path) == path


def _gather_before(head: str, positions: Int[Array, "groups k"]) -> Interceptor:
    def gather(next_call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
        if _is_call(context, head):
            args = (gather_tokens(args[0], positions), *args[1:])
        return next_call(*args, **kwargs)

    return gather


def _fixed_head_activation(head: str, activation: str) -> Interceptor:
    """ELECTRA: torch's generator head is always GELU, the Flax class takes config.hidden_act. Follow torch."""
    from transformers.modeling_flax_utils import ACT2FN

    def transform(next_call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
        if not _is_call(context, head):
            return next_call(*args, **kwargs)
        module = context.module
        return module.LayerNorm(ACT2FN[activation](module.dense(args[0])))

    return transform
