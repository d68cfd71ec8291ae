"""The figures that can be measured on held-out text: one file and one row of EVALUATORS each."""

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxdistill.evaluate.agreement import make_agreement
from jaxdistill.evaluate.context import Context, Evaluator
from jaxdistill.evaluate.perplexity import make_perplexity
from jaxdistill.evaluate.pseudo_perplexity import make_pseudo_perplexity
from jaxdistill.evaluate.rouge import make_rouge


class Row(NamedTuple):
    make: Callable[[Context, Any], Evaluator]  # from the context, and the section that holds the evaluator's knobs
    needs_teacher: bool = False
    kind: str = ""  # the models that the evaluator is for: masked, causal, or "" for both
    # The figures that can choose the best checkpoint, as lower is better, and the models that each is measured on.
    lower: Mapping[str, str] = MappingProxyType({})


EVALUATORS = {
    "perplexity": Row(make_perplexity, lower={"perplexity": "", "mlm_loss": "masked", "clm_loss": "causal"}),
    "agreement": Row(make_agreement, needs_teacher=True, lower={"kl": ""}),
    "pseudo_perplexity": Row(make_pseudo_perplexity, kind="masked", lower={"pseudo_perplexity": "masked"}),
    "rouge": Row(make_rouge, kind="causal"),
}


def lower_is_better(metrics: Collection[str], *, teacher: bool, causal: bool) -> list[str]:
    """The figures of these evaluators that can choose the best checkpoint of such a run."""
    rows = [EVALUATORS[name] for name in metrics if teacher or not EVALUATORS[name].needs_teacher]
    own = "causal" if causal else "masked"
    return [figure for row in rows for figure, kind in row.lower.items() if kind in ("", own)]


__all__ = ["EVALUATORS", "Context", "Evaluator", "lower_is_better"]
