r"""An XLM-RoBERTa that was trained on tweets of many languages, distilled into every other of its layers.

    python -m jaxdistill.train --config configs/xlmr_tweets.py --workdir runs/xlmr \
        --config.data.path=tweets.txt --config.data.eval_path=dev.txt
    jaxdistill export --to-pytorch --workdir runs/xlmr --out student/

Of the teacher's 278 million parameters, 192 million are its 250,002 word embeddings, which the student keeps: half of
the layers are 15 % of the parameters, and half of the layers' time. The head over these words is most of the work of a
step, so only the masked positions go through it, and the embeddings stay as the teacher's are (`train.freeze`), which
saves their gradient and two moments of them: 2.3 GB.

Time: 3.4 hours on one NVIDIA H200 for every billion tokens that it trains on, some 30 million tweets, reckoned
(docs/times.md).

Result: nobody has run this recipe at full size yet.

`:smoke` runs the same path in seconds, on the teacher and text of the quickstart.
"""

import runpy
from pathlib import Path

from jaxdistill.config import Config, base, check_variant


def get_config(variant: str = "") -> Config:
    check_variant(variant, "smoke")
    config = base()
    config.teacher.name = "cardiffnlp/twitter-xlm-roberta-base"
    config.student.layers = "every_other"
    config.data.max_length = 64
    config.data.buckets = (16, 32, 64)
    config.data.min_tokens = 6
    config.loss.tokens = "masked"
    config.loss.alpha_ce, config.loss.alpha_mlm, config.loss.alpha_cos = 5.0, 2.0, 1.0
    config.train.freeze = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    config.train.batch_size = 256
    config.train.accumulation = 4
    config.train.epochs = 3.0
    config.evaluate.prompts = ("This is so [MASK]!", "C'est vraiment [MASK]!", "Das ist so [MASK]!")
    if variant == "smoke":
        # Recipes are files, not modules of a package: any of them can be copied and changed by itself.
        runpy.run_path(str(Path(__file__).resolve().parent / "quickstart.py"))["smoke"](config)
    return config
