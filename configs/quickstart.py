"""A 4-layer BERT distilled into every other of its layers: the whole path, offline.

    python -m jaxdistill.train --config configs/quickstart.py --workdir runs/quickstart

The teacher (1.3 M parameters) and the text (State of the Union addresses since about 1900, public domain) are in
configs/quickstart/; scripts/make_quickstart.py made both. The run distils, evaluates on held-out lines, exports to
runs/quickstart/export-pytorch, and prints the words that teacher and student predict for a [MASK], side by side.

Time: 40 seconds on two cores, if nothing else runs there (docs/times.md).

Result: the student reaches a perplexity of 302 where the teacher has 244, and 317 without the teacher's help.
"""

from pathlib import Path

from jaxdistill.config import Config, base, check_variant

HERE = Path(__file__).resolve().parent / "quickstart"


def get_config(variant: str = "") -> Config:
    check_variant(variant, "smoke")
    config = base()
    config.teacher.name = str(HERE / "teacher")
    config.student.layers = "every_other"
    config.data.path = str(HERE / "corpus.txt.gz")
    config.data.buckets = (96, 128)
    config.loss.tokens = "masked"  # only masked positions go through the head: a third of the work
    config.train.steps = 150
    config.train.batch_size = 32
    config.evaluate.batches = 16
    config.evaluate.every = 50
    config.evaluate.prompts = (
        "The people of the United [MASK] want peace.",
        "We must work for peace and [MASK].",
        "I ask the Congress to pass this [MASK].",
    )
    config.export.to = ("pytorch",)
    config.export.license = "apache-2.0"
    if variant == "smoke":
        smoke(config)
    return config


def smoke(config: Config, teacher: str = "teacher") -> Config:
    """Shrinks any recipe to one that runs in seconds: a teacher and text of the quickstart, and a few short steps."""
    config.teacher.name = str(HERE / teacher)
    config.data.path = str(HERE / "corpus.txt.gz")
    config.data.limit = 400
    config.data.max_length = 64
    config.data.buckets = (64,)
    config.train.steps = 4
    config.train.batch_size = 16
    config.train.accumulation = 2
    config.evaluate.every = 4
    config.evaluate.batches = 2
    config.evaluate.batch_size = 8
    config.log.every = 1
    config.mesh.fsdp = 1
    return config


def smoke_causal(config: Config, teacher: str = "causal") -> Config:
    """As `smoke`, for recipes of causal models that learn to answer: a small one, and pairs made from the same text."""
    causal, has_teacher = str(HERE / teacher), bool(config.teacher.name)
    smoke(config)
    config.teacher.name, config.student.name = (causal, "") if has_teacher else ("", causal)
    config.student.layers = 1 if has_teacher else None
    config.data.path = str(HERE / "pairs.csv")
    config.data.source, config.data.prompt_column, config.data.column = "csv", "article", "highlights"
    config.data.max_length = 128
    config.data.buckets = (128,)
    config.sample.max_new_tokens = config.evaluate.max_new_tokens = 8
    # ROUGE needs the extra `rouge`; the smoke variant runs without extras.
    config.evaluate.metrics = tuple(name for name in config.evaluate.metrics if name != "rouge")
    return config


def smoke_packed(config: Config, teacher: str) -> Config:
    """As `smoke`, for recipes of causal models that learn from plain text: a small one, and half of its layers."""
    smoke(config, teacher)
    config.student.name, config.student.layers = "", "every_other"
    return config
