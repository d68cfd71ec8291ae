"""The knobs of evaluation."""

from typing import Annotated

from jaxdistill.errors import UserError
from jaxdistill.evaluate import EVALUATORS
from jaxdistill.knobs import OneOf, Section, knob


class EvaluateConfig(Section):
    """What is measured on held-out text."""

    every: int = knob(0, "Steps between evaluations; 0 = after every epoch.", ge=0, resumable=True)
    batches: int = knob(32, "Number of held-out batches; 0 = all.", ge=0, resumable=True)
    batch_size: int = knob(32, "Rows in a held-out batch.", ge=1, resumable=True)
    metrics: Annotated[tuple[str, ...], OneOf(EVALUATORS)] = knob(
        ("perplexity", "agreement"),
        "Figures to measure: perplexity, agreement, pseudo_perplexity (masked models), rouge (causal models).",
        resumable=True,
    )
    pseudo_rows: int = knob(
        32, "Rows that pseudo_perplexity reads; each token takes a forward pass.", ge=1, resumable=True
    )
    pruned: tuple[str, ...] = knob(
        (),
        "Sub-networks that are measured as well, each named as in student.layers: ('every_other', 'first:2', '0,3').",
        resumable=True,
    )
    prompts: tuple[str, ...] = knob(
        (),
        "Texts shown to both models at the end: with [MASK], to be filled; for causal models, to be continued.",
        resumable=True,
    )
    max_new_tokens: int = knob(
        100, "Largest number of tokens of a continuation, which is chosen greedily.", ge=1, resumable=True
    )
    rouge_rows: int = knob(64, "Held-out prompts whose completions rouge scores; 0 = all.", ge=0, resumable=True)

    def check(self) -> None:
        if self.pruned and "perplexity" not in self.metrics:
            raise UserError(
                "config.evaluate.pruned is set: add perplexity to config.evaluate.metrics, which measures it"
            )
