r"""GPT-2-medium distilled into GPT-2 on summaries of news, from a cache of the teacher's answers.

    jaxdistill cache --config configs/cached_kd.py --out cache/ --config.teacher.name=runs/finetune/export-pytorch \
        --config.data.path=train.csv --config.data.eval_path=validation.csv
    jaxdistill train --config configs/cached_kd.py --workdir runs/kd --config.teacher.name= \
        --config.teacher.cache=cache/ --config.data.path=train.csv --config.data.eval_path=validation.csv

The cache keeps the 32 most likely next words with their probabilities and the probability of all others together, 132
bytes for each token of a summary. Loss and gradient are those of the KL divergence over 33 events (docs/cache.md). A
PyTorch teacher can write such a cache as well: scripts/write_teacher_cache.py.

Without teacher.cache the same recipe runs the teacher itself. `:smoke` does so in seconds, on the causal model and the
pairs of the quickstart, and takes a cache of its own as well. ROUGE needs pip install 'jaxdistill[rouge]'.

Time: half an hour on one NVIDIA H200 for the cache of CNN/DailyMail, and 2 hours for three epochs of training, reckoned
(docs/times.md).

Result: nobody has run this recipe at full size yet.
"""

import runpy
from pathlib import Path

from jaxdistill.config import Config, check_variant


def get_config(variant: str = "") -> Config:
    check_variant(variant, "smoke")
    # Recipes are files, not modules of a package: any of them can be copied and changed by itself.
    recipe = lambda name: runpy.run_path(str(Path(__file__).resolve().parent / name))  # noqa: E731
    config = recipe("gpt2_finetune.py")["get_config"]()
    config.teacher.name = "gpt2-medium"
    config.student.name = "gpt2"
    config.cache.kind, config.cache.k = "topk", 32
    config.loss.tokens = "labels"  # those of the summary
    config.loss.temperature = 1.0
    config.loss.alpha_ce, config.loss.alpha_clm, config.loss.alpha_cos = 1.0, 0.5, 0.0
    config.evaluate.metrics = ("perplexity", "rouge")
    if variant == "smoke":
        recipe("quickstart.py")["smoke_causal"](config)
        config.student.init = "random"  # as no teacher is read from which a cache's student could be cut
        config.student.layers, config.student.overrides = None, {"num_hidden_layers": 1}
    return config
