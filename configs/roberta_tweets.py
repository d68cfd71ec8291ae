r"""A RoBERTa that was trained on tweets, distilled into every other of its layers, on tweets.

    python -m jaxdistill.train --config configs/roberta_tweets.py --workdir runs/tweets \
        --config.data.path=tweets.txt --config.data.eval_path=dev.txt
    jaxdistill export --to-pytorch --workdir runs/tweets --out student/
    jaxdistill neighbours --run runs/tweets --base roberta-base --words ma,af,lmao,Yeah

The last command shows what the student has kept of the tweets: the nearest words of slang in teacher, student and in
the RoBERTa that the teacher was made from. Losses and weights are those of configs/roberta_mlm.py, which are
DistilBERT's. Tweets are short, so rows have 64 tokens at most, more of them go into an update, and short ones are kept.
Only the masked positions go through the head.

Time: 2.4 hours on one NVIDIA H200 for every billion tokens that it trains on, some 30 million tweets, reckoned
(docs/times.md).

Result: nobody has run this recipe at full size yet. docs/results.md has the nearest words and the losses of
small models: the student keeps the words of its teacher.

`:smoke` runs the same path in seconds, on the teacher and text of the quickstart.
"""

import runpy
from pathlib import Path

from jaxdistill.config import Config, base, check_variant


def get_config(variant: str = "") -> Config:
    check_variant(variant, "smoke")
    config = base()
    config.teacher.name = "cardiffnlp/twitter-roberta-base"
    config.student.layers = "every_other"
    config.data.max_length = 64
    config.data.buckets = (16, 32, 64)
    config.data.min_tokens = 6
    config.loss.tokens = "masked"
    config.loss.alpha_ce, config.loss.alpha_mlm, config.loss.alpha_cos = 5.0, 2.0, 1.0
    config.train.freeze = ("position_embeddings", "token_type_embeddings")  # as in the published RoBERTa recipe
    config.train.batch_size = 512
    config.train.accumulation = 2
    config.train.epochs = 3.0
    config.evaluate.metrics = ("perplexity", "agreement", "pseudo_perplexity")
    config.evaluate.prompts = ("This is so [MASK]!", "I can't [MASK] today lol", "Good [MASK] everyone")
    if variant == "smoke":
        # Recipes are files, not modules of a package: any of them can be copied and changed by itself.
        runpy.run_path(str(Path(__file__).resolve().parent / "quickstart.py"))["smoke"](config)
        config.evaluate.pseudo_rows = 1
    return config
