"""The knobs of evaluation: those of all evaluators together, and those that each evaluator declares in its own file."""

from typing import Annotated

from jaxdistill.errors import UserError
from jaxdistill.evaluate import EVALUATORS
from jaxdistill.evaluate.perplexity import PerplexityConfig
from jaxdistill.evaluate.pseudo_perplexity import PseudoPerplexityConfig
from jaxdistill.evaluate.rouge import RougeConfig
from jaxdistill.knobs import OneOf, knob

_FIGURES = ", ".join(name + (f" ({row.kind} models)" if row.kind else "") for name, row in EVALUATORS.items())


class EvaluateConfig(PerplexityConfig, PseudoPerplexityConfig, RougeConfig):
    """What is measured on held-out text."""

    every: int = knob(0, "Steps between evaluations; 0 = after every epoch.", ge=0, resumable=True)
    batches: int = knob(32, "Number of held-out batches; 0 = all.", ge=0, resumable=True)
    batch_size: int = knob(32, "Rows in a held-out batch.", ge=1, le=2**20, resumable=True)
    metrics: Annotated[tuple[str, ...], OneOf(EVALUATORS)] = knob(
        ("perplexity", "agreement"), f"Figures to measure: {_FIGURES}.", resumable=True
    )
    prompts: tuple[str, ...] = knob(
        (),
        "Texts shown to both models at the end: with [MASK], to be filled; for causal models, to be continued.",
        resumable=True,
    )

    def check(self) -> None:
        if self.pruned and "perplexity" not in self.metrics:
            raise UserError(
                "config.evaluate.pruned is set: add perplexity to config.evaluate.metrics, which measures it"
            )
