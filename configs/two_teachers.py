r"""BERT-base and BERT-large distilled together into a DistilBERT of six layers.

    jaxdistill train --config configs/two_teachers.py --workdir runs/two \
        --config.teacher.name=bert-base-uncased --config.teacher.also="('bert-large-uncased',)" \
        --config.data.path=corpus.txt

The teachers have one tokenizer. They run one after another in every step, and the student learns from the weighted mean
of two losses, in which BERT-large counts twice. With the forward KL that has the gradient of one loss against the mean
of their probabilities; with another divergence, `teacher.combine=probabilities` makes a difference. The student begins
as layers of BERT-base, and follows the hidden states of that one alone.

Where the teachers are to run once only, make a cache of each, and name both. The cosine of hidden states would need
cache.layers, and is off here:

    jaxdistill init-student --teacher bert-base-uncased --layers every_other --family distilbert --out student/
    jaxdistill cache --config configs/two_teachers.py --out base/ --config.mask.epochs=3 --config.mask.group=1 \
        --config.teacher.name=bert-base-uncased --config.student.name=student/ --config.data.path=corpus.txt
    jaxdistill cache --config configs/two_teachers.py --out large/ --config.mask.epochs=3 --config.mask.group=1 \
        --config.teacher.name=bert-large-uncased --config.student.name=student/ --config.data.path=corpus.txt
    jaxdistill train --config configs/two_teachers.py --workdir runs/two --config.mask.epochs=3 --config.mask.group=1 \
        --config.teacher.name= --config.teacher.also="()" --config.teacher.cache="('base/','large/')" \
        --config.loss.alpha_cos=0 --config.student.name=student/ --config.data.path=corpus.txt

Time: 5.6 hours on one NVIDIA H200 for every billion tokens that it trains on, reckoned (docs/times.md).

Result: nobody has run this recipe at full size yet.

`:smoke` runs the same path in seconds, on the BERT and the ModernBERT of the quickstart.
"""

import runpy
from pathlib import Path

from jaxdistill.config import Config, base, check_variant

HERE = Path(__file__).resolve().parent


def get_config(variant: str = "") -> Config:
    check_variant(variant, "smoke")
    config = base()
    config.teacher.name = "bert-base-uncased"
    config.teacher.also = ("bert-large-uncased",)
    config.teacher.weights = (1.0, 2.0)
    config.student.family = "distilbert"
    config.loss.tokens = "masked"  # two heads for all tokens would take more time than the student
    config.loss.alpha_ce, config.loss.alpha_mlm, config.loss.alpha_cos = 5.0, 2.0, 1.0
    config.train.batch_size = 256
    config.train.accumulation = 4  # micro-batches of 64 rows
    config.train.epochs = 3.0
    config.evaluate.prompts = ("Paris is the [MASK] of France.",)
    if variant == "smoke":
        # Recipes are files, not modules of a package: any of them can be copied and changed by itself.
        runpy.run_path(str(HERE / "quickstart.py"))["smoke"](config)
        config.teacher.also = (str(HERE / "quickstart" / "modernbert"),)
    return config
