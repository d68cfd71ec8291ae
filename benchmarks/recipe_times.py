"""How long recipes take on one GPU for a billion tokens, by their arithmetic and the rate that one run reached there.

    python benchmarks/recipe_times.py

Reads the configurations of the recipes' models from the hub, and neither weights nor text. The arithmetic is that of
full rows (`models.arithmetic`), without padding, and without text that models write.
"""

import argparse
from collections.abc import Mapping
from typing import NamedTuple

from jaxdistill import recipe
from jaxdistill.config import Config
from jaxdistill.models.arithmetic import forward_flops
from jaxdistill.run.models import pair_of_shapes

# One NVIDIA H200 trained 340,000 to 390,000 tokens a second of bert_mlm with minilm-l6-mlm and three of its layers, in
# bfloat16 (docs/results.md): 0.151 GFLOP a token.
REACHED = 365e3 * 0.151e9
# What the command of a recipe names beside text; the teacher of a cached recipe is that of its cache.
COMMANDS: Mapping[str, tuple[str, ...]] = {
    "bert_europarl": (),
    "bert_layerdrop_student": ("--config.teacher.name=bert-base-uncased",),
    "bert_layerdrop_teacher": ("--config.tokenizer.name=bert-base-uncased",),
    "bert_mlm": (),
    "cached_kd": (),
    "cached_mlm": (),
    "distilbert_reference": (),
    "gpt2_finetune": ("--config.student.name=gpt2-medium",),
    "gpt2_kd": ("--config.student.name=gpt2",),
    "gpt2_policy": ("--config.student.name=gpt2",),
    "minilmv2_bert": (),
    "modernbert_mlm": (),
    "narrow_bert": (),
    "roberta_mlm": (),
    "roberta_tweets": (),
    "two_teachers": (),
    "wikitext_tfds": (),
    "xlmr_tweets": (),
}


class Cost(NamedTuple):
    """Floating-point operations for a token."""

    teacher: float
    student: float  # forward and backward


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    print("| recipe | GFLOP a token: teacher, student | hours for a billion tokens |\n|---|---|---|")
    for name, overrides in COMMANDS.items():
        cost = cost_of(recipe.read(name, ["--config.data.path=none", *overrides]))
        hours = 1e9 * sum(cost) / REACHED / 3600
        print(f"| `{name}` | {cost.teacher / 1e9:.3f}, {cost.student / 1e9:.3f} | {hours:.1f} |")


def cost_of(config: Config) -> Cost:
    """The arithmetic of one token of a full row, by the shapes of the models."""
    pair = pair_of_shapes(config)
    causal = pair.student.family.causal
    of_the_head = {"ce", "clm", "policy"} if causal else {"ce", "mlm"}
    if not of_the_head & config.losses.keys():
        share = 0.0
    elif not causal and config.loss.tokens == "masked":
        share = config.mask.fraction
    else:
        share = 1.0
    row = config.data.max_length
    teacher = sum(forward_flops(one, length=row, head_share=share) for one in pair.teachers)
    return Cost(teacher, 3 * forward_flops(pair.student, length=row, head_share=share))


if __name__ == "__main__":
    main()
