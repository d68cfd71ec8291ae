"""The forward pass of a model, under its own interceptors and those that a caller passes, such as LayerDrop."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.models import partition
from jaxdistill.models.core import network
from jaxdistill.models.core.modules import Projected
from jaxdistill.models.flax.forward import forward_flax
from jaxdistill.models.head import Head
from jaxdistill.models.inputs import LOGITS_ALONE, Asked, Computed, Inputs
from jaxdistill.models.interceptors import Interceptor, gather_before, intercepted, record_input
from jaxdistill.models.model import Model, embedding_of, leaf
from jaxdistill.models.positions import position_ids


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
    inputs: Inputs,
    *,
    asked: Asked = LOGITS_ALONE,
    positions: Int[Array, "groups k"] | None = None,
    interceptors: Sequence[Interceptor] = (),
    mesh: Mesh | None = None,
) -> Outputs:
    """The forward pass; a pure function, so it works under jit, grad and vmap.

    Args:
      positions: the tokens on which the head runs, from `positions.head_positions`; None = all.
      interceptors: the first is the outermost.
      mesh: over whose devices the rows are split; the core's kernels of attention ask for it.
    """
    family = model.family
    if not family.causal:
        inputs = inputs._replace(segment_ids=None)
    features: list[Array] = []
    active = [*interceptors, record_input(family.projection, features)]
    if positions is not None:
        active = [gather_before(family.head, positions), *active]
    run = forward_flax if model.core is None else _forward_core
    if mesh is not None and partition.is_split(mesh):
        active = [*active, partition.rows_stay(mesh, model)]
    with ExitStack() as stack:
        if mesh is not None and model.core is not None:
            stack.enter_context(jax.sharding.use_abstract_mesh(mesh.abstract_mesh))
        computed = run(model, params, inputs, active, asked)
    return Outputs(*computed[:3], *(features or [None]), projected=computed.projected)


def _forward_core(model: Model, params: Any, x: Inputs, active: Sequence[Interceptor], asked: Asked) -> Computed:
    """Documents, left padding and windows are the core's own rule of attention."""
    core = model.core
    assert core is not None
    tokens = network.real_tokens(x.attention_mask, places(model, x.attention_mask, x.segment_ids), x.segment_ids)
    how = network.How(
        model.attention or "own", maps=asked.attentions, train=x.dropout_key is not None, dtype=model.dtype
    )
    with intercepted(active):
        out = network.forward(
            core, params, x.input_ids, tokens, how, dropout_key=x.dropout_key, projected=asked.projected
        )
    states = tuple(out.hidden_states) if asked.hidden_states else ()
    return Computed(out.logits, states, tuple(out.maps), out.projected)


def places(
    model: Model,
    attention_mask: Bool[Array, "batch length"],
    segment_ids: Int[Array, "batch length"] | None = None,
) -> Int[Array, "batch length"]:
    """The place of each token in its document; in masked LMs, as in torch, in its row."""
    if model.family.causal:
        return position_ids(attention_mask, segment_ids)
    return jnp.broadcast_to(jnp.arange(attention_mask.shape[1]), attention_mask.shape)


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
