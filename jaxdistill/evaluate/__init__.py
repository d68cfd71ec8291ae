"""What can be measured of a student on held-out text. Each evaluator yields (name, value)."""

from collections.abc import Callable
from typing import NamedTuple

from jaxdistill.evaluate.agreement import make_agreement
from jaxdistill.evaluate.context import Context, Evaluator
from jaxdistill.evaluate.perplexity import make_perplexity
from jaxdistill.evaluate.pseudo_perplexity import make_pseudo_perplexity
from jaxdistill.evaluate.rouge import make_rouge


class Row(NamedTuple):
    make: Callable[[Context], Evaluator]
    needs_teacher: bool = False
    kind: str = ""  # masked | causal: the models it is for; "" = both


EVALUATORS = {
    "perplexity": Row(make_perplexity),
    "agreement": Row(make_agreement, needs_teacher=True),
    "pseudo_perplexity": Row(make_pseudo_perplexity, kind="masked"),
    "rouge": Row(make_rouge, kind="causal"),
}

__all__ = ["EVALUATORS", "Context", "Evaluator"]
