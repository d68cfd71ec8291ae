r"""ModernBERT (Warner et al. 2024, arXiv:2412.13663) distilled into half of its layers; also for mmBERT and Ettin.

    python -m jaxdistill.train --config configs/modernbert_mlm.py --workdir runs/modernbert \
        --config.teacher.name=answerdotai/ModernBERT-base --config.data.path=corpus.txt

A layer that sees the whole text and two with a window take turns. `every_other` takes every other group of three, so
that the student of 12 layers keeps the turns, by which the classes of transformers 4 go. Losses and weights are those
of configs/bert_mlm.py; 30 % of the tokens are masked, as when ModernBERT was trained, and only these go through the
head.

Time: 4.3 hours on one NVIDIA H200 for every billion tokens that it trains on, reckoned (docs/times.md).

Result: nobody has run this recipe at full size yet.

`:smoke` runs the same path in seconds, on a small ModernBERT and the text of the quickstart.
"""

import runpy
from pathlib import Path

from jaxdistill.config import Config, base, check_variant


def get_config(variant: str = "") -> Config:
    check_variant(variant, "smoke")
    config = base()
    config.teacher.name = "answerdotai/ModernBERT-base"
    config.teacher.dtype = config.student.dtype = "bfloat16"
    config.student.layers = "every_other"
    config.data.max_length = 1024
    config.data.buckets = (256, 512, 1024)
    config.mask.fraction = 0.3
    config.loss.tokens = "masked"
    config.loss.temperature = 2.0
    config.loss.alpha_ce, config.loss.alpha_mlm, config.loss.alpha_cos = 5.0, 2.0, 1.0
    config.train.batch_size = 256
    config.train.accumulation = 4
    config.train.epochs = 3.0
    config.evaluate.batch_size = 64
    config.evaluate.prompts = ("Paris is the [MASK] of France.",)
    if variant == "smoke":
        # Recipes are files, not modules of a package: any of them can be copied and changed by itself.
        runpy.run_path(str(Path(__file__).resolve().parent / "quickstart.py"))["smoke"](config, "modernbert")
    return config
