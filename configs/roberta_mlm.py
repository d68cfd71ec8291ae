r"""RoBERTa distilled into every other of its layers, as DistilRoBERTa was made; also for a fine-tuned RoBERTa or XLM-R.

    python -m jaxdistill.train --config configs/roberta_mlm.py --workdir runs/roberta \
        --config.teacher.name=trained_roberta --config.data.path=tweets.txt

The weights are those of configs/bert_mlm.py: 5 x KL at temperature 2, 2 x masked language modelling, 1 x cosine. Only
the masked positions go through the head, as XLM-R's vocabulary has 250,002 words.

Time: 2.5 hours on one NVIDIA H200 for every billion tokens that it trains on, reckoned (docs/times.md).

Result: nobody has run this recipe at full size yet. DistilRoBERTa's authors report a GLUE average of 79.0, against 83.2
for RoBERTa-base.

`:smoke` runs the same path in seconds, on the teacher and text of the quickstart.
"""

import runpy
from pathlib import Path

from jaxdistill.config import Config, base, check_variant


def get_config(variant: str = "") -> Config:
    check_variant(variant, "smoke")
    config = base()
    config.teacher.name = "roberta-base"
    config.student.layers = "every_other"
    config.data.min_tokens = 6  # a tweet is short
    config.train.batch_size = 256
    config.train.accumulation = 4
    config.loss.tokens = "masked"
    config.loss.alpha_ce, config.loss.alpha_mlm, config.loss.alpha_cos = 5.0, 2.0, 1.0
    config.train.freeze = ("position_embeddings", "token_type_embeddings")  # as in the published RoBERTa recipe
    config.evaluate.prompts = ("This is so [MASK]!",)
    if variant == "smoke":
        # Recipes are files, not modules of a package: any of them can be copied and changed by itself.
        runpy.run_path(str(Path(__file__).resolve().parent / "quickstart.py"))["smoke"](config)
    return config
