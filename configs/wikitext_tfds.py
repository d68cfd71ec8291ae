"""GPT-2 distilled into half of its layers on WikiText-103, read from TensorFlow Datasets (extra `tfds`).

    pip install 'jaxdistill[tfds]'
    python -m jaxdistill.train --config configs/wikitext_tfds.py --workdir runs/wikitext
    jaxdistill evaluate --workdir runs/wikitext --config.data.eval_split=test

TFDS reads the data set through its builder of Hugging Face's data sets and keeps it as array_record, which needs no
TensorFlow; another one is `--config.data.path=NAME`, or a folder that TFDS has prepared. Articles are packed into rows
of 1,024 tokens, where none attends to another. Losses are those of DistilGPT2's scripts: half the divergence at
temperature 2 and half the next words.

Time: 1.5 hours on one NVIDIA H200 for three epochs, reckoned (docs/times.md).

Result: nobody has run this recipe at full size yet. On the test split, GPT-2 has a perplexity of 16.3 and DistilGPT2,
which was distilled on OpenWebText, 21.1, after both were fine-tuned on the train split (their authors' figures).

`:smoke` runs the same path in seconds, on the causal teacher and the text of the quickstart.
"""

import runpy
from pathlib import Path

from jaxdistill.config import Config, base, check_variant


def get_config(variant: str = "") -> Config:
    check_variant(variant, "smoke")
    config = base()
    config.teacher.name = "gpt2"
    config.student.layers = "every_other"
    config.data.source = "tfds"
    config.data.path = "huggingface:wikitext"
    config.data.subset = "wikitext-103-raw-v1"
    config.data.eval_split = "validation"
    config.data.batching = "packed"
    config.data.max_length = 1024
    config.mask.group = 1
    config.loss.tokens = "labels"
    config.loss.alpha_ce, config.loss.alpha_clm, config.loss.alpha_mlm, config.loss.alpha_cos = 0.5, 0.5, 0.0, 0.0
    config.train.batch_size = 64
    config.train.accumulation = 8  # micro-batches of 8 rows
    config.train.epochs = 3.0
    config.evaluate.batch_size = 8
    config.evaluate.prompts = ("The game was released in", "She was born in")
    if variant == "smoke":
        # Recipes are files, not modules of a package: any of them can be copied and changed by itself.
        runpy.run_path(str(Path(__file__).resolve().parent / "quickstart.py"))["smoke_packed"](config, "causal")
        config.data.source, config.data.subset, config.data.eval_split = "text", "", ""
        config.evaluate.max_new_tokens = 8
    return config
