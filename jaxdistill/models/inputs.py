"""What goes into a forward pass, and what it is asked for."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int, Key

from jaxdistill.models.core.modules import Projected


class Inputs(NamedTuple):
    """Rows of tokens, and how they are read."""

    input_ids: Int[Array, "batch length"]
    attention_mask: Bool[Array, "batch length"]  # False = padding
    # The number of each token's document, where a row packs several (causal models): a token sees only tokens of its
    # own document, and positions are counted from the document's first token.
    segment_ids: Int[Array, "batch length"] | None = None
    dropout_key: Key[Array, ""] | None = None  # None = inference


class Asked(NamedTuple):
    """What is returned besides the logits."""

    hidden_states: bool = False
    attentions: bool = False
    projected: int | None = None  # the layer, from 0, whose queries, keys and values are returned


LOGITS_ALONE = Asked()


class Computed(NamedTuple):
    """What a Flax class or the core returns; the fields are those of `intercept.Outputs`."""

    logits: Float[Array, "rows tokens vocab"]
    hidden_states: tuple[Float[Array, "batch length width"], ...]
    attentions: tuple[Float[Array, "batch heads length length"], ...]
    projected: Projected | None
