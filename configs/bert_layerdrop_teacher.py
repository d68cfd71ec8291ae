r"""A BERT teacher trained with LayerDrop, to be cut to every other layer (Fan et al. 2019, arXiv:1909.11556).

    python -m jaxdistill.train --config configs/bert_layerdrop_teacher.py --workdir runs/teacher \
        --config.tokenizer.name=bert-base-uncased --config.data.path=corpus.txt
    jaxdistill export --to-pytorch --workdir runs/teacher --out teacher/
    jaxdistill init-student --teacher teacher/ --layers every_other --out student/
    python -m jaxdistill.train --config configs/bert_mlm.py --workdir runs/student \
        --config.teacher.name=teacher/ --config.student.name=student/ --config.data.path=corpus.txt

The teacher is trained from scratch by masked language modelling alone, without the next-sentence task; to continue from
a trained model, add --config.student.name=FOLDER. Each layer is skipped in a step with probability 0.2, which saves its
work. The paper uses 0.1 to 0.2 for quality, and 0.5 where more than half of the layers will be pruned. Evaluation runs
all layers, and measures the sub-networks that pruning would leave as well.

Time: at most 2.8 hours on one NVIDIA H200 for every billion tokens that it trains on, reckoned (docs/times.md), so 110
hours for 40 epochs of a billion.

Result: nobody has run this recipe at full size yet. docs/results.md reports whether LayerDrop helps a distilled
student.

`:smoke` runs the same path in seconds, on the text and tokenizer of the quickstart.
"""

from pathlib import Path

from jaxdistill.config import Config, base, check_variant

QUICKSTART = Path(__file__).resolve().parent / "quickstart"


def get_config(variant: str = "") -> Config:
    check_variant(variant, "smoke")
    config = base()
    config.student.init = "random"
    config.student.overrides = {
        "model_type": "bert",
        "hidden_dropout_prob": 0.0,  # the paper: subtract 0.1 from the dropout where layers are dropped
        "attention_probs_dropout_prob": 0.0,
    }
    config.student.layer_drop = 0.2
    config.data.batching = "packed"
    config.mask.smoothing = 0.0  # as in BERT; the smoothed draw is for students
    config.loss.tokens = "masked"
    config.loss.alpha_mlm = 1.0
    config.train.epochs = 40.0
    config.train.batch_size = 256
    config.train.accumulation = 4
    config.optim.learning_rate = 1e-4
    config.optim.weight_decay = 0.01
    config.optim.clip = 1.0
    config.evaluate.pruned = ("every_other", "first:6")
    if variant == "smoke":
        sizes = {"vocab_size": 4000, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
        config.student.overrides = {"model_type": "bert", **sizes, "intermediate_size": 64}
        config.tokenizer.name = str(QUICKSTART / "teacher")
        config.data.path = str(QUICKSTART / "corpus.txt.gz")
        config.data.limit, config.data.max_length = 400, 64
        config.train.steps, config.train.batch_size, config.train.accumulation = 4, 16, 2
        config.evaluate.pruned = ("every_other", "first:2")
        config.evaluate.batches, config.evaluate.batch_size = 2, 8
        config.log.every = 1
    return config
