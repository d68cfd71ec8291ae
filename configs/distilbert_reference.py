r"""DistilBERT with the hyper-parameters of its authors' code, every one of them (Sanh et al. 2019, arXiv:1910.01108).

    python -m jaxdistill.train --config configs/distilbert_reference.py --workdir runs/distilbert \
        --config.data.path=wikipedia_and_books.txt
    jaxdistill export --to-pytorch --workdir runs/distilbert --out student/

The values are those of the command in the README of the research project `distillation` of transformers, and where the
command gives none, the defaults of its train.py; docs/coming-from.md lists which flag is which setting. An update has
250 rows: 50 micro-batches of 5 on one GPU. `:four_gpus` is the second command of that README: four GPUs, so 1,000 rows,
and the weights 0.33. The paper speaks of up to 4,000 rows; its student was trained on English Wikipedia and the Toronto
Book Corpus. What it computes otherwise than the scripts are their defects, which docs/coming-from.md names.

`configs/bert_mlm.py` is the recipe to start from instead: it keeps the token types and the transform of the head.
`:smoke` runs the same path in seconds, on the teacher and text of the quickstart.

Time: some 40 hours on one NVIDIA H200 for three epochs of Wikipedia and the books, reckoned (docs/times.md); the
paper's student took 90 hours on eight V100 of 16 GB.

Result: nobody has run this recipe at full size yet. The paper's student has 77.0 on GLUE where BERT-base has 79.5.
"""

import runpy
from pathlib import Path

from jaxdistill.config import Config, base, check_variant


def get_config(variant: str = "") -> Config:
    check_variant(variant, "smoke", "four_gpus")
    config = base()
    config.seed = 56
    config.teacher.name = "bert-base-uncased"
    # extract_distilbert.py, which copied neither token types nor the transform of the head.
    config.student.family = "distilbert"
    config.student.layers = (0, 2, 4, 7, 9, 11)
    config.student.reference_init = True
    # --freeze_pos_embs says it for RoBERTa alone; DistilBERT's positions, made as sinusoids, have no gradient at all.
    config.train.freeze = ("position_embeddings",)
    config.data.max_length = 512
    config.data.min_tokens = 12
    config.data.max_unk_fraction = 0.5
    config.mask.fraction = 0.15
    config.mask.replace = (0.8, 0.1, 0.1)
    config.mask.smoothing = 0.7
    config.mask.group = 5  # the rows of a micro-batch, over which the scripts draw their masks
    config.loss.temperature = 2.0
    config.loss.tokens = "all"  # without --restrict_ce_to_mask
    config.loss.alpha_ce, config.loss.alpha_mlm, config.loss.alpha_cos = 5.0, 2.0, 1.0
    config.train.epochs = 3.0
    config.train.batch_size = 250
    config.train.accumulation = 10  # micro-batches of 25 rows; 50, as there, take less memory to the same result
    config.optim.learning_rate = 5e-4
    config.optim.schedule = "linear"
    config.optim.warmup = 0.05
    config.optim.betas = (0.9, 0.98)
    config.optim.eps = 1e-6
    config.optim.weight_decay = 0.0
    config.optim.clip = 5.0
    config.log.every = 500
    config.checkpoint.every = 4000
    config.evaluate.prompts = ("Paris is the [MASK] of France.",)
    if variant == "four_gpus":
        config.train.batch_size = 1000
        config.loss.alpha_ce, config.loss.alpha_mlm, config.loss.alpha_cos = 0.33, 0.33, 0.33
    if variant == "smoke":
        # Recipes are files, not modules of a package: any of them can be copied and changed by itself.
        runpy.run_path(str(Path(__file__).resolve().parent / "quickstart.py"))["smoke"](config)
        config.student.layers = "every_other"  # the small teacher has four
        config.mask.group = 2
        config.checkpoint.every = 0
    return config
