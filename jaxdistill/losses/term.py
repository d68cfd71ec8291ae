"""What a loss of the objective is: one row, with all that the rest of the program needs to know of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

from jaxtyping import Array, Bool, Float, Int

from jaxdistill.losses.divergences import ByWriter, LogitLoss, Scalar
from jaxdistill.losses.policy import PolicyConfig
from jaxdistill.losses.several import Target
from jaxdistill.models.head import Head
from jaxdistill.models.intercept import Outputs
from jaxdistill.models.pair import Mix

# Which tokens a loss is a mean over: real tokens; those whose logits are compared; labelled ones; sampled ones.
Tokens = Literal["tokens", "head", "labels", "sampled"]


class Relation(NamedTuple):
    """What is compared by the loss of self-attention relations."""

    layer: int  # of the teacher, from 0
    heads: int
    weights: tuple[float, float, float]  # of queries, keys and values


class Objective(NamedTuple):
    """The losses that are enabled, and their parameters."""

    weights: Mapping[str, Scalar]  # by name of an enabled loss
    temperature: Scalar
    tokens: str  # tokens of the losses on logits: all | labels | masked or uncertain (gathered before the head)
    layer_map: tuple[tuple[int, int], ...]  # (student, teacher) indexes into hidden_states
    divergence: str = "forward_kl"  # of `ce`, one of divergences.DIVERGENCES or BY_WRITER
    beta: float = 0.0  # of the divergences that have this parameter
    head: str = "fused"  # fused: losses on logits from features and kernels, in chunks | dense: from logits
    policy: PolicyConfig | None = None  # of the losses on samples
    relation: Relation | None = None  # of the loss of relations
    share: float = 1.0  # of the predicted tokens, where `tokens` is uncertain
    student_side: float = 1.0  # weight of what the student wrote, of 2 for both sides, where the divergence has sides
    # The rows of losses that a Python program adds, which are in no table; their weights are in `weights`.
    own: "Mapping[str, Term]" = MappingProxyType({})
    mix: Mix | None = None  # of several teachers


class Signals(NamedTuple):
    """The inputs of losses. Arrays of the head are [batch length], or [groups k] where `tokens` is masked."""

    student: Outputs
    teacher: Outputs | None  # None without a teacher, or where no enabled loss uses the teacher
    labels: Int[Array, "*head"]
    masks: Mapping[str, Bool[Array, "..."]]  # of terms.masks_of; head and labels: as the logits
    projections: Mapping[str, Mapping[str, Array]]  # student width -> teacher width, by `student>teacher` layer
    heads: tuple[Head, Target] | None = None  # student's and teacher's, if fused; None = dense logits
    sampled: Mapping[str, Array] | None = None  # the arrays that on_policy.make_scorer adds to a batch of samples
    embedding: Float[Array, "vocab width"] | None = None  # the student's input embedding, for `diversity`
    documents: Int[Array, "batch length"] | None = None  # number of each token's document; padding has 0


PerToken = Callable[[Objective, Signals], Float[Array, "..."]]


@dataclass(frozen=True)
class Term:
    """One loss. Either `per_token` or `on_logits` is given; the latter runs in the fused head as well."""

    explanation: str  # of its weight, for users
    tokens: Tokens
    # The arrays of the models that it is computed from.
    sees: Literal["logits", "hidden_states", "attentions", "relations", "samples"]
    per_token: PerToken | None = None
    on_logits: Callable[[Objective], LogitLoss | ByWriter] | None = None
    weight: float = 0.0  # by default
    by_layer: bool = False  # computed for the pairs of the layer map
    every_layer: bool = False  # reads the arrays of all layers of the teacher, and brings no projection
    needs_teacher: bool = True
    kind: Literal["", "masked", "causal"] = ""  # of the models that it is for; "" = both
