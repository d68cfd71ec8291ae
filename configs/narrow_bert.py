r"""BERT distilled into a student of two thirds of its width: its most important channels, units and heads (Minitron).

    python -m jaxdistill.train --config configs/narrow_bert.py --workdir runs/narrow \
        --config.teacher.name=bert-base-uncased --config.data.path=corpus.txt
    jaxdistill export --to-pytorch --workdir runs/narrow --out student/

Before the first step, the teacher is scored by its activations on the first 512 rows of the training text (Muralidharan
et al. 2024, arXiv:2407.14679), and 512 of 768 channels, 2,048 of 3,072 inner units and 8 of 12 heads of every layer
stay: 54 M of 110 M parameters. More than a third at a time is not advised there; for a smaller student, cut again from
what was distilled. The student then learns from the teacher's predictions alone, as there. Width keeps quality better
than depth does, and depth saves more time; `student.layers=6` cuts both.

Time: 2.2 hours on one NVIDIA H200 for every billion tokens that it trains on, reckoned (docs/times.md).

Result: nobody has run this recipe at full size yet. docs/results.md has a table for a small teacher.

`:smoke` runs the same path in seconds, on the teacher and text of the quickstart.
"""

import runpy
from pathlib import Path

from jaxdistill.config import Config, base, check_variant


def get_config(variant: str = "") -> Config:
    check_variant(variant, "smoke")
    config = base()
    config.teacher.name = "bert-base-uncased"
    config.student.init = "importance"
    config.student.width, config.student.inner = 512, 2048  # heads have 64 channels, so 8 of 12 stay
    config.loss.tokens = "masked"
    config.loss.temperature = 1.0
    config.loss.alpha_ce, config.loss.alpha_mlm, config.loss.alpha_cos = 1.0, 0.0, 0.0
    config.train.batch_size = 256
    config.train.accumulation = 4  # micro-batches of 64 rows
    config.train.epochs = 3.0
    config.evaluate.prompts = ("Paris is the [MASK] of France.",)
    if variant == "smoke":
        # Recipes are files, not modules of a package: any of them can be copied and changed by itself.
        runpy.run_path(str(Path(__file__).resolve().parent / "quickstart.py"))["smoke"](config)
        config.student.width, config.student.inner, config.student.score_rows = 96, 384, 64
    return config
