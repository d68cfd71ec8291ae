"""Attention: the rule that says which keys a query sees, and the kernel that writes the scores out.

The rule needs two numbers of every token, its place and its document, and two of every layer, the reach. Packed
documents, padding on either side, a cache of keys, and the windows of causal and of bidirectional layers are all this
one rule. Kernels evaluate the rule where they need it, so that no mask of [batch, length, length] is ever an argument.
"""

from typing import NamedTuple

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


def visible(queries: Tokens, keys: Tokens, reach: Reach) -> Bool[Array, "batch queries keys"]:
    """Whether a query sees a key: same document, and within the layer's reach."""
    distance = queries.place[:, :, None] - keys.place[:, None, :]  # positive: the key stands before the query
    same = queries.document[:, :, None] == keys.document[:, None, :]
    return same & (distance <= reach.before) & (-distance <= reach.after)
