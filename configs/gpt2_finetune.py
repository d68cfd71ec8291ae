"""GPT-2 on summaries of news, without a teacher: the teacher, or the start of a student, for configs/gpt2_kd.py.

    python -m jaxdistill.train --config configs/gpt2_finetune.py --workdir runs/finetune \
        --config.student.name=gpt2-medium --config.data.path=train.csv --config.data.eval_path=validation.csv

The CSV has the columns `article` and `highlights`, as CNN/DailyMail's has. Only the summary is learnt; an article that
is too long loses its end. ROUGE needs pip install 'jaxdistill[rouge]'; without it, leave rouge out of
--config.evaluate.metrics.

`:smoke` runs the same path in seconds, on the causal model and the pairs of the quickstart.
"""

import runpy
from pathlib import Path

from jaxdistill.config import Config, base


def get_config(variant: str = "") -> Config:
    config = base()
    config.student.name = "gpt2"
    config.data.source = "csv"
    config.data.prompt_column, config.data.column = "article", "highlights"
    config.data.template = "{prompt}\nTL;DR: {completion}"
    config.data.max_length = 512
    config.data.buckets = (512,)
    config.mask.group = 1
    config.loss.alpha_clm = 1.0
    config.train.batch_size = 64
    config.train.accumulation = 8
    config.train.epochs = 3.0
    config.optim.learning_rate = 5e-5
    config.optim.weight_decay = 0.01
    config.optim.clip = 1.0
    config.evaluate.metrics = ("perplexity", "rouge")
    config.evaluate.batch_size = 8
    config.evaluate.max_new_tokens = 100  # as the reference's validation
    if variant == "smoke":
        # Recipes are files, not modules of a package: any of them can be copied and changed by itself.
        runpy.run_path(str(Path(__file__).resolve().parent / "quickstart.py"))["smoke_causal"](config)
    return config
