"""The figures that can be measured on held-out text: one file and one row of EVALUATORS each."""

from collections.abc import Callable
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


EVALUATORS = {
    "perplexity": Row(make_perplexity),
    "agreement": Row(make_agreement, needs_teacher=True),
    "pseudo_perplexity": Row(make_pseudo_perplexity, kind="masked"),
    "rouge": Row(make_rouge, kind="causal"),
}

__all__ = ["EVALUATORS", "Context", "Evaluator"]
