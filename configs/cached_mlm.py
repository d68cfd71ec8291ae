r"""BERT distilled from a cache of its answers: the teacher runs once, and no longer in every epoch of every run.

    jaxdistill init-student --teacher bert-base-uncased --layers every_other --family distilbert --out student/
    jaxdistill cache --config configs/cached_mlm.py --out cache/ --config.data.path=corpus.txt
    jaxdistill train --config configs/cached_mlm.py --workdir runs/cached --config.data.path=corpus.txt \
        --config.student.name=student/ --config.teacher.cache=cache/

The cache keeps 50 words that are drawn from the teacher's distribution over each masked token (random-sampling
distillation, Anshumann et al. 2025, arXiv:2503.16870), 102 bytes a masked token: 15 bytes of each token of the text, in
each of three epochs with masks of their own. Loss and gradient are those of the live teacher on average over the draws.
They scatter with the square of the temperature, which is therefore 1, where bert_mlm.py has 2. docs/cache.md has the
formulas. Losses of hidden states need cache.layers, and take far more room.

Without teacher.cache the same recipe runs the teacher itself, on the same masks. `:smoke` does so in seconds, on the
teacher and text of the quickstart, and takes a cache of its own as well.

Time: 0.9 hours on one NVIDIA H200 for every billion tokens of the cache, and 1.4 for every billion that it trains on,
reckoned (docs/times.md); with the teacher itself 2.4.

Result: nobody has run this recipe at full size yet. docs/results.md compares small students of a cache and of the live
teacher.
"""

import runpy
from pathlib import Path

from jaxdistill.config import Config, base, check_variant


def get_config(variant: str = "") -> Config:
    check_variant(variant, "smoke")
    config = base()
    config.teacher.name = "bert-base-uncased"
    config.cache.kind, config.cache.samples = "sampled", 50
    config.mask.epochs, config.mask.group = 3, 1
    config.loss.tokens = "masked"
    config.loss.temperature = 1.0
    config.loss.alpha_ce, config.loss.alpha_mlm, config.loss.alpha_cos = 5.0, 2.0, 0.0
    config.train.batch_size = 256
    config.train.accumulation = 4  # micro-batches of 64 rows
    config.train.epochs = 3.0
    config.evaluate.prompts = ("Paris is the [MASK] of France.",)
    if variant == "smoke":
        # Recipes are files, not modules of a package: any of them can be copied and changed by itself.
        runpy.run_path(str(Path(__file__).resolve().parent / "quickstart.py"))["smoke"](config)
        config.student.init = "random"  # as no teacher is read from which a cache's student could be cut
        config.student.overrides = {"num_hidden_layers": 2}
    return config
