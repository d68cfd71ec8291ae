"""Attention: the rule that says which keys a query sees, and the kernel that writes the scores out.

The rule needs two numbers of every token, its place and its document, and two of every layer, the reach. Packed
documents, padding on either side, a cache of keys, and the windows of causal and of bidirectional layers are all this
one rule. Kernels evaluate the rule where they need it, so that no mask of [batch, length, length] is ever an argument.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

FAR = 2**30  # a reach that no text exceeds

Heads = Float[Array, "batch length heads size"]


class Tokens(NamedTuple):
    """The numbers of tokens by which attention decides.

    Padding is a document of its own, number 0: padding sees padding, so no query is without keys and no softmax is over
    nothing. Slots of a cache that are not yet filled have document -1, which no query has.
    """

    place: Int[Array, "batch length"]  # position in its document, from 0
    document: Int[Array, "batch length"]  # from 1; 0 = padding


class Reach(NamedTuple):
    """How far the queries of a layer see, in places, the query's own place not counted; may be traced."""

    before: int | Int[Array, ""] = FAR
    after: int | Int[Array, ""] = 0  # 0 = causal


class Attended(NamedTuple):
    """What attention is computed from. Query head h reads key head h // (heads / kv_heads)."""

    query: Float[Array, "batch queries heads size"]
    key: Float[Array, "batch keys kv_heads size"]
    value: Float[Array, "batch keys kv_heads size"]
    queries: Tokens
    keys: Tokens
    reach: Reach


def visible(queries: Tokens, keys: Tokens, reach: Reach) -> Bool[Array, "batch queries keys"]:
    """Whether a query sees a key: same document, and within the layer's reach."""
    distance = queries.place[:, :, None] - keys.place[:, None, :]  # positive: the key stands before the query
    same = queries.document[:, :, None] == keys.document[:, None, :]
    return same & (distance <= reach.before) & (-distance <= reach.after)


def written_out(
    inputs: Attended, *, scale: float, cap: float = 0.0, dropout: Callable[[Array], Array] | None = None
) -> tuple[Float[Array, "batch queries heads size"], Float[Array, "batch heads queries keys"]]:
    """Attention with all scores in memory, and the probabilities, which other kernels do not return.

    Scores and softmax are float32, as in the torch classes' own ("eager") code; probabilities are rounded to the dtype
    of the values.

    Args:
      scale: of the scores.
      cap: bounds the scores as cap * tanh(scores / cap); 0 = no bound.
      dropout: is applied to the probabilities that mix the values, and not to those that are returned.
    """
    rows, length, heads, size = inputs.query.shape
    groups = inputs.query.reshape(rows, length, inputs.key.shape[2], -1, size)
    scores = jnp.einsum("bqkgs,bmks->bkgqm", groups, inputs.key, preferred_element_type=jnp.float32) * scale
    if cap:
        scores = cap * jnp.tanh(scores / cap)
    sees = visible(inputs.queries, inputs.keys, inputs.reach)[:, None, None]
    scores = jnp.where(sees, scores, jnp.finfo(jnp.float32).min)
    maps = jax.nn.softmax(scores, axis=-1).astype(inputs.value.dtype)
    mixed = jnp.einsum("bkgqm,bmks->bqkgs", dropout(maps) if dropout else maps, inputs.value)
    return mixed.reshape(inputs.query.shape), maps.reshape(rows, heads, length, -1)


def platform() -> str:
    """cpu, gpu or tpu: of the mesh under which the program is traced, else of the devices here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
