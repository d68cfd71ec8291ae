r"""GPT-2 fine-tuned on summaries of news, without a teacher: makes the teacher, or the initial student, of gpt2_kd.py.

    python -m jaxdistill.train --config configs/gpt2_finetune.py --workdir runs/finetune \
        --config.student.name=gpt2-medium --config.data.path=train.csv --config.data.eval_path=validation.csv

The CSV file has the columns `article` and `highlights`, as CNN/DailyMail has. The loss is on the summary only; an
article that is too long loses its end. ROUGE needs pip install 'jaxdistill[rouge]'; without that extra, leave rouge out
of --config.evaluate.metrics.

Time: 5 hours on one NVIDIA H200 for three epochs of CNN/DailyMail, reckoned (docs/times.md); 2 hours for GPT-2 in place
of GPT-2-medium.

Result: nobody has run this recipe at full size yet.

`:smoke` runs the same path in seconds, on the causal model and the pairs of the quickstart.
"""

import runpy
from pathlib import Path

from jaxdistill.config import Config, base, check_variant


def get_config(variant: str = "") -> Config:
    check_variant(variant, "smoke")
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
    config.evaluate.max_new_tokens = 100  # as in the validation of the PyTorch scripts (docs/coming-from.md)
    if variant == "smoke":
        # Recipes are files, not modules of a package: any of them can be copied and changed by itself.
        runpy.run_path(str(Path(__file__).resolve().parent / "quickstart.py"))["smoke_causal"](config)
    return config
