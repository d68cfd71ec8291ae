r"""Every other layer of a BERT that was trained with LayerDrop, taught by all of its layers.

    python -m jaxdistill.train --config configs/bert_layerdrop_student.py --workdir runs/student \
        --config.teacher.name=teacher/ --config.data.path=corpus.txt
    jaxdistill export --to-pytorch --workdir runs/student --out student/

`teacher/` is what configs/bert_layerdrop_teacher.py trains and exports. Such a teacher loses little where layers are
left out (Fan et al. 2019, arXiv:1909.11556), so the student starts close to it; "A Robust Initialization Method for
Knowledge Distillation" asks whether it also ends closer. The losses are DistilBERT's, for the tokens that are masked.

Time: 2.4 hours on one NVIDIA H200 for every billion tokens that it trains on, reckoned (docs/times.md).

Result: nobody has run this recipe at the size of BERT-base yet. docs/results.md has the answer for small models: the
cut student starts far better (a loss of 5.31 instead of 6.70), is 0.03 ahead after a short distillation, and 0.02
behind after one four times as long, as its teacher is worse.

`:smoke` runs the same path in seconds, on the teacher and text of the quickstart.
"""

import runpy
from pathlib import Path

from jaxdistill.config import Config, base, check_variant


def get_config(variant: str = "") -> Config:
    check_variant(variant, "smoke")
    config = base()
    config.teacher.name = "teacher"  # the folder that is exported from a run of bert_layerdrop_teacher.py
    config.student.layers = "every_other"  # the cut that LayerDrop prepares for
    config.data.batching = "packed"  # the rows that the teacher was trained on
    config.mask.smoothing = 0.0
    config.loss.tokens = "masked"
    config.loss.alpha_ce, config.loss.alpha_mlm, config.loss.alpha_cos = 5.0, 2.0, 1.0
    config.train.epochs = 3.0
    config.train.batch_size = 256
    config.train.accumulation = 4
    config.evaluate.prompts = ("Paris is the [MASK] of France.",)
    if variant == "smoke":
        # Recipes are files, not modules of a package: any of them can be copied and changed by itself.
        runpy.run_path(str(Path(__file__).resolve().parent / "quickstart.py"))["smoke"](config)
    return config
