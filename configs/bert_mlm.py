r"""BERT distilled into a student of half its depth, as DistilBERT was made (Sanh et al. 2019, arXiv:1910.01108).

    python -m jaxdistill.train --config configs/bert_mlm.py --workdir runs/bert \
        --config.teacher.name=bert-base-uncased --config.data.path=corpus.txt
    jaxdistill export --to-pytorch --workdir runs/bert --out student/

Losses, weights and optimizer are those of the published recipe: 5 x KL at temperature 2, 2 x masked language modelling,
1 x cosine of the last hidden states; AdamW at 5e-4 with linear warm-up over 5 % of the steps. An update has 256 rows
here, and 250 there.

Time: 3.2 hours on one NVIDIA H200 for every billion tokens that it trains on, reckoned (docs/times.md).

Result: nobody has run this recipe at full size yet. The paper's student keeps 97 % of the teacher's GLUE score with 40
% fewer parameters, after 90 hours on eight V100.

`:smoke` runs the same path in seconds, on the teacher and text of the quickstart.
"""

import runpy
from pathlib import Path

from jaxdistill.config import Config, base, check_variant


def get_config(variant: str = "") -> Config:
    check_variant(variant, "smoke")
    config = base()
    config.teacher.name = "bert-base-uncased"
    config.student.family = "distilbert"
    config.train.batch_size = 256
    config.train.accumulation = 4  # micro-batches of 64 rows
    config.train.epochs = 3.0
    config.loss.temperature = 2.0
    config.loss.alpha_ce, config.loss.alpha_mlm, config.loss.alpha_cos = 5.0, 2.0, 1.0
    config.evaluate.prompts = ("Paris is the [MASK] of France.",)
    if variant == "smoke":
        # Recipes are files, not modules of a package: any of them can be copied and changed by itself.
        runpy.run_path(str(Path(__file__).resolve().parent / "quickstart.py"))["smoke"](config)
    return config
