"""The knobs of the objective; those of policy gradients are in policy.py."""

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic

from jaxdistill.errors import UserError
from jaxdistill.knobs import OneOf, Section, knob
from jaxdistill.losses.divergences import BY_WRITER, DIVERGENCES
from jaxdistill.losses.terms import TERMS


def _layer_map(pairs: tuple | None) -> tuple | None:
    if pairs is not None and not pairs:
        raise ValueError("must be None, or pairs ((student layer, teacher layer), ...)")
    for pair in pairs or ():
        if (pairs or ()).count(pair) > 1:
            raise ValueError(f"has the pair {pair} more than once; name each pair once")
    return pairs


def _end(values: dict[str, float] | None) -> dict[str, float] | None:
    names = ("temperature", *(f"alpha_{name}" for name in TERMS))
    for name, value in (values or {}).items():
        if name not in names:
            raise ValueError(f"holds {name!r}; there are {', '.join(names)}")
        if not math.isfinite(value) or value < 0 or (name == "temperature" and value == 0):
            raise ValueError(f"{name} must be a number of 0 or more, a temperature above 0")
    return values


class _LossConfig(Section):
    """The objective: a weighted sum of losses, each a mean over tokens."""

    temperature: float = knob(2.0, "Softmax temperature of the divergence that is weighted by alpha_ce.", gt=0)
    tokens: Literal["all", "labels", "masked", "uncertain"] = knob(
        "all",
        "Tokens that alpha_ce and alpha_mse compare: `all`; `labels`, those that are predicted; `masked`, the same for "
        "masked models, gathered before the head, which saves the head's work on all other tokens; `uncertain`, the "
        "`share` of those that are predicted whose distribution by the student has the highest entropy.",
    )
    share: float = knob(
        0.2, "Share of the predicted tokens of mask.group rows that are compared with tokens=uncertain.", gt=0, le=1
    )
    divergence: Annotated[str, OneOf((*DIVERGENCES, *BY_WRITER))] = knob(
        "forward_kl",
        "Divergence between teacher and student that is weighted by alpha_ce. `distillm2` is skewed_kl on text of the "
        "teacher or of people, and on text of the student skewed_reverse_kl to a mixture without a gradient.",
    )
    student_side: float = knob(
        1.0, "Weight b of what the student wrote with distillm2; all other text has 2 - b.", ge=0, le=2
    )
    beta: float = knob(
        0.5,
        "Parameter of the divergence: for jsd from 0 (forward_kl) to 1 (reverse_kl); for the skewed ones their skew "
        "and of distillm2 (DistiLLM: 0.1).",
        ge=0,
        le=1,
    )
    head: Literal["fused", "dense"] = knob(
        "fused", "`fused`: vocabulary projection and losses in chunks of tokens; `dense`: all logits at once."
    )
    layer_map: Annotated[tuple | None, pydantic.AfterValidator(_layer_map)] = knob(
        None,
        "Pairs ((student layer, teacher layer), ...) for the losses by layer, counted from 0, -1 being the embeddings; "
        "None pairs each student layer with the teacher layer it was copied from, or spreads them evenly.",
    )
    relation_heads: int = knob(
        48,
        "Relation heads R of alpha_relation, a divisor of both models' width of queries (MiniLMv2: 48, large 64).",
        ge=1,
    )
    relation_layer: int | None = knob(
        None,
        "Teacher layer of alpha_relation, counted from 0; None = the last (MiniLMv2: 20 of BERT-large's 24, 18 of "
        "RoBERTa-large's).",
        ge=0,
    )
    relation_weights: tuple[float, float, float] = knob(
        (1.0, 1.0, 1.0), "Weights of the relations of queries, keys and values in alpha_relation."
    )
    end: Annotated[dict[str, float] | None, pydantic.AfterValidator(_end)] = knob(
        None,
        "Temperature and weights at the last step, such as {'temperature': 1.0, 'alpha_clm': 0.0}; None keeps them.",
    )
    ramp: Literal["linear", "cosine"] = knob("linear", "How temperature and weights move to `end`.")

    @property
    def weights(self) -> dict[str, float]:
        """The weight of every term in losses.terms.TERMS, at the first step."""
        return {name: getattr(self, f"alpha_{name}") for name in TERMS}

    @property
    def ends(self) -> dict[str, float]:
        """`end` by the names of an objective: "temperature", and those of terms."""
        return {name.removeprefix("alpha_"): value for name, value in (self.end or {}).items()}

    def enabled(self, *, teacher: bool) -> dict[str, float]:
        """The weights, at the first step, of the losses that are on at some step; some need a `teacher`."""
        on = [name for name, weight in self.weights.items() if weight or self.ends.get(name)]
        return {name: self.weights[name] for name in on if teacher or not TERMS[name].needs_teacher}

    def check(self) -> None:
        if not all(0 <= w < math.inf for w in self.relation_weights) or not any(self.relation_weights):
            raise UserError(
                f"config.loss.relation_weights={self.relation_weights} must be three numbers of 0 or more, not all 0"
            )
        if self.divergence.startswith(("skewed", "distillm2")) and self.beta == 1:
            raise UserError(f"config.loss.beta=1.0 makes {self.divergence} 0 everywhere; it must lie below 1")


if TYPE_CHECKING:

    class LossConfig(_LossConfig):
        # The weights are fields that a type checker cannot see: alpha_NAME for every loss in the table.
        def __getattr__(self, name: str) -> float: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

else:
    _ALPHAS = {f"alpha_{name}": (float, knob(term.weight, term.explanation, ge=0)) for name, term in TERMS.items()}
    LossConfig = pydantic.create_model("LossConfig", __base__=_LossConfig, __doc__=_LossConfig.__doc__, **_ALPHAS)
