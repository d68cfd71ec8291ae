"""Losses on the outputs of the models: logits, and the last hidden states (DistilBERT's losses, Sanh et al. 2019)."""

from jaxtyping import Array, Float

from jaxdistill.losses.divergences import BY_WRITER, CROSS_ENTROPY, DIVERGENCES, LOGIT_MSE
from jaxdistill.losses.layers import cosine_distance, mean_over_layers
from jaxdistill.losses.term import Objective, Signals, Term


def _cos(o: Objective, x: Signals) -> Float[Array, "batch length"]:
    assert x.teacher is not None
    last = len(x.student.hidden_states) - 1, len(x.teacher.hidden_states) - 1
    return mean_over_layers(cosine_distance, (last,), x)


TERMS = {
    "ce": Term(
        "Weight of the divergence between teacher and student at the temperature, times temperature squared.",
        tokens="head",
        sees="logits",
        on_logits=lambda o: BY_WRITER[o.divergence] if o.divergence in BY_WRITER else DIVERGENCES[o.divergence],
        weight=5.0,
    ),
    "mlm": Term(
        "Masked models: weight of the cross entropy of the masked tokens.",
        tokens="labels",
        sees="logits",
        on_logits=lambda o: CROSS_ENTROPY,
        weight=2.0,
        needs_teacher=False,
        kind="masked",
    ),
    "clm": Term(
        "Causal models: weight of the cross entropy of the next token.",
        tokens="labels",
        sees="logits",
        on_logits=lambda o: CROSS_ENTROPY,
        weight=2.0,
        needs_teacher=False,
        kind="causal",
    ),
    "cos": Term(
        "Weight of 1 - cosine of the last hidden states.",
        tokens="tokens",
        sees="hidden_states",
        per_token=_cos,
        weight=1.0,
    ),
    "mse": Term(
        "Weight of the squared difference of logits, summed over the vocabulary.",
        tokens="head",
        sees="logits",
        on_logits=lambda o: LOGIT_MSE,
    ),
}
