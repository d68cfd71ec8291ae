"""What can be measured of a student on held-out text. Each evaluator yields (name, value)."""

from jaxdistill.evaluate.agreement import make_agreement
from jaxdistill.evaluate.context import Context, Evaluator
from jaxdistill.evaluate.perplexity import make_perplexity
from jaxdistill.evaluate.pseudo_perplexity import make_pseudo_perplexity

# name -> (maker, needs a teacher)
EVALUATORS = {
    "perplexity": (make_perplexity, False),
    "agreement": (make_agreement, True),
    "pseudo_perplexity": (make_pseudo_perplexity, False),
}

__all__ = ["EVALUATORS", "Context", "Evaluator"]
