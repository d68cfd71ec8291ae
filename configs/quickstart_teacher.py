"""The quickstart's teacher: a small BERT trained from scratch, without a teacher, on State of the Union addresses.

    python scripts/make_quickstart.py --text state_of_the_union.txt.gz --workdir runs/quickstart-teacher

1.3 M parameters, 6 passes over 1.1 M tokens; the script runs this recipe twice. Only masked positions go through the
head, and they are drawn uniformly (no smoothing), as usual for BERT.

Time: some 16 minutes on two cores, reckoned from the 14,000 tokens a second of its first updates.

Result: on held-out rows the teacher reaches a perplexity of 60.
"""

from pathlib import Path

from jaxdistill.config import Config, base, check_variant

HERE = Path(__file__).resolve().parent / "quickstart"


def get_config(variant: str = "") -> Config:
    check_variant(variant, "smoke")
    config = base()
    config.student.init = "random"
    config.student.overrides = {
        "model_type": "bert",
        "vocab_size": 4000,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "max_position_embeddings": 128,
        "initializer_range": 0.08,  # about width ** -0.5; BERT's 0.02 is for a width of 768
        "hidden_dropout_prob": 0.0,  # every pass has new masks, and the model underfits
        "attention_probs_dropout_prob": 0.0,
    }
    config.data.path = str(HERE / "corpus.txt.gz")
    config.data.max_length = 128
    config.data.buckets = (64, 96, 128)
    config.mask.fraction = 0.3  # twice BERT's: a small model on little text learns more from each step
    config.mask.smoothing = 0.0
    config.loss.tokens = "masked"
    config.loss.alpha_mlm = 1.0
    config.train.epochs = 6.0
    config.train.batch_size = 32
    config.optim.learning_rate = 1.5e-3
    config.optim.betas = (0.9, 0.98)
    config.optim.weight_decay = 0.01
    config.optim.clip = 1.0
    config.evaluate.every = 500
    config.evaluate.prompts = ("The people of the United [MASK] want peace.",)
    config.checkpoint.every = 500
    config.log.every = 50
    config.export.license = "apache-2.0"
    if variant == "smoke":
        config.tokenizer.name = str(HERE / "teacher")
        config.train.steps, config.data.limit, config.evaluate.batches = 4, 400, 2
        config.log.every = 1
    return config
